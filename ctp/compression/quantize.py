"""Uniform grids: which scale and zero point a set of weights is rounded with.

A grid of b bits has the values scale * (code - zero) for code = 0 .. 2^b - 1. Scales are float16 numbers, as the packed
formats store them, and of a bfloat16 model bfloat16 numbers too, because its loaders round them; a code difference has
at most 9 bits, so that scale * (code - zero) is exact in float32 and the same number on every device.
"""

import torch
from torch import Tensor

NORM = 2.4  # GPTQ's exponent for the rounding error in the search for a range
SHRINK = 80  # the search tries ranges of 100 %, 99 % .. 21 % of the span
COARSE = 5  # every fifth of them first, then the neighbours of the best


def to_storage(scale: Tensor, model: torch.dtype) -> Tensor:
    """Scales as a model of that dtype stores them, never zero: what the solver rounds with is what is stored."""
    if model == torch.bfloat16:  # its 8 digits are whole steps of float16 from 2^-17 on
        return scale.clamp(min=2.0**-17, max=65280.0).to(torch.bfloat16).to(scale.dtype)
    return scale.clamp(min=2.0**-24, max=65504.0).to(torch.float16).to(scale.dtype)


def fit(x: Tensor, bits: int, *, sym: bool, mse: bool, model: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """The grid of every column of x (dimension 0: the weights that share a grid).

    x: (k, n). Returns scale and zero point, each (n,) in x's dtype; zero points are whole numbers in 0 .. 2^bits - 1.
    The range always holds 0, so that a pruned weight is on the grid. sym: zero point fixed at 2^(bits - 1).
    mse: the shrunken range with the least sum of |error|^2.4, as GPTQ's `mse` option (Frantar et al. 2022, code).
    model: dtype of the model that the weights are of.
    """
    low, high = x.amin(0).clamp_(max=0), x.amax(0).clamp_(min=0)
    if sym:
        high = torch.maximum(high, -low)
        low = -high
    empty = (low == 0) & (high == 0)
    low, high = low.masked_fill(empty, -1), high.masked_fill(empty, 1)
    if mse:
        return _search(x, low, high, bits, sym, model)
    return _grid(low, high, bits, sym, model)


def _grid(low: Tensor, high: Tensor, bits: int, sym: bool, model: torch.dtype) -> tuple[Tensor, Tensor]:
    top = 2**bits - 1
    scale = to_storage((high - low) / top, model)
    zero = torch.full_like(scale, 2 ** (bits - 1)) if sym else torch.round(-low / scale).clamp_(0, top)
    return scale, zero


def nearest(x: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Every weight at the nearest point of its grid; scale and zero broadcast against x."""
    steps = torch.round(x / scale)
    return torch.clamp(steps, -zero, 2**bits - 1 - zero).mul_(scale)


def _search(x: Tensor, low: Tensor, high: Tensor, bits: int, sym: bool, model: torch.dtype) -> tuple[Tensor, Tensor]:
    """Coarse steps, then fine ones around each column's best: a quarter of the work of trying every range."""
    best_error = torch.full_like(low, torch.inf)
    best_step = torch.zeros_like(low)
    scale, zero = torch.ones_like(low), torch.zeros_like(low)

    def attempt(step: Tensor) -> None:
        share = 1 - step.clamp(0, SHRINK - 1) / 100
        s, z = _grid(share * low, share * high, bits, sym, model)
        error = nearest(x, s, z, bits).sub_(x).abs_().pow_(NORM).sum(0)
        better = error < best_error
        for kept, new in ((best_error, error), (best_step, step), (scale, s), (zero, z)):
            kept.copy_(torch.where(better, new, kept))

    for step in range(0, SHRINK, COARSE):
        attempt(torch.full_like(low, step))
    centre = best_step.clone()
    for offset in range(1, COARSE):
        attempt(centre - offset)
        attempt(centre + offset)
    return scale, zero
