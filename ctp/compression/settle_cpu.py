"""The kernel for CPUs, compiled by numba once per machine and kept in its cache.

Outputs do not depend on one another: each thread takes a range of them, tile by tile, so that a tile's columns stay in
the first-level cache. The number of threads does not change a bit of the result. Threads are torch's count, not
numba's: its own pool would wait beside torch's.
"""

from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numba import njit

from ctp.compression.settle import Block
from ctp.machine.threads import thread_pool

TILE = 64  # outputs at a time: 128 columns of them are 32 KiB of float32


@njit(nogil=True, cache=True, error_model="numpy")
def _settle(
    work: Any, upper: Any, errors: Any, group: Any, scale: Any, zero: Any, top: Any, drop: Any, n: int, m: int,
    first: int, last: int,
) -> None:  # fmt: skip
    """Outputs first .. last. Without grids scale is empty, without pruning drop is, without a pattern m is 0."""
    columns = work.shape[0]
    quantizes, prunes = scale.shape[0] > 0, drop.shape[0] > 0
    for begin in range(first, last, TILE):
        end = min(begin + TILE, last)
        for j in range(columns):
            if m > 0 and j % m == 0:
                for t in range(begin, end):
                    for r in range(j, j + m):
                        mine, rank = (work[r, t] / upper[r, r]) ** 2, 0
                        for k in range(j, j + m):
                            other = (work[k, t] / upper[k, k]) ** 2
                            rank += other < mine or (other == mine and k < r)
                        drop[r, t] = rank < n
            w, error = work[j, begin:end], errors[j, begin:end]
            if quantizes:
                s, z = scale[group[j], begin:end], zero[group[j], begin:end]
                for t in range(end - begin):
                    error[t] = min(max(np.rint(w[t] / s[t]), -z[t]), top - z[t]) * s[t]
            else:
                for t in range(end - begin):
                    error[t] = w[t]
            if prunes:
                gone = drop[j, begin:end]
                for t in range(end - begin):
                    error[t] = 0 if gone[t] else error[t]
            divisor = upper[j, j]
            for t in range(end - begin):
                q = error[t]
                error[t] = (w[t] - q) / divisor
                w[t] = q
            for k in range(j + 1, columns):
                u, later = upper[j, k], work[k, begin:end]
                for t in range(end - begin):
                    later[t] -= u * error[t]


def settle_cpu(block: Block) -> None:
    """Settle a block on the CPU, on as many threads as torch uses."""
    work = block.work.numpy()
    none = work[:0]
    arguments: tuple[Any, ...] = (
        work,
        np.ascontiguousarray(block.upper.numpy()),  # small, and one layout for the compiler
        block.errors.numpy(),
        np.zeros(0, dtype=np.int64) if block.group is None else block.group.numpy(),
        none if block.scale is None else block.scale.numpy(),
        none if block.zero is None else block.zero.numpy(),
        work.dtype.type(block.top),
        np.zeros((0, 0), dtype=np.bool_) if block.drop is None else block.drop.numpy(),
        *(block.n_of_m or (0, 0)),
    )
    tiles = -(-work.shape[1] // TILE)
    threads = min(torch.get_num_threads(), tiles)
    bounds = [min(work.shape[1], TILE * (tiles * i // threads)) for i in range(threads)] + [work.shape[1]]
    parts = list(pairwise(bounds))
    rest = [thread_pool(threads).submit(_settle, *arguments, *part) for part in parts[1:]]
    _settle(*arguments, *parts[0])
    for done in rest:
        done.result()
