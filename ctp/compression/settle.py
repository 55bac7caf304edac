"""Settling the columns of one block: the innermost loop of the solver, by the fastest code that a device has.

A CPU has a compiled kernel (numba), a GPU a fused one where triton is there, every device a plain loop in torch, which
says what the others must do.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

MAX_COLUMNS = 128  # that a kernel settles at once: what comes behind them is a matrix product


@dataclass(eq=False)
class Block:
    """Columns that are settled one after the other, all outputs at once; everything is on one device.

    work: (columns, outputs), contiguous, their weights with the errors of all columns before them taken in; settled in
    place. upper: the part of U that belongs to them, (columns, columns), of any strides. errors: (columns, outputs),
    written: e_j = (w_j - q_j) / U_jj. group: int64 (columns,), the row of scale and zero that holds a column's grid of
    codes 0 .. top; scale, zero: (groups, outputs); all None where nothing is quantized. drop: bool (columns, outputs),
    True where a weight becomes 0; None where nothing is pruned. n_of_m: "n:m", chosen here and written into drop.
    """

    work: Tensor
    upper: Tensor
    errors: Tensor
    group: Tensor | None = None
    scale: Tensor | None = None
    zero: Tensor | None = None
    top: int = 0
    drop: Tensor | None = None
    n_of_m: tuple[int, int] | None = None


def settle_loop(block: Block) -> None:
    """Column by column in torch, on any device and in any floating dtype."""
    work, upper, errors = block.work, block.upper, block.errors
    diagonal = upper.diagonal()
    groups = None if block.group is None else block.group.tolist()
    for j in range(len(work)):
        w = work[j]
        if block.n_of_m and j % block.n_of_m[1] == 0:
            assert block.drop is not None
            rows = slice(j, j + block.n_of_m[1])
            choose(work[rows], diagonal[rows], block.n_of_m, block.drop[rows])
        q = w.clone()
        if groups is not None:
            assert block.scale is not None
            assert block.zero is not None
            scale, zero = block.scale[groups[j]], block.zero[groups[j]]
            q = torch.clamp(torch.round(w / scale), -zero, block.top - zero).mul_(scale)
        if block.drop is not None:
            q.masked_fill_(block.drop[j], 0)
        error = torch.sub(w, q, out=errors[j]).div_(diagonal[j])
        if j + 1 < len(work):
            work[j + 1 :].addr_(upper[j, j + 1 :], error, alpha=-1)
        w.copy_(q)


def choose(work: Tensor, diagonal: Tensor, n_of_m: tuple[int, int], drop: Tensor) -> None:
    """n:m: of m columns (m, outputs) the n with the least w^2 / U_jj^2 fall (SparseGPT, section 3.3), into drop."""
    score = (work / diagonal[:, None]).square_()
    drop.scatter_(0, torch.argsort(score, dim=0, stable=True)[: n_of_m[0]], True)
