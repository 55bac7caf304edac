"""One solver for GPTQ, SparseGPT and both at once: tensors in, tensors out.

Notation of the papers (GPTQ: Frantar et al. 2022, algorithm 1; SparseGPT: Frantar & Alistarh 2023, algorithm 1):
weight W (outputs, inputs), Hessian H = 2 X X^T of the layer's squared output error, U the upper Cholesky factor of
H^-1 = U^T U. Inputs ("columns") are settled one after the other: column j takes its final value q_j, its error
e_j = (w_j - q_j) / U_jj is spread over the columns not yet settled, W_k -= e_j U_jk. Inside a block of `block_size`
columns this happens at once, on the columns behind the block once per block ("lazy batch updates").
"""

import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from ctp.architectures.linears import all_finite
from ctp.cells import Solver, SparseGPT
from ctp.compression.quantize import fit
from ctp.compression.refit import refit
from ctp.compression.settle import MAX_COLUMNS, Block, choose, settle_loop
from ctp.formats.layer import Layer
from ctp.machine import triton


@dataclass(frozen=True, eq=False)
class Inverse:
    """What the linears on one input share: U, R = U^-1 and the damped H = R R^T (inputs, inputs), column order, dead
    inputs (inputs,).

    Rows and columns of all three are in `order`; dead (bool, in the model's order): 0 on all calibration tokens.
    """

    upper: Tensor
    root: Tensor
    damped: Tensor
    order: Tensor
    dead: Tensor


def factorise(hessian: Tensor, damping: float, act_order: bool) -> Inverse:
    """The upper Cholesky factor of the inverse of the damped Hessian (inputs, inputs), in the Hessian's dtype.

    Inverting a triangle is cheaper and more exact than inverting H and factorising again: H = R R^T with R upper
    gives U = R^-1, and R is the lower factor of H with rows and columns reversed. Any positive multiple of H gives
    the same solution. Raises ValueError if H is not finite or not positive definite.
    """
    diagonal = hessian.diagonal()
    if not all_finite(hessian):
        raise ValueError("the Hessian is not finite: an activation overflowed or is NaN")
    dead = diagonal == 0
    live = diagonal[~dead]
    mean = float(live.mean()) if live.numel() else 1.0
    order = torch.arange(len(diagonal), device=hessian.device)
    if act_order:
        order = torch.argsort(diagonal, descending=True, stable=True)
    damped = hessian.index_select(0, order).index_select(1, order) if act_order else hessian.clone()
    # A dead input has a zero row and column; any positive diagonal leaves it alone.
    damped.diagonal().add_(damping * mean).add_(dead[order].to(hessian.dtype) * mean)
    lower, info = torch.linalg.cholesky_ex(damped.flip(0, 1))
    if int(info):
        raise ValueError(f"the Hessian is not positive definite at damping = {damping}: raise damping")
    root = lower.flip(0, 1)
    return Inverse(_invert(root, torch.zeros_like(damped)), root, damped, order, dead)


def _invert(upper: Tensor, out: Tensor, small: int = 256) -> Tensor:
    """The inverse of an upper triangle into out, zeros, by halves: most of it is matrix products, and few of their
    factors are zeros.
    """
    n = len(upper)
    if n <= small:
        unit = torch.eye(n, dtype=upper.dtype, device=upper.device)
        return out.copy_(torch.linalg.solve_triangular(upper, unit, upper=True))
    half = n // 2
    first, last = (_invert(upper[s, s], out[s, s], small) for s in (slice(half), slice(half, n)))
    torch.matmul(first @ upper[:half, half:], last.neg(), out=out[:half, half:])
    return out


def check_shape(columns: int, compression: Solver) -> None:
    """Raises ValueError where a group size or n:m pattern does not divide the number of inputs."""
    for name, size in (("group_size", compression.group_size), ("m of pattern", (_n_of_m(compression) or (0, 1))[1])):
        if size is not None and columns % size:
            allowed = [d for d in range(2, columns + 1) if columns % d == 0]
            raise ValueError(f"{name} = {size} does not divide {columns} inputs; allowed: {allowed}")


