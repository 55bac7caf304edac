"""accelerate, which keeps one choice of precision and device per process, made a matter of one run."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState


@contextmanager
def accelerated(precision: str, device: str) -> Iterator[Accelerator]:
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
