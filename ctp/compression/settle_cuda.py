"""The kernel for GPUs, in triton: one launch settles a block of columns.

A program holds all columns of BLOCK_OUTPUTS outputs in registers and goes through them one after the other; the row of
column j is taken out of the tile, and its error spread over the rows below, by masked sums.
"""

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from ctp.compression.settle import Block

BLOCK_OUTPUTS = 32


@triton.jit
def _clamp(x, low, high):  # type: ignore[no-untyped-def]
    """NaN stays NaN: the hardware's own minimum and maximum would make a valid code of it."""
    above = tl.maximum(x, low, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(above, high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _settle(  # type: ignore[no-untyped-def]
    work, upper, errors, group, scale, zero, drop, top, columns, outputs,
    N: tl.constexpr, M: tl.constexpr, QUANTIZES: tl.constexpr, PRUNES: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.arange(0, ROWS)
    at = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    inside = at < outputs
    place = row.to(tl.int64)[:, None] * outputs + at[None, :]
    there = (row < columns)[:, None] & inside[None, :]
    tile = tl.load(work + place, mask=there, other=0.0)
    wrong = tl.zeros_like(tile)
    if PRUNES:
        gone = tl.load(drop + place, mask=there, other=0).to(tl.int32)
    if M > 0:
        diagonal = tl.load(upper + row * (columns + 1), mask=row < columns, other=1.0)
    for j in range(columns):
        if M > 0:  # noqa: SIM102 (known when triton compiles, the other is not)
            if j % M == 0:
                score = tl.div_rn(tile, tl.zeros_like(tile) + diagonal[:, None])
                score = score * score
                rank = tl.zeros_like(gone)
                for k in range(j, j + M):
                    other = tl.sum(tl.where((row == k)[:, None], score, 0.0), axis=0)[None, :]
                    rank += ((other < score) | ((other == score) & (row > k)[:, None])).to(tl.int32)
                mine = ((row >= j) & (row < j + M))[:, None]
                gone = tl.where(mine, (rank < N).to(tl.int32), gone)
        here = (row == j)[:, None]
        w = tl.sum(tl.where(here, tile, 0.0), axis=0)
        q = w
        if QUANTIZES:
            g = tl.load(group + j) * outputs
            s = tl.load(scale + g + at, mask=inside, other=1.0)
            z = tl.load(zero + g + at, mask=inside, other=0.0)
            x = tl.div_rn(w, s)
            # To the nearest, ties to even, as torch rounds: below 2^22 this addition leaves no digits behind the point.
            x = _clamp(x, -z - 1.0, top - z + 1.0)
            x = (x + 12582912.0) - 12582912.0
            q = _clamp(x, -z, top - z) * s
        if PRUNES:
            q = tl.where(tl.sum(tl.where(here, gone, 0), axis=0) > 0, 0.0, q)
        error = tl.div_rn(w - q, tl.zeros_like(w) + tl.load(upper + j * (columns + 1)))
        u = tl.load(upper + j * columns + row, mask=(row > j) & (row < columns), other=0.0)
        tile = tl.where(here, q[None, :], tile - u[:, None] * error[None, :])
        wrong = tl.where(here, error[None, :], wrong)
    tl.store(work + place, tile, mask=there)
    tl.store(errors + place, wrong, mask=there)
    if M > 0:
        tl.store(drop + place, gone.to(tl.int8), mask=there)


def settle_cuda(block: Block) -> None:
    """Settle a block of float32 on a GPU (or in triton's interpreter, TRITON_INTERPRET=1, on a CPU)."""
    columns, outputs = block.work.shape
    n, m = block.n_of_m or (0, 0)

    def or_work(tensor: Tensor | None) -> Tensor:
        return block.work if tensor is None else tensor

    # Triton launches on the current GPU, which need not be the tensors'.
    with torch.cuda.device(block.work.device) if block.work.is_cuda else nullcontext():
        _settle[(triton.cdiv(outputs, BLOCK_OUTPUTS),)](
            block.work, block.upper.contiguous(), block.errors, or_work(block.group), or_work(block.scale),
            or_work(block.zero), or_work(None if block.drop is None else block.drop.view(torch.int8)),
            float(block.top), columns, outputs, N=n, M=m,
            QUANTIZES=block.scale is not None, PRUNES=block.drop is not None,
            ROWS=max(16, triton.next_power_of_2(columns)), WIDTH=BLOCK_OUTPUTS,
        )  # fmt: skip
