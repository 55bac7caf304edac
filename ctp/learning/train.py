"""Learning named parameters through a frozen model: the loop that soft prompts and LoRA share.

Every step is a function of spec, seed and step, and all that it changes is in a `TrainState`: a run goes on from one to
the same bytes. The parameters stand in front of the input or inside the model; nothing else has a gradient.
"""

import hashlib
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel

from ctp.cells import Learned
from ctp.cells.events import Progress
from ctp.cells.runtime import Runtime
from ctp.evaluation.perplexity import PerplexityResult, perplexity
from ctp.kernels.modules import rounded_weights
from ctp.learning.accelerator import accelerated
from ctp.learning.checkpoint import TrainState
from ctp.learning.objective import choose
from ctp.learning.steps import batch_rows, learning_rate
from ctp.machine import signals
from ctp.machine.arithmetic import AUTOCAST, computed_in, widened
from ctp.machine.device import pick
from ctp.machine.memory import AtOnce, smaller
from ctp.machine.random import generator
from ctp.machine.threads import keep_heap
from ctp.prompts.attach import check_fit, frozen

Checkpoint = Callable[[TrainState], None]
Report = Callable[[Progress], None]


@dataclass
class Trainable:
    """What learns. parameters: by name, on the devices where they are used; their order is the optimiser's.

    prompt: the one of them that stands in front of the input, rows (k, d), or None where all are inside the model.
    dropout: the modules that are in training mode while a loss is differentiated, and only then.
    """

    model: PreTrainedModel
    parameters: dict[str, nn.Parameter]
    prompt: nn.Parameter | None = None
    dropout: Sequence[nn.Module] = ()

    def score(self, windows: Tensor, batch: int) -> PerplexityResult:
        """The windows (n, s) scored as an evaluation would score them."""
        return perplexity(self.model, windows, self.prompt, batch=batch)

    @contextmanager
    def updating(self, seed: int, step: int) -> Iterator[None]:
        """Dropout is on, its masks a function of seed and step; the process's own random numbers are not touched."""
        if not self.dropout:
            yield
            return
        with torch.random.fork_rng(devices=list(range(torch.cuda.device_count()))):
            torch.manual_seed(generator("dropout", seed, step).initial_seed())
            try:
                for module in self.dropout:
                    module.train()
                yield
            finally:
                for module in self.dropout:
                    module.eval()


def train(
    model: PreTrainedModel,
    make: Callable[[], AbstractContextManager[Trainable]],
    windows: Tensor,
    validation: Tensor,
    spec: Learned,
    *,
    runtime: Runtime,
    resume: str | Path | None = None,
    checkpoint: Checkpoint | None = None,
    report: Report | None = None,
) -> TrainState:
    """Minimise the next-token loss on `windows` (n, s) over what `make` gives; `best` of the state is what was learned.

    make: called once the model is frozen and on its device (runtime.device, unless accelerate has spread it out); what
    it changed about the model it undoes on its way out. resume: folder of a TrainState to go on from, to the same bytes
    as without the interruption. checkpoint: called between two steps, at least runtime.checkpoint_seconds apart.
    report: called about once a second and after each validation; losses are nats per scored token whatever spec.loss
    is, and val_loss is there when it was measured at this step. Where memory runs out, a micro-batch is halved,
    and stays so: the gradient is the same sum up to rounding (and dropout draws other masks); report and history then
    say how many windows go through `at_once`. Half precision that the device has no fast arithmetic for, of the model
    or of spec.precision, is computed in float32, with the weights rounded as asked and without a loss scale.

    Raises ValueError where spec, text and model do not fit or the checkpoint is another run's, FloatingPointError
    (with step, learning rate and last losses) on a loss or gradient that is not finite, OutOfMemory where one window at
    once is too many.
    """
    for text in (windows, validation):
        check_fit(model, text, spec.prompt_rows)
    if model.dtype == torch.float16 and spec.precision == "fp32":
        # The gradient of a mean over 4,000 tokens and 50,000 logits lies below float16's least number, 6e-8.
        raise ValueError("a float16 model needs precision 'bf16' or 'fp16': without a loss scale its gradient vanishes")
    state = TrainState(_identity(spec, windows, validation))
    if resume is not None:
        saved = TrainState.load(resume)
        if saved.identity != state.identity:
            raise ValueError(f"{resume} is a checkpoint of another spec or other text")
        state = saved
    keep_heap()
    device = pick(runtime.device)
    half = AUTOCAST.get(spec.precision)
    native = half is None or computed_in(half, device) == half
    with accelerated(spec.precision if native else "fp32", device) as accelerator, frozen(model):
        if getattr(model, "hf_device_map", None) is None:
            model.to(accelerator.device)
        with widened(model, everything=not native), make() as trainable, _rounded(model, half, native):
            run = _Run(trainable, windows, validation, spec, state, accelerator, runtime)
            _loop(run, runtime.checkpoint_seconds, checkpoint, report)
    return state