@dataclass
class _Grids:
    """Scales and zero points (groups, outputs), and the group of every column in solving order, int64 (columns,).

    size: columns per group. dynamic: a group is fitted when the solver reaches it, on the weights as they are then.
    """

    bits: int
    sym: bool
    size: int
    dynamic: bool
    group: Tensor
    scale: Tensor
    zero: Tensor
    fit: Callable[[Tensor], tuple[Tensor, Tensor]]  # weights (columns, outputs) -> scale, zero point (outputs,)

    def set(self, group: int, weights: Tensor) -> None:
        self.scale[group], self.zero[group] = self.fit(weights)


def _grids(original: Tensor, order: Tensor, compression: Solver, model: torch.dtype) -> _Grids | None:
    """original: (columns, outputs) in the model's order."""
    bits: int | None = getattr(compression, "bits", None)
    if bits is None:
        return None
    columns, rows = original.shape
    size = compression.group_size or columns
    static = compression.static_groups or size == columns
    group = (order if static else torch.arange(columns, device=order.device)) // size
    scale, zero = (original.new_ones(columns // size, rows) for _ in range(2))
    fitted = partial(fit, bits=bits, sym=compression.sym, mse=compression.scale == "mse", model=model)
    grids = _Grids(bits, compression.sym, size, not static, group, scale, zero, fitted)
    if static:
        for g in range(columns // size):
            grids.set(g, original[g * size : (g + 1) * size])
    return grids


@dataclass(frozen=True)
class _Pruning:
    """What is pruned: `drop` (columns, outputs) bool in solving order, chosen block by block; a share, or n of m."""

    drop: Tensor
    sparsity: float | None
    n_of_m: tuple[int, int] | None

    def open_block(self, start: int, work: Tensor, diagonal: Tensor) -> None:
        """Unstructured: the block's weights with the least w^2 / U_jj^2 (SparseGPT, section 3.3).

        The counts of the blocks add up to round(sparsity * weights) exactly.
        """
        if self.sparsity is None:
            return
        score = (work / diagonal[:, None]).square_().flatten()
        before = start * work.shape[1]
        count = round(self.sparsity * (before + work.numel())) - round(self.sparsity * before)
        self.drop[start : start + len(work)].view(-1)[_least(score, count)] = True


def _least(score: Tensor, count: int) -> Tensor:
    """The indices of the `count` least of (n,)."""
    if score.device.type == "cpu" and count:  # several times as fast as torch's own
        return torch.from_numpy(np.argpartition(score.numpy(), count - 1)[:count])
    return torch.topk(score, count, largest=False, sorted=False).indices


def _n_of_m(compression: Solver) -> tuple[int, int] | None:
    return compression.n_of_m if isinstance(compression, SparseGPT) and compression.pattern is not None else None


def _block(compression: Solver, columns: int) -> int:
    """block_size, raised to whole groups and patterns: a grid is fitted on columns that are up to date."""
    group = compression.group_size if getattr(compression, "bits", None) else None
    unit = math.lcm(group or 1, (_n_of_m(compression) or (0, 1))[1])
    return min(math.ceil(compression.block_size / unit) * unit, columns)


def solve(weight: Tensor, inverse: Inverse, compression: Solver) -> tuple[Tensor, Layer]:
    """Compresses one weight (outputs, inputs); returns it in its own dtype and device, and its compressed form.

    Computed in the dtype of `inverse`. Raises ValueError where group size or pattern does not fit the shape,
    or a weight is not finite.
    """
    check_shape(weight.shape[1], compression)
    if not all_finite(weight.detach()):
        raise ValueError("the weight holds numbers that are not finite")
    # Columns as contiguous rows: every step of the loop works on one of them.
    original = weight.detach().to(inverse.upper.dtype).T.contiguous()
    original[inverse.dead] = 0
    work = original.index_select(0, inverse.order)
    grids = _grids(original, inverse.order, compression, weight.dtype)
    pruning = None
    if isinstance(compression, SparseGPT):
        pruning = _Pruning(torch.zeros_like(work, dtype=torch.bool), compression.sparsity, _n_of_m(compression))
    errors = torch.empty_like(work)
    block = _block(compression, len(work))
    for start in range(0, len(work), block):
        stop = min(start + block, len(work))
        _settle(work, inverse.upper, errors, start, stop, grids, pruning)
        if stop < len(work):
            work[stop:].addmm_(inverse.upper[start:stop, stop:].T, errors[start:stop], alpha=-1)
    if grids and compression.refit:
        grids.scale = refit(work, errors, inverse.root, inverse.damped, grids.group, grids.scale, weight.dtype)
    return _finish(work, weight, inverse, grids, pruning)


def _settle(
    work: Tensor, upper: Tensor, errors: Tensor, start: int, stop: int, grids: _Grids | None, pruning: _Pruning | None
) -> None:
    """Settles columns start .. stop of work in place and writes their errors e_j, both (columns, outputs)."""
    diagonal = upper.diagonal()
    n_of_m = pruning.n_of_m if pruning else None
    size, m = grids.size if grids and grids.dynamic else 0, n_of_m[1] if n_of_m else 1
    if pruning:
        pruning.open_block(start, work[start:stop], diagonal[start:stop])
    for a, b in _pieces(start, stop, size, m):
        if grids and grids.dynamic and a % grids.size == 0:
            grids.set(a // grids.size, work[a : a + grids.size])
        if pruning and n_of_m and size % m and a % m == 0:
            choose(work[a : a + m], diagonal[a : a + m], n_of_m, pruning.drop[a : a + m])
        block = Block(work[a:b], upper[a:b, a:b], errors[a:b])
        if grids:
            block.group, block.scale, block.zero = grids.group[a:b], grids.scale, grids.zero
            block.top = 2**grids.bits - 1
        if pruning:
            block.drop, block.n_of_m = pruning.drop[a:b], None if size % m else n_of_m
        settle(block)
        if b < stop:
            work[b:stop].addmm_(upper[a:b, b:stop].T, errors[a:b], alpha=-1)


def _pieces(start: int, stop: int, size: int, m: int) -> Iterator[tuple[int, int]]:
    """What is settled at once: no more than MAX_COLUMNS, whole patterns, and no column of a group yet to be fitted.

    size: of groups that are fitted when they are reached, 0 without. Where patterns cross groups, both are cut.
    """
    step = m * max(1, MAX_COLUMNS // m)
    cuts = {stop, *range(start, stop, size or stop - start)}
    for a in sorted(cuts - {stop}):
        cuts.update(range(a, min(a + (size or stop - start), stop), step))
    if size % m:
        cuts.update(range(start, stop, m))
    yield from pairwise(sorted(cuts))


def _finish(
    work: Tensor, weight: Tensor, inverse: Inverse, grids: _Grids | None, pruning: _Pruning | None
) -> tuple[Tensor, Layer]:
    """Back to the model's order of inputs, and into the compressed form."""
    back = torch.argsort(inverse.order)
    work.add_(0)  # -0 becomes 0, the only zero that codes and masks give back
    final = work.index_select(0, back).T.contiguous().to(weight.dtype)
    mask = None if pruning is None else ~pruning.drop.index_select(0, back).T.contiguous()
    if grids is None:
        assert mask is not None
        return final, Layer((len(final), len(work)), mask=mask, values=final[mask])
    group = grids.group
    codes = work.div_(grids.scale.index_select(0, group)).round_().add_(grids.zero.index_select(0, group))
    codes = codes.to(torch.uint8).index_select(0, back).T.contiguous()
    if mask is not None:
        codes.masked_fill_(~mask, 0)
    g_idx = group[back].to(torch.int32)
    regular = torch.equal(g_idx, torch.arange(len(g_idx), dtype=torch.int32, device=g_idx.device) // grids.size)
    layer = Layer(
        (len(final), len(work)),
        bits=grids.bits,
        codes=codes,
        scale=grids.scale.T.to(torch.float16).contiguous(),
        zero=None if grids.sym else grids.zero.T.to(torch.uint8).contiguous(),
        g_idx=None if regular else g_idx,
        mask=mask,
    )
    return final, layer


def settle(block: Block) -> None:
    """Settle a block of at most MAX_COLUMNS columns by the fastest code for its device and dtype."""
    _pick(block.work.device.type, block.work.dtype)(block)


@lru_cache
def _pick(device: str, dtype: torch.dtype) -> Callable[[Block], None]:
    with suppress(ImportError):  # no numba or triton for this platform
        if device == "cpu" and dtype in (torch.float32, torch.float64):
            from ctp.compression.settle_cpu import settle_cpu

            return settle_cpu
        if device == "cuda" and dtype == torch.float32 and triton.works():
            from ctp.compression.settle_cuda import settle_cuda

            return settle_cuda
    return settle_loop
