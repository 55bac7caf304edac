"""Memory that runs out, of a GPU or of the host: how it is recognised, and trying again with less at once.

A process that the kernel or Ray ends for its memory never gets here: see ctp.scheduling.tune.
"""

import gc
from collections.abc import Callable
from typing import Any, TypeVar

import torch

T = TypeVar("T")
# In messages of plain RuntimeErrors of torch and CUDA's libraries.
SIGNS = (
    "can't allocate memory",
    "not enough memory: you tried to allocate",
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "bad_alloc",
)


class OutOfMemory(MemoryError):
    """There is too little memory for one window (or row) at once; the message names the sizes that were tried."""


def ran_out(error: BaseException) -> bool:
    """Is this error, or its cause, a lack of memory?"""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, RuntimeError) and any(sign in str(error) for sign in SIGNS):
        return True
    return error.__cause__ is not None and ran_out(error.__cause__)


class AtOnce:
    """How many windows (or rows) go through the model at once: halved where memory runs out, and so from then on.

    halved: how often that has happened before.
    """

    def __init__(self, size: int, halved: int = 0) -> None:
        self.size = max(1, -(-size // 2**halved))
        self.tried: list[int] = []  # what was too much

    def __call__(self, attempt: Callable[[int], T]) -> T:
        """attempt(size), begun anew with half as many where memory runs out. Raises OutOfMemory where one is too many.

        An attempt must leave nothing behind that counts if it is begun anew.
        """
        while True:
            try:
                return attempt(self.size)
            except Exception as e:
                if not ran_out(e):
                    raise
                self.tried.append(self.size)
                if self.size == 1:
                    *first, last = map(str, self.tried)
                    sizes = f"{', '.join(first)} and {last}" if first else last  # as in: 4, 2 and 1
                    raise OutOfMemory(f"{reason(e)}; tried with {sizes} at once") from e
            # Only now, behind the handler: the error held the frames of the attempt, and these its tensors.
            free()
            self.size = (self.size + 1) // 2


def free() -> None:
    """Free what nothing refers to: a failed pass leaves cycles, and torch keeps the GPU memory that it once had."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def reason(error: BaseException) -> str:
    """The error's message about the memory that could not be had, on one line, without its advice."""
    if isinstance(error, OutOfMemory):
        return str(error)
    text = " ".join(str(error).split())
    text = text.rpartition("DefaultCPUAllocator: ")[2]
    for rest in (". Process", " Of the allocated memory", " Error code"):
        text = text.partition(rest)[0]
    name = type(error).__name__
    return text[:300].rstrip(". ") or ("no memory was left" if name == "MemoryError" else name)


def explained(error: BaseException, trace: str, advice: str) -> OutOfMemory:
    """The error of a cell: what was lacking, what was tried, what could help; `trace` is added as a note.

    It is not chained to `error`, whose frames hold the tensors that took the memory.
    """
    failure = OutOfMemory(f"{reason(error)}; {advice}")
    failure.add_note(trace)
    return failure


def smaller(requested: int, used: int) -> dict[str, Any]:
    """What a record says of windows at once where fewer had to do."""
    return {"at_once": used} if used < requested else {}
