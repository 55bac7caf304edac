"""Learning a soft prompt through a compressed model: Eq. (1) of the paper.

    min over E in R^{k x d} of  sum_{t=1..n} -log p(x_t | e_1 .. e_k, x_0 .. x_{t-1})

The model is frozen; the prompt E, kept in fp32, is all that has a gradient.
"""

import hashlib
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ctp.evaluate.perplexity import perplexity
from ctp.methods import SoftPrompt
from ctp.recover.attach import check_fit, frozen, scored_logits, summed_nll
from ctp.recover.state import LearnedPrompt, TrainState, load_prompt
from ctp.recover.steps import batch_rows, generator, learning_rate
from ctp.spec import Runtime

if TYPE_CHECKING:
    from ctp.job import LearnJob

__all__ = ["LearnedPrompt", "TrainState", "initial_prompt", "learn", "load_prompt"]


def learn(
    model: PreTrainedModel,
    train: Tensor,
    validation: Tensor,
    spec: SoftPrompt,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    runtime: Runtime = Runtime(),  # noqa: B008 (frozen)
    resume: str | Path | None = None,
    checkpoint: Callable[[TrainState], None] | None = None,
    report: Callable[[dict[str, Any]], None] | None = None,
) -> LearnedPrompt:
    """Learn `spec.k` rows in front of the windows of `train` (n, s); keep the step with the lowest validation loss.

    The model moves to runtime.device (unless accelerate has spread it out) and is otherwise left as it was found.
    resume: folder of a TrainState to go on from, to the same bytes as without the interruption. checkpoint: called
    between two steps, at least runtime.checkpoint_seconds apart. report: called about once a second and after each
    validation with step, steps, loss, lr, tokens_per_s (window tokens, while training), best_val_loss, best_step and,
    when measured, val_loss; losses are nats per scored token whatever spec.loss is.

    Raises ValueError where spec, text and model do not fit or the checkpoint is another run's, FloatingPointError
    (with step, learning rate and last losses) on a loss or gradient that is not finite.
    """
    check_fit(model, train, spec.k)
    check_fit(model, validation, spec.k)
    if model.dtype == torch.float16 and spec.precision == "fp32":
        # The gradient of a mean over 4,000 tokens and 50,000 logits lies below float16's least number, 6e-8.
        raise ValueError("a float16 model needs precision 'bf16' or 'fp16': without a loss scale its gradient vanishes")
    identity = _identity(spec, train, validation)
    if resume is not None:
        state = TrainState.load(resume)
        if state.identity != identity:
            raise ValueError(f"{resume} is a checkpoint of another spec or other text")
    else:
        rows = initial_prompt(model, spec, tokenizer)
        state = TrainState(identity, prompt=rows, best=rows.clone())
    with _accelerator(spec.precision, runtime.device) as accelerator, frozen(model):
        run = _Run(model, train, validation, spec, state, accelerator)
        _loop(run, runtime.checkpoint_seconds, checkpoint, report)
    return LearnedPrompt(state.best, state.best_step, state.best_loss, state.history, state.seconds)


def _loop(
    run: "_Run",
    checkpoint_seconds: float,
    checkpoint: Callable[[TrainState], None] | None,
    report: Callable[[dict[str, Any]], None] | None,
) -> None:
    spec, state = run.spec, run.state
    begun, before = time.monotonic(), state.seconds
    saved = told = begun
    if not state.history:
        run.validate()
        if report is not None:
            report(run.numbers())
    while state.step < spec.steps:
        run.update()
        last = state.step == spec.steps
        validated = last or state.step % spec.validate_every == 0
        if validated:
            run.validate()
        now = time.monotonic()
        state.seconds = before + now - begun
        if report is not None and (validated or now - told >= 1):
            report(run.numbers())
            told = now
        if checkpoint is not None and not last and now - saved >= checkpoint_seconds:
            checkpoint(run.snapshot())
            saved = time.monotonic()


