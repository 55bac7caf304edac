"""One training run's live objects: the trainable parameters, their optimiser, and the state that they bring forward."""

import math
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel

from ctp.cells import Learned
from ctp.cells.events import Progress
from ctp.cells.runtime import Runtime
from ctp.evaluation.perplexity import perplexity
from ctp.learning.checkpoint import TrainState
from ctp.learning.objective import choose
from ctp.learning.steps import batch_rows, learning_rate
from ctp.machine.memory import AtOnce, smaller
from ctp.machine.random import generator


@dataclass
class Trainable:
    """What learns. parameters: by name, on the devices where they are used, in the optimiser's order.

    prompt: the one of them that stands in front of the input, rows (k, d), or None if all are inside the model.
    dropout: the modules that are in training mode while a loss is differentiated, and only then.
    """

    model: PreTrainedModel
    parameters: dict[str, nn.Parameter]
    prompt: nn.Parameter | None = None
    dropout: Sequence[nn.Module] = ()

    @contextmanager
    def updating(self, seed: int, step: int) -> Iterator[None]:
        """Dropout is on, with masks drawn by seed and step; the process's own random state is not touched."""
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

    def values(self) -> dict[str, Tensor]:
        """Copies of the parameters on the CPU, in their own dtype."""
        return {n: p.detach().to("cpu", copy=True) for n, p in self.parameters.items()}


class Run:
    """Updates, validations and snapshots of one run, from `state` on. windows, validation: token windows (n, s)."""

    def __init__(
        self, trainable: Trainable, windows: Tensor, validation: Tensor, spec: Learned, state: TrainState,
        accelerator: Accelerator, runtime: Runtime,
    ) -> None:  # fmt: skip
        self.trainable, self.windows, self.validation = trainable, windows, validation
        self.spec, self.state, self.accelerator = spec, state, accelerator
        self.device = trainable.model.get_input_embeddings().weight.device
        with torch.no_grad():
            for name, value in state.values.items():
                trainable.parameters[name].copy_(value)
        state.best = state.best or trainable.values()
        self.optimizer = accelerator.prepare_optimizer(self._adamw(), device_placement=False)
        if accelerator.scaler is not None and state.scaler:
            accelerator.scaler.load_state_dict(state.scaler)
        with accelerator.autocast():
            self.objective = choose(trainable.model, windows, trainable.prompt, runtime.recompute)
        at_most = AtOnce(self.micro_batch, runtime.halved).size
        self.at_once = AtOnce(min(state.at_once or at_most, at_most))
        self.losses: deque[float] = deque(maxlen=5)
        self.rate, self.trained, self.training_seconds = 0.0, 0, 0.0

    def _adamw(self) -> torch.optim.AdamW:
        """AdamW over the parameters, with the state's moments."""
        parameters, moments = self.trainable.parameters, self.state.moments
        adamw = torch.optim.AdamW(parameters.values(), lr=self.spec.lr, weight_decay=self.spec.weight_decay)
        if moments:
            by_number = {i: moments[n] for i, n in enumerate(parameters) if n in moments}
            adamw.load_state_dict({**adamw.state_dict(), "state": by_number})
        return adamw

    @property
    def micro_batch(self) -> int:
        """Windows a micro-batch by the spec; fewer go through at once if memory runs out."""
        return self.spec.batch // self.spec.accumulate

    def update(self) -> None:
        """One optimiser step over `batch` windows, in `accumulate` micro-batches, or more if memory runs out."""
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
        """The step's summed loss; its gradient is in the parameters, whatever a failed attempt left there."""
        spec, s, total = self.spec, self.windows.shape[1], 0.0
        self.optimizer.zero_grad()
        with self.trainable.updating(spec.seed, self.state.step), self.objective.active():
            for rows in batch_rows(len(self.windows), spec, self.state.step).split(at_once):
                with self.accelerator.autocast():
                    nll = self.objective.nll(self.windows[rows].to(self.device), self.trainable.prompt)
                # Divided by the whole batch's count, so that micro-batches add up to the full batch's loss.
                self.accelerator.backward(nll / (spec.batch * (s - 1 if spec.loss == "token_mean" else 1)))
                total += nll.item()
        return total

    def _step(self) -> None:
        """Clip, check and apply the gradient. Under fp16 an overflow first lowers the loss scale."""
        self.accelerator.unscale_gradients(self.optimizer)
        limit = math.inf if self.spec.clip is None else self.spec.clip
        norm = torch.nn.utils.clip_grad_norm_(self.trainable.parameters.values(), limit).item()
        scaler = self.accelerator.scaler
        if not math.isfinite(norm) and (scaler is None or scaler.get_scale() <= 1):
            raise self._diverged(f"the gradient's norm is {norm}")
        self.optimizer.step()

    def validate(self) -> None:
        """Add the validation loss to the history, and keep the parameters if it is the lowest."""
        state, model, prompt = self.state, self.trainable.model, self.trainable.prompt
        try:
            with self.accelerator.autocast():
                # The micro-batch, not Runtime.batch: the loss picks a step, and must not depend on where it ran.
                result = self.at_once(lambda n: perplexity(model, self.validation, prompt, batch=n))
        except FloatingPointError as error:
            raise self._diverged("the validation loss is not finite") from error
        val_loss = result.nll_sum / result.scored_tokens
        loss = state.loss_sum / state.loss_count if state.loss_count else None
        point = {"step": state.step, "val_loss": val_loss, "loss": loss, "lr": self.rate if state.step else None}
        state.history.append(point | smaller(self.micro_batch, self.at_once.size))
        state.loss_sum, state.loss_count = 0.0, 0
        if val_loss < state.best_loss:
            state.best_loss, state.best_step, state.best = val_loss, state.step, self.trainable.values()

    def progress(self) -> Progress:
        """Losses since the last validation, rates, and `val_loss` if it was measured at this step."""
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
        state.values = self.trainable.values()
        moments = self.optimizer.state_dict()["state"]  # empty while fp16 has skipped every update
        state.moments = {
            name: {n: t.detach().to("cpu", copy=True) for n, t in moments[i].items()}
            for i, name in enumerate(state.values)
            if i in moments
        }
        state.scaler = scaler.state_dict() if scaler is not None else {}
        return state

    def _diverged(self, what: str) -> FloatingPointError:
        last = ", ".join(f"{x:.4g}" for x in self.losses) or "none"
        return FloatingPointError(f"step {self.state.step}: {what}; learning rate {self.rate:.3g}; last losses: {last}")
