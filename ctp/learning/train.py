"""Learning named parameters through a frozen model: the loop that soft prompts and LoRA share.

Every step is a function of spec, seed and step, and all that it changes is in a `TrainState`: a run resumes from one to
the same bytes. Nothing but the parameters, in front of the input or inside the model, has a gradient.
"""

import hashlib
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TypedDict

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ctp.cells import Learned
from ctp.cells.events import Progress
from ctp.cells.runtime import Runtime
from ctp.kernels.modules import rounded_weights
from ctp.learning.accelerator import accelerated
from ctp.learning.checkpoint import TrainState
from ctp.learning.run import Run, Trainable
from ctp.machine import signals
from ctp.machine.arithmetic import AUTOCAST, computed_in, widened
from ctp.machine.device import pick
from ctp.machine.threads import keep_heap
from ctp.prompts.attach import check_fit, frozen

Checkpoint = Callable[[TrainState], None]
Report = Callable[[Progress], None]


class How(TypedDict, total=False):
    """The options of `train`, which do not change what is learned."""

    runtime: Runtime
    resume: str | Path | None
    checkpoint: Checkpoint | None
    report: Report | None


def train(
    model: PreTrainedModel,
    make: Callable[[], AbstractContextManager[Trainable]],
    windows: Tensor,
    validation: Tensor,
    spec: Learned,
    *,
    runtime: Runtime = Runtime(),  # noqa: B008 (frozen)
    resume: str | Path | None = None,
    checkpoint: Checkpoint | None = None,
    report: Report | None = None,
) -> TrainState:
    """Minimise the next-token loss on `windows` (n, s) over what `make` gives; `best` of the state is what was learned.

    make: called once the model is frozen and on its device (runtime.device, unless accelerate has spread it out).
    resume: folder of a TrainState. checkpoint: called between two steps, at least runtime.checkpoint_seconds apart.
    report: called about once a second and after each validation; losses are nats per scored token whatever spec.loss
    is. If memory runs out, micro-batches are halved from then on: the gradient is the same sum up to rounding (dropout
    draws other masks). Half precision without fast arithmetic on the device is computed in float32, with rounded
    weights and without a loss scale.

    Raises ValueError if spec, text and model do not fit or the checkpoint is another run's, FloatingPointError on a
    loss or gradient that is not finite, OutOfMemory if one window at once is too many.
    """
    for text in (windows, validation):
        check_fit(model, text, spec.prompt_rows)
    if model.dtype == torch.float16 and spec.precision == "fp32":
        # The gradient of a mean over 4,000 tokens and 50,000 logits is below float16's least number, 6e-8.
        raise ValueError("a float16 model needs precision 'bf16' or 'fp16': without a loss scale its gradient vanishes")
    state = _initial(_identity(spec, windows, validation), resume)
    keep_heap()
    device, half = pick(runtime.device), AUTOCAST.get(spec.precision)
    native = half is None or computed_in(half, device) == half
    with accelerated(spec.precision if native else "fp32", device) as accelerator, frozen(model):
        if getattr(model, "hf_device_map", None) is None:
            model.to(accelerator.device)
        with widened(model, everything=not native), make() as trainable, _rounded(model, half, native):
            run = Run(trainable, windows, validation, spec, state, accelerator, runtime)
            _loop(run, runtime.checkpoint_seconds, checkpoint, report)
    return state


def _initial(identity: str, resume: str | Path | None) -> TrainState:
    if resume is None:
        return TrainState(identity)
    saved = TrainState.load(resume)
    if saved.identity != identity:
        raise ValueError(f"{resume} is a checkpoint of another spec or other text")
    return saved


def _rounded(model: PreTrainedModel, half: str | None, native: bool) -> AbstractContextManager[None]:
    """Frozen weights are rounded once to what autocast would round them to at every use; native: and stored so."""
    if half is None:
        return nullcontext()
    dtype: torch.dtype = getattr(torch, half)
    return rounded_weights(model, dtype, dtype if native else torch.float32)


def _loop(run: Run, checkpoint_seconds: float, checkpoint: Checkpoint | None, report: Report | None) -> None:
    spec, state = run.spec, run.state
    begun, before = time.monotonic(), state.seconds
    saved = reported = begun
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
        if report is not None and (validated or now - reported >= 1):
            report(run.progress())
            reported = now
        if checkpoint is None or last:
            continue
        if now - saved >= checkpoint_seconds or signals.stop_requested.is_set():
            checkpoint(run.snapshot())
            saved = time.monotonic()
        signals.check()


def _identity(spec: Learned, train: Tensor, validation: Tensor) -> str:
    digest = hashlib.sha256(spec.model_dump_json().encode())
    for windows in (train, validation):
        digest.update(repr(tuple(windows.shape)).encode() + windows.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
