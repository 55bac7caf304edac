"""What a timing depends on besides the model: the processor, its threads, the GPUs and their driver."""

import os
import platform
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")


def machine() -> dict[str, Any]:
    """A record of this machine and process, as JSON values; None for what the system does not tell. Sizes in bytes.

    cpus: logical processors, cpus_allowed: those that this process may use, threads: those that torch computes with.
    load: runnable processes, the mean of the minute before (others' work makes timings longer).
    """
    return {
        "system": platform.platform(),
        "cpu": _cpu_model(),
        "cpus": os.cpu_count(),
        "cpus_allowed": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "threads": torch.get_num_threads(),
        "ram_bytes": _ram(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "gpus": [_gpu(i) for i in range(torch.cuda.device_count())],
        "gpu_driver": _driver() if torch.cuda.is_available() else None,
    }


def _cpu_model() -> str | None:
    """The name in /proc/cpuinfo, where there is one, else what Python's `platform` says."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or None


def process_peak() -> int:
    """Peak resident bytes of this process since it began."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024  # macOS counts in bytes, Linux in KiB


def _ram() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _gpu(index: int) -> dict[str, Any]:
    known = torch.cuda.get_device_properties(index)
    capability = f"{known.major}.{known.minor}"
    return {"name": known.name, "memory_bytes": known.total_memory, "compute_capability": capability}


def _driver() -> str | None:
    """The version of NVIDIA's driver."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    asked = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    return asked.stdout.split("\n")[0].strip() or None if asked.returncode == 0 else None


def keep_heap() -> None:
    """Have this process keep the memory of freed activations, and not ask the system for it anew, page by page.

    glibc learns that from a large block that is freed; from 2^25 bytes on it learns nothing. Elsewhere nothing happens.
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
