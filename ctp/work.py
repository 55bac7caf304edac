"""execute(cell, store, runtime): give the cell's method what it needs, publish what it makes."""

import platform
import subprocess
import time
from collections.abc import Callable
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ctp.job import CompressJob, LearnJob, evaluating
from ctp.machine import process_peak
from ctp.spec import Cell, Compress, Evaluate, Learn, Runtime
from ctp.store import Store

Report = Callable[[dict[str, Any]], None]
LIBRARIES = ("torch", "transformers", "accelerate", "ray", "mlflow", "peft", "safetensors")


def execute(cell: Cell, store: Store, runtime: Runtime, report: Report) -> None:
    """Do one cell, unless it is done; its inputs must be. Progress goes to `report` as flat dicts of numbers."""
    if store.has(cell):
        return
    device = pick_device(runtime)
    about = surroundings()  # before the work: what could fail here must not cost its result
    torch.manual_seed(0)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    begun = time.monotonic()
    with store.publish(cell) as draft:
        base: dict[str, Any] = {"store": store, "runtime": runtime, "device": device, "report": report}
        base |= {"folder": draft.path, "record": draft.record}
        if isinstance(cell, Compress):
            metrics = cell.compression.compress(CompressJob(**base, cell=cell))
        elif isinstance(cell, Learn):
            metrics = cell.recovery.recover(LearnJob(**base, cell=cell))
        elif isinstance(cell, Evaluate):
            with evaluating(cell, **base) as job:
                metrics = cell.measure.measure(job)
            job.write_json("result.json", metrics)
        else:
            raise TypeError(f"nothing here does a {type(cell).__name__}")
        draft.record["metrics"] = metrics
        peak = torch.cuda.max_memory_allocated() if device == "cuda" else process_peak()
        draft.record |= {"seconds": time.monotonic() - begun, "device": device, "peak_memory_bytes": peak}
        draft.record |= {"created": time.time(), **about}


# -------------------------------------------------------------------- surroundings


def pick_device(runtime: Runtime) -> str:
    """ "cuda" or "cpu"; "auto" takes the GPU where this process has one."""
    if runtime.device != "auto":
        return runtime.device
    return "cuda" if torch.cuda.is_available() else "cpu"


@lru_cache
def surroundings() -> dict[str, Any]:
    """What a manifest says of the code and machine that made it."""
    return {
        "git_commit": _git_commit(),
        "versions": {name: _version(name) for name in ("ctp", *LIBRARIES)},
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
    }


def _git_commit() -> str | None:
    """The commit of the checkout that ctp runs from; None where it is installed, or there is no git."""
    root = Path(__file__).parent.parent
    if not (root / ".git").exists():
        return None
    try:
        asked = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return asked.stdout.strip() or None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
