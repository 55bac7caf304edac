"""accelerate, which keeps one precision and device per process, with those of one run."""

from collections.abc import Iterator
from contextlib import contextmanager

from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState


@contextmanager
def accelerated(precision: str, device: str) -> Iterator[Accelerator]:
    """An Accelerator of this precision on "cuda" or "cpu"; the process's own choice is set aside meanwhile."""
    shared = (AcceleratorState._shared_state, PartialState._shared_state)
    before = [dict(s) for s in shared]
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        yield Accelerator(mixed_precision="no" if precision == "fp32" else precision, cpu=device == "cpu")
    finally:
        for s, old in zip(shared, before, strict=True):
            s.clear()
            s.update(old)
