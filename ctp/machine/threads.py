"""Threads and heap of a process that computes."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import TypeVar

import torch

Result = TypeVar("Result")


def keep_heap() -> None:
    """Make this process keep the memory of freed activations, instead of requesting it again page by page.

    glibc adapts to a large block that is freed, if it has less than 2^25 bytes. Elsewhere nothing happens.
    """
    torch.empty(2**25 - 2**16, dtype=torch.uint8)


@lru_cache
def thread_pool(threads: int) -> ThreadPoolExecutor:
    """Threads for compiled code that torch does not run; the same ones every time."""
    return ThreadPoolExecutor(threads, thread_name_prefix="compiled")


def side_by_side(jobs: Iterable[Callable[[], Result]], device: torch.device) -> list[Result]:
    """What the jobs return, in their order; each runs torch on `device`.

    On a CPU several run at once, each with its share of torch's threads: steps too short to be worth all threads are
    worth one. The last one begins first: of a block's linears it is the largest. Elsewhere they are drawn and run one
    by one. Raises what the first of the jobs to fail raised.
    """
    if device.type != "cpu":
        return [job() for job in jobs]
    jobs, threads = list(jobs), torch.get_num_threads()
    workers = min(len(jobs), threads)
    if workers < 2:
        return [job() for job in jobs]
    try:
        with ThreadPoolExecutor(workers, "job", torch.set_num_threads, (threads // workers,)) as pool:
            return [done.result() for done in [pool.submit(job) for job in reversed(jobs)][::-1]]
    finally:
        torch.set_num_threads(threads)  # what threads to come begin with
