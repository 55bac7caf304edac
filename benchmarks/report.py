"""What the benchmarks share: timing, Markdown rows, and the line that names the machine and the versions."""

import os
import platform
import time
from collections.abc import Callable, Iterable
from importlib.metadata import version


def timed(work: Callable[[], object], repeats: int = 1, device: str = "cpu") -> list[float]:
    """Seconds of each repeat of `work`; on a GPU until its kernels have ended."""
    seconds = []
    for _ in range(repeats):
        begun = time.perf_counter()
        work()
        if device == "cuda":
            import torch

            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begun)
    return seconds


def row(cells: Iterable[object]) -> str:
    """A row of a Markdown table."""
    return f"| {' | '.join(map(str, cells))} |"


def head(names: Iterable[str]) -> str:
    """The first two lines of a Markdown table."""
    names = list(names)
    return f"{row(names)}\n|{'---|' * len(names)}"


def environment(*packages: str) -> str:
    """The CPU's architecture, the number of cores, Python's version and those of the packages."""
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    return f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}; {versions}"
