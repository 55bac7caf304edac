"""The kernel for GPUs, in Triton: what `settle_loop` does to a block of columns, in one launch.

The weights are stored as (columns, outputs). Outputs do not depend on one another, so each program owns OUTPUTS
neighbouring outputs and never talks to another program. It keeps all columns of its outputs in registers, in tiles of
shape (COLUMNS, OUTPUTS), loads them once, settles one column (a row of the tile) after the other, and stores them once.

A tile in registers cannot be indexed by a number that is known only at run time. Row j is therefore read as the sum of
the tile with all other rows replaced by 0, and written by choosing between the old and the new value everywhere.
"""

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from ctp.compression.settle import Block

OUTPUTS_PER_PROGRAM = 32


@triton.jit
def _clamp(x, low, high):  # type: ignore[no-untyped-def]
    """NaN stays NaN: the hardware's own minimum and maximum would make a valid code of it."""
    above = tl.maximum(x, low, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(above, high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _row(tile, is_row):  # type: ignore[no-untyped-def]
    """One row (OUTPUTS,) of a tile (COLUMNS, OUTPUTS). is_row: (COLUMNS, 1), True at that row only."""
    return tl.sum(tl.where(is_row, tile, 0.0), axis=0)


@triton.jit
def _on_grid(w, scale, zero, top):  # type: ignore[no-untyped-def]
    """The point of the grid nearest to w; all (OUTPUTS,).

    Rounds to the nearest whole number, ties to even, as torch does: float32 numbers from 2^23 to 2^24 are whole, so
    adding 1.5 * 2^23 rounds x if |x| is below 2^22, and taking it off again leaves the rounded x.
    """
    x = _clamp(tl.div_rn(w, scale), -zero - 1.0, top - zero + 1.0)
    steps = (x + 12582912.0) - 12582912.0
    return _clamp(steps, -zero, top - zero) * scale


@triton.jit
def _choose(weights, pruned, diagonal, column, j, N: tl.constexpr, M: tl.constexpr):  # type: ignore[no-untyped-def]
    """The tile `pruned` with columns j .. j + M - 1 decided: of each output's M weights, the N with the least score.

    The score is (w / U_jj)^2; a weight's rank counts lower scores, and equal ones before it.
    """
    score = tl.div_rn(weights, tl.zeros_like(weights) + diagonal[:, None])
    score = score * score
    rank = tl.zeros_like(pruned)
    for k in range(j, j + M):
        other = _row(score, (column == k)[:, None])[None, :]
        rank += ((other < score) | ((other == score) & (column > k)[:, None])).to(tl.int32)
    in_pattern = ((column >= j) & (column < j + M))[:, None]
    return tl.where(in_pattern, (rank < N).to(tl.int32), pruned)


@triton.jit
def _settle(  # type: ignore[no-untyped-def]
    work_ptr, upper_ptr, errors_ptr, group_ptr, scale_ptr, zero_ptr, drop_ptr, top, n_columns, n_outputs,
    N: tl.constexpr, M: tl.constexpr, QUANTIZES: tl.constexpr, PRUNES: tl.constexpr,
    COLUMNS: tl.constexpr, OUTPUTS: tl.constexpr,
):  # fmt: skip
    """The arrays are those of `Block`. N, M: 0 without a pattern. COLUMNS: n_columns, rounded up to a power of two."""
    column = tl.arange(0, COLUMNS)  # the rows of a tile
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)  # the columns of a tile
    valid_output = output < n_outputs
    offsets = column.to(tl.int64)[:, None] * n_outputs + output[None, :]
    valid = (column < n_columns)[:, None] & valid_output[None, :]

    # Tiles (COLUMNS, OUTPUTS) that stay in registers: the weights, what pruning removes (1 or 0), the errors e_j.
    weights = tl.load(work_ptr + offsets, mask=valid, other=0.0)
    errors = tl.zeros_like(weights)
    if PRUNES:
        pruned = tl.load(drop_ptr + offsets, mask=valid, other=0).to(tl.int32)
    if M > 0:
        diagonal = tl.load(upper_ptr + column * (n_columns + 1), mask=column < n_columns, other=1.0)

    for j in range(n_columns):
        if M > 0:  # noqa: SIM102 (known when triton compiles, the other is not)
            if j % M == 0:
                pruned = _choose(weights, pruned, diagonal, column, j, N, M)
        is_row_j = (column == j)[:, None]
        w = _row(weights, is_row_j)  # this, and what follows of one column: (OUTPUTS,)

        # q: the weight's final value.
        q = w
        if QUANTIZES:
            grid_row = tl.load(group_ptr + j) * n_outputs
            scale = tl.load(scale_ptr + grid_row + output, mask=valid_output, other=1.0)
            zero = tl.load(zero_ptr + grid_row + output, mask=valid_output, other=0.0)
            q = _on_grid(w, scale, zero, top)
        if PRUNES:
            q = tl.where(tl.sum(tl.where(is_row_j, pruned, 0), axis=0) > 0, 0.0, q)

        # Its error is spread over the columns below: W_k -= U_jk e_j. The load gives U_jk = 0 for all k <= j.
        error = tl.div_rn(w - q, tl.zeros_like(w) + tl.load(upper_ptr + j * (n_columns + 1)))
        u = tl.load(upper_ptr + j * n_columns + column, mask=(column > j) & (column < n_columns), other=0.0)
        weights = tl.where(is_row_j, q[None, :], weights - u[:, None] * error[None, :])
        errors = tl.where(is_row_j, error[None, :], errors)

    tl.store(work_ptr + offsets, weights, mask=valid)
    tl.store(errors_ptr + offsets, errors, mask=valid)
    if M > 0:
        tl.store(drop_ptr + offsets, pruned.to(tl.int8), mask=valid)


def settle_cuda(block: Block) -> None:
    """Settle a block of float32 on a GPU (or in triton's interpreter, TRITON_INTERPRET=1, on a CPU)."""
    columns, outputs = block.work.shape
    n, m = block.n_of_m or (0, 0)

    def or_work(tensor: Tensor | None) -> Tensor:
        """The kernel does not read an array that is None, but some tensor must stand in its place."""
        return block.work if tensor is None else tensor

    # Triton launches on the current GPU, which need not be the tensors'.
    with torch.cuda.device(block.work.device) if block.work.is_cuda else nullcontext():
        _settle[(triton.cdiv(outputs, OUTPUTS_PER_PROGRAM),)](
            block.work, block.upper.contiguous(), block.errors, or_work(block.group), or_work(block.scale),
            or_work(block.zero), or_work(None if block.drop is None else block.drop.view(torch.int8)),
            float(block.top), columns, outputs, N=n, M=m,
            QUANTIZES=block.scale is not None, PRUNES=block.drop is not None,
            COLUMNS=max(16, triton.next_power_of_2(columns)), OUTPUTS=OUTPUTS_PER_PROGRAM,
        )  # fmt: skip
