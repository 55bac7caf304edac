"""Elementwise parts of learning in bfloat16 on a CPU, each in one pass; torch takes several, some in copies of fp32.

Every row is computed alone: the number of threads does not change a bit.
"""

import ctypes
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ctp.machine import thread_pool

kernels_cpu: Any = None
with suppress(ImportError):  # no numba for this platform
    from ctp.recover import kernels_cpu


def compiled(*tensors: Tensor) -> bool:
    """Are there kernels for tensors like these? Else it is the caller's to compute the same in torch."""
    return kernels_cpu is not None and all(
        x.dtype == torch.bfloat16 and x.device.type == "cpu" and x.is_contiguous() for x in tensors
    )


@lru_cache
def _team() -> Any:
    """GOMP_parallel of the OpenMP runtime that came with torch; None where there is another.

    Its threads wait for torch's next loop for some milliseconds before they sleep: other threads would be in their way.
    """
    for path in sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*")):
        start = ctypes.CDLL(str(path)).GOMP_parallel
        start.argtypes, start.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint], None
        return start
    return None


def _run(kernel: Any, x: Tensor, *others: Tensor, real: float = 0.0, queries: int = 0) -> None:
    """The kernel over all rows of x, on as many threads as torch uses."""
    rows, columns, places = x.numel() // x.shape[-1], x.shape[-1], [y.data_ptr() for y in (x, *others)]
    task = (ctypes.c_int64 * kernels_cpu.PLACES)(0, rows, columns, queries, 0, *places)
    ctypes.c_double.from_buffer(task, 8 * kernels_cpu.REAL).value = real
    threads, team = min(torch.get_num_threads(), -(-rows // kernels_cpu.TILE)), _team()
    if threads > 1 and team is not None:
        team(kernel.address, ctypes.byref(task), threads, 0)
        return
    rest = [thread_pool(threads - 1).submit(kernel.ctypes, ctypes.byref(task)) for _ in range(threads - 1)]
    kernel.ctypes(ctypes.byref(task))
    for done in rest:
        done.result()


def exponentials(z: Tensor) -> tuple[Tensor, Tensor]:
    """The maxima of the rows of z (n, V) and the sums of exp(z - maximum), both (n, 1) in fp32; z becomes these
    exponentials, rounded once they are summed.
    """
    tops, sums = torch.empty(2, len(z), 1)
    _run(kernels_cpu.exponentials, z, tops, sums)
    return tops, sums


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor) -> Tensor:
    """w x / sqrt(mean(x^2) + eps) over the last dimension of x (n, d); returns out."""
    _run(kernels_cpu.rms_norm, x, weight, out, real=eps)
    return out


def rms_norm_gradient(grad: Tensor, x: Tensor, weight: Tensor, eps: float, base: Tensor) -> Tensor:
    """base plus the gradient for x (n, d) of that for `rms_norm`'s output; a new tensor."""
    out = torch.empty_like(x)
    _run(kernels_cpu.rms_norm_gradient, x, grad, weight, base, out, real=eps)
    return out


def causal_softmax(scores: Tensor, scale: float, queries: int, out: Tensor) -> Tensor:
    """softmax(scale * scores) of scores (n, groups * queries, s), scale > 0, where the last query sees all s keys and
    each before it one less. Returns out.
    """
    _run(kernels_cpu.causal_softmax, scores, out, real=scale, queries=queries)
    return out