class _Run:
    """One run's live objects: the prompt as a parameter, its optimiser, and the state that they bring forward."""

    def __init__(
        self,
        model: PreTrainedModel,
        train: Tensor,
        validation: Tensor,
        spec: SoftPrompt,
        state: TrainState,
        accelerator: Accelerator,
    ) -> None:
        if getattr(model, "hf_device_map", None) is None:
            model.to(accelerator.device)
        self.model, self.train, self.validation = model, train, validation
        self.spec, self.state, self.accelerator = spec, state, accelerator
        self.device = model.get_input_embeddings().weight.device
        self.prompt = torch.nn.Parameter(state.prompt.to(self.device, copy=True))
        adamw = torch.optim.AdamW([self.prompt], lr=spec.lr, weight_decay=spec.weight_decay)
        if state.moments:
            adamw.load_state_dict({**adamw.state_dict(), "state": {0: state.moments}})
        self.optimizer = accelerator.prepare_optimizer(adamw, device_placement=False)
        if accelerator.scaler is not None and state.scaler:
            accelerator.scaler.load_state_dict(state.scaler)
        self.losses: deque[float] = deque(maxlen=5)
        self.rate, self.trained, self.training_seconds = 0.0, 0, 0.0

    def update(self) -> None:
        """One optimiser step over `batch` windows, in `accumulate` micro-batches."""
        begun, spec, state = time.monotonic(), self.spec, self.state
        s = self.train.shape[1]
        self.rate = learning_rate(spec, state.step)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate
        self.optimizer.zero_grad()
        total = 0.0
        for rows in batch_rows(len(self.train), spec, state.step).chunk(spec.accumulate):
            nll = self._nll(self.train[rows].to(self.device))
            # Divided by the whole batch's count, so that micro-batches add up to the full batch's loss.
            self.accelerator.backward(nll / (spec.batch * (s - 1 if spec.loss == "token_mean" else 1)))
            total += nll.item()
        state.step += 1
        self.losses.append(total / (spec.batch * (s - 1)))
        if not math.isfinite(total):
            raise self._diverged(f"the training loss is {total}")
        self._step()
        state.loss_sum += self.losses[-1]
        state.loss_count += 1
        self.trained += spec.batch * s
        self.training_seconds += time.monotonic() - begun

    def _nll(self, windows: Tensor) -> Tensor:
        with self.accelerator.autocast():
            logits = scored_logits(self.model, windows, self.prompt)
        return summed_nll(logits, windows)

    def _step(self) -> None:
        """Clip, check and apply the gradient. Under fp16 a first overflow only lowers the loss scale, as it should."""
        self.accelerator.unscale_gradients(self.optimizer)
        limit = math.inf if self.spec.clip is None else self.spec.clip
        norm = torch.nn.utils.clip_grad_norm_([self.prompt], limit).item()
        scaler = self.accelerator.scaler
        if not math.isfinite(norm) and (scaler is None or scaler.get_scale() <= 1):
            raise self._diverged(f"the gradient's norm is {norm}")
        self.optimizer.step()

    def validate(self) -> None:
        """Measure the validation loss, enter it into the history, and keep the prompt if none before was as good."""
        spec, state = self.spec, self.state
        try:
            with self.accelerator.autocast():
                # The micro-batch and not Runtime.batch: the loss picks a step, and must not depend on where it ran.
                result = perplexity(self.model, self.validation, self.prompt, batch=spec.batch // spec.accumulate)
        except FloatingPointError as error:
            raise self._diverged("the validation loss is not finite") from error
        val_loss = result.nll_sum / result.scored_tokens
        loss = state.loss_sum / state.loss_count if state.loss_count else None
        state.history.append({"step": state.step, "val_loss": val_loss, "loss": loss, "lr": self.rate})
        state.loss_sum, state.loss_count = 0.0, 0
        if val_loss < state.best_loss:
            state.best_loss, state.best_step = val_loss, state.step
            state.best = self.prompt.detach().to("cpu", copy=True)

    def numbers(self) -> dict[str, Any]:
        """What `report` is told after a step."""
        state, measured = self.state, self.state.history[-1]
        numbers = {
            "step": state.step,
            "steps": self.spec.steps,
            "loss": self.losses[-1] if self.losses else None,
            "lr": self.rate,
            "tokens_per_s": self.trained / self.training_seconds if self.trained else None,
            "best_val_loss": state.best_loss,
            "best_step": state.best_step,
        }
        return {**numbers, "val_loss": measured["val_loss"]} if measured["step"] == state.step else numbers

    def snapshot(self) -> TrainState:
        """The state with the prompt, the optimiser's moments and the loss scale as they are now."""
        state, scaler = self.state, self.accelerator.scaler
        state.prompt = self.prompt.detach().to("cpu", copy=True)
        moments = self.optimizer.state_dict()["state"].get(0, {})  # none while fp16 has skipped every update
        state.moments = {n: t.detach().to("cpu", copy=True) for n, t in moments.items()}
        state.scaler = scaler.state_dict() if scaler is not None else {}
        return state

    def _diverged(self, what: str) -> FloatingPointError:
        last = ", ".join(f"{x:.4g}" for x in self.losses)
        return FloatingPointError(f"step {self.state.step}: {what}; learning rate {self.rate:.3g}; last losses: {last}")


def initial_prompt(
    model: PreTrainedModel, spec: SoftPrompt, tokenizer: PreTrainedTokenizerBase | None = None
) -> Tensor:
    """The k rows (k, d), fp32 on the CPU, that learning starts from: embeddings of k tokens.

    random_rows: distinct vocabulary entries drawn by spec.seed (the paper's text). first_rows: entries 0 .. k-1 (its
    code). text: the tokens of spec.init_text, repeated or cut to k. Raises ValueError if there are too few.
    """
    embedding = model.get_input_embeddings()
    size = embedding.num_embeddings
    if spec.init == "text":
        if tokenizer is None or spec.init_text is None:
            raise ValueError("init 'text' needs the model's tokenizer")
        tokens = tokenizer(spec.init_text, add_special_tokens=False)["input_ids"]
        if not tokens:
            raise ValueError(f"init_text = {spec.init_text!r} has no tokens")
        ids = torch.tensor([tokens[i % len(tokens)] for i in range(spec.k)])
    elif spec.k > size:
        raise ValueError(f"k = {spec.k} rows cannot be distinct entries of a vocabulary of {size}")
    elif spec.init == "first_rows":
        ids = torch.arange(spec.k)
    else:
        ids = torch.randperm(size, generator=generator("init", spec.seed))[: spec.k]
    with torch.no_grad():
        return embedding(ids.to(embedding.weight.device)).to("cpu", torch.float32, copy=True)


def _identity(spec: SoftPrompt, train: Tensor, validation: Tensor) -> str:
    digest = hashlib.sha256(spec.model_dump_json().encode())
    for windows in (train, validation):
        digest.update(repr(tuple(windows.shape)).encode() + windows.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def _accelerator(precision: str, device: str) -> Iterator[Accelerator]:
    """An Accelerator of this precision and device, whatever ran in this process before.

    accelerate keeps both in process-wide dictionaries and refuses a second choice: they are set aside for the run.
    Raises ValueError if the device cannot do what is asked.
    """
    cuda = torch.cuda.is_available() and device != "cpu"
    if device == "cuda" and not cuda:
        raise ValueError("device 'cuda' is asked for, but no GPU is visible")
    if precision == "fp16" and not cuda:
        raise ValueError("precision 'fp16' needs a loss scale and a GPU: use 'bf16' or 'fp32' on the CPU")
    shared = (AcceleratorState._shared_state, PartialState._shared_state)
    before = [dict(s) for s in shared]
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        yield Accelerator(mixed_precision="no" if precision == "fp32" else precision, cpu=not cuda)
    finally:
        for s, old in zip(shared, before, strict=True):
            s.clear()
            s.update(old)


def recover(spec: SoftPrompt, job: "LearnJob") -> dict[str, float]:
    """Learn the prompt through the job's model, going on from its last saved state."""
    train, validation = job.windows(spec.text), job.windows(spec.validation)
    with job.partial() as resume:
        learned = learn(
            job.model, train, validation, spec, tokenizer=job.tokenizer, runtime=job.runtime,
            resume=resume, checkpoint=job.keep, report=job.report,
        )  # fmt: skip
    learned.save(job.folder, job.model_name)
    job.record["train_seconds"] = learned.seconds
    return {
        "best_step": learned.best_step,
        "best_val_loss": learned.best_val_loss,
        "initial_val_loss": learned.history[0]["val_loss"],
        "trainable_parameters": learned.embeddings.numel(),
    }