def _rounded(model: PreTrainedModel, half: str | None, native: bool) -> AbstractContextManager[None]:
    """Frozen weights are rounded once to what autocast would round them to at every use; native: and held as that."""
    if half is None:
        return nullcontext()
    dtype: torch.dtype = getattr(torch, half)
    return rounded_weights(model, dtype, dtype if native else torch.float32)


def _loop(run: "_Run", checkpoint_seconds: float, checkpoint: Checkpoint | None, report: Report | None) -> None:
    spec, state = run.spec, run.state
    begun, before = time.monotonic(), state.seconds
    saved = told = begun
    if not state.history:
        run.validate()
        if report is not None:
            report(run.progress())
    while state.step < spec.steps:
        run.update()
        last = state.step == spec.steps
        validated = last or state.step % spec.validate_every == 0
        if validated:
            run.validate()
        now = time.monotonic()
        state.seconds = before + now - begun
        if report is not None and (validated or now - told >= 1):
            report(run.progress())
            told = now
        if checkpoint is None or last:
            continue
        if now - saved >= checkpoint_seconds or signals.asked.is_set():
            checkpoint(run.snapshot())
            saved = time.monotonic()
        signals.check()


class _Run:
    """One run's live objects: the parameters, their optimiser, and the state that they bring forward."""

    def __init__(
        self,
        trainable: Trainable,
        windows: Tensor,
        validation: Tensor,
        spec: Learned,
        state: TrainState,
        accelerator: Accelerator,
        runtime: Runtime,
    ) -> None:
        self.trainable, self.windows, self.validation = trainable, windows, validation
        self.spec, self.state, self.accelerator = spec, state, accelerator
        self.device = trainable.model.get_input_embeddings().weight.device
        self.names, self.parameters = list(trainable.parameters), list(trainable.parameters.values())
        with torch.no_grad():
            for name, value in state.values.items():
                trainable.parameters[name].copy_(value)
        state.best = state.best or self._values()
        adamw = torch.optim.AdamW(self.parameters, lr=spec.lr, weight_decay=spec.weight_decay)
        if state.moments:
            moments = {i: state.moments[n] for i, n in enumerate(self.names) if n in state.moments}
            adamw.load_state_dict({**adamw.state_dict(), "state": moments})
        self.optimizer = accelerator.prepare_optimizer(adamw, device_placement=False)
        if accelerator.scaler is not None and state.scaler:
            accelerator.scaler.load_state_dict(state.scaler)
        with accelerator.autocast():
            self.objective = choose(trainable.model, windows, trainable.prompt, runtime.recompute)
        at_most = AtOnce(self.micro_batch, runtime.halved).size
        self.at_once = AtOnce(min(state.at_once or at_most, at_most))
        self.losses: deque[float] = deque(maxlen=5)
        self.rate, self.trained, self.training_seconds = 0.0, 0, 0.0

    @property
    def micro_batch(self) -> int:
        """Windows a micro-batch by the spec; fewer go through at once where memory runs out."""
        return self.spec.batch // self.spec.accumulate

    def update(self) -> None:
        """One optimiser step over `batch` windows, in `accumulate` micro-batches, or more where memory runs out."""
        begun, spec, state = time.monotonic(), self.spec, self.state
        s = self.windows.shape[1]
        self.rate = learning_rate(spec, state.step)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate
        total = self.at_once(self._gradient)
        state.at_once = self.at_once.size
        state.step += 1
        self.losses.append(total / (spec.batch * (s - 1)))
        if not math.isfinite(total):
            raise self._diverged(f"the training loss is {total}")
        self._step()
        state.loss_sum += self.losses[-1]
        state.loss_count += 1
        self.trained += spec.batch * s
        self.training_seconds += time.monotonic() - begun

    def _gradient(self, at_once: int) -> float:
        """The step's summed loss, and its gradient in the parameters: begun anew, whatever a last try left there."""
        spec, s, total = self.spec, self.windows.shape[1], 0.0
        self.optimizer.zero_grad()
        with self.trainable.updating(spec.seed, self.state.step), self.objective.active():
            for rows in batch_rows(len(self.windows), spec, self.state.step).split(at_once):
                nll = self._nll(self.windows[rows].to(self.device))
                # Divided by the whole batch's count, so that micro-batches add up to the full batch's loss.
                self.accelerator.backward(nll / (spec.batch * (s - 1 if spec.loss == "token_mean" else 1)))
                total += nll.item()
        return total

    def _nll(self, windows: Tensor) -> Tensor:
        with self.accelerator.autocast():
            return self.objective.nll(windows, self.trainable.prompt)

    def _step(self) -> None:
        """Clip, check and apply the gradient. Under fp16 a first overflow only lowers the loss scale, as it should."""
        self.accelerator.unscale_gradients(self.optimizer)
        limit = math.inf if self.spec.clip is None else self.spec.clip
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, limit).item()
        scaler = self.accelerator.scaler
        if not math.isfinite(norm) and (scaler is None or scaler.get_scale() <= 1):
            raise self._diverged(f"the gradient's norm is {norm}")
        self.optimizer.step()

    def validate(self) -> None:
        """Measure the validation loss, enter it into the history, and keep the parameters if none were as good."""
        state = self.state
        try:
            with self.accelerator.autocast():
                # The micro-batch and not Runtime.batch: the loss picks a step, and must not depend on where it ran.
                result = self.at_once(lambda n: self.trainable.score(self.validation, n))
        except FloatingPointError as error:
            raise self._diverged("the validation loss is not finite") from error
        val_loss = result.nll_sum / result.scored_tokens
        loss = state.loss_sum / state.loss_count if state.loss_count else None
        point = {"step": state.step, "val_loss": val_loss, "loss": loss, "lr": self.rate if state.step else None}
        state.history.append(point | smaller(self.micro_batch, self.at_once.size))
        state.loss_sum, state.loss_count = 0.0, 0
        if val_loss < state.best_loss:
            state.best_loss, state.best_step = val_loss, state.step
            state.best = self._values()

    def progress(self) -> Progress:
        """What is reported after a step."""
        state, measured = self.state, self.state.history[-1]
        return Progress(
            step=state.step,
            steps=self.spec.steps,
            loss=state.loss_sum / state.loss_count if state.loss_count else measured["loss"],
            val_loss=measured["val_loss"] if measured["step"] == state.step else None,
            lr=self.rate if state.step else None,
            tokens_per_s=self.trained / self.training_seconds if self.trained else None,
            best_val_loss=state.best_loss,
            best_step=state.best_step,
            **smaller(self.micro_batch, self.at_once.size),
        )

    def snapshot(self) -> TrainState:
        """The state with the parameters, the optimiser's moments and the loss scale as they are now."""
        state, scaler = self.state, self.accelerator.scaler
        state.values = self._values()
        moments = self.optimizer.state_dict()["state"]  # empty while fp16 has skipped every update
        state.moments = {
            self.names[i]: {n: t.detach().to("cpu", copy=True) for n, t in each.items()} for i, each in moments.items()
        }
        state.scaler = scaler.state_dict() if scaler is not None else {}
        return state

    def _values(self) -> dict[str, Tensor]:
        """Copies of the parameters on the CPU, in their own dtype."""
        return {n: p.detach().to("cpu", copy=True) for n, p in self.trainable.parameters.items()}

    def _diverged(self, what: str) -> FloatingPointError:
        last = ", ".join(f"{x:.4g}" for x in self.losses) or "none"
        return FloatingPointError(f"step {self.state.step}: {what}; learning rate {self.rate:.3g}; last losses: {last}")


def _identity(spec: Learned, train: Tensor, validation: Tensor) -> str:
    digest = hashlib.sha256(spec.model_dump_json().encode())
    for windows in (train, validation):
        digest.update(repr(tuple(windows.shape)).encode() + windows.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
