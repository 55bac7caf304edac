"""Whether compiled kernels (ctp.recover.kernels_cpu) are there, and for what."""

from contextlib import suppress
from typing import Any

from torch import Tensor

kernels: Any = None
with suppress(ImportError):  # no numba for this platform
    from ctp.recover import kernels_cpu as kernels


def compiled(*tensors: Tensor) -> bool:
    """Are there compiled kernels for tensors like these?"""
    return kernels is not None and all(map(kernels.fits, tensors))
