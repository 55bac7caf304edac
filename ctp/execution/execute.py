"""execute(cell, store, runtime): give the cell's method what it needs, publish what it makes."""

import math
import platform
import time
import traceback
from functools import lru_cache
from typing import Any

import torch

from ctp.cells import Dense, Learned
from ctp.cells.cell import Cell, Compress, Evaluate, Learn
from ctp.cells.events import Report
from ctp.cells.runtime import Runtime
from ctp.common.files import Changed
from ctp.common.messages import shown
from ctp.execution import payload
from ctp.execution.compress import compress
from ctp.execution.jobs import CompressJob, LearnJob, evaluating
from ctp.execution.learn import recover
from ctp.execution.loading import forget
from ctp.execution.measure import measure
from ctp.execution.unchanged import reading
from ctp.machine.arithmetic import computed_in
from ctp.machine.device import pick
from ctp.machine.memory import explained, free, ran_out
from ctp.machine.record import process_peak
from ctp.machine.versions import git_commit, versions
from ctp.storage.ref import identity, ref
from ctp.storage.store import Store
from ctp.tracking.entries import OWN, name_problem


def execute(cell: Cell, store: Store, runtime: Runtime, report: Report) -> None:
    """Do one cell, unless it is done; its inputs must be. `report` gets its progress and notices.

    Raises what the cell's method raises; OutOfMemory, which says what was tried and what could help, where memory ran
    out; FloatingPointError where a metric is no finite number; Changed where a model, text, adapter or task outside the
    store is not what was pinned, or does not stay it. Nothing is published then.
    """
    if store.has(ref(cell)):
        return
    device = pick(runtime.device)
    try:
        _publish(cell, store, runtime, device, report)
    except Changed:
        forget(texts=True)  # whatever was read of it
        raise
    except Exception as e:
        if not ran_out(e):
            raise
        failure = explained(e, traceback.format_exc(), _advice(cell, runtime, device))
    else:
        return
    free()  # the next cell of this process finds room: no frame of the failed one is held any more
    raise failure


def _publish(cell: Cell, store: Store, runtime: Runtime, device: str, report: Report) -> None:
    about = surroundings()  # before the work: what could fail here must not cost its result
    torch.manual_seed(0)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    begun = time.monotonic()
    with store.publish(ref(cell), identity(cell)) as draft, reading(cell, runtime.locations) as reads:
        base: dict[str, Any] = {"store": store, "runtime": runtime, "device": device, "report": report}
        base["reads"] = reads
        base |= {"folder": draft.path, "record": draft.record}
        width = 0
        if isinstance(cell, Compress):
            metrics = compress(CompressJob(**base, cell=cell))
        elif isinstance(cell, Learn):
            learning = LearnJob(**base, cell=cell)
            metrics, width = recover(learning), learning.width
        elif isinstance(cell, Evaluate):
            with evaluating(cell, **base) as job:
                metrics = measure(job)
            check_finite(metrics, least=1)
            job.write_json("result.json", metrics)
        else:
            raise TypeError(f"nothing here does a {type(cell).__name__}")
        check_finite(metrics)
        payload.check(cell, draft.path, width)
        draft.record["metrics"] = metrics
        peak = torch.cuda.max_memory_allocated() if device == "cuda" else process_peak()
        draft.record |= {"seconds": time.monotonic() - begun, "device": device, "peak_memory_bytes": peak}
        draft.record["computed_in"] = computed_in(cell.dtype, device)
        draft.record |= {"created": time.time(), **about}


def check_finite(metrics: Any, least: int = 0) -> None:
    """A missing number is an error. Raises FloatingPointError naming the metric that is NaN or infinite, TypeError
    where one is no number, ValueError where there are fewer than `least`, or MLflow does not take a name."""
    if not isinstance(metrics, dict) or len(metrics) < least:
        raise ValueError(f"metrics = {metrics!r}: numbers by name are needed" + ", at least one" * (least > 0))
    for name, value in metrics.items():
        if why := name_problem(name):
            raise ValueError(f"the metric {shown(name)} has a name that MLflow does not take; {why}")
        if name in OWN:
            raise ValueError(f"the metric {name!r} has the name of a number that ctp itself keeps of every cell")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"the metric {name!r} is {value!r}, a {type(value).__name__}, not an int or a float")
        if not _finite(value):
            raise FloatingPointError(f"the metric {name!r} is {shown(value)}")


def _finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an int that no float can hold
        return False


def _advice(cell: Cell, runtime: Runtime, device: str) -> str:
    """What a person can do where memory is short for a cell: what is still left to try, and what always helps."""
    left = []
    if isinstance(cell, Learn) and isinstance(cell.recovery, Learned):
        if not runtime.recompute:
            left.append("--recompute")
        if not runtime.packed and cell.recovery.in_front and not isinstance(cell.source.compression, Dense):
            left.append("--packed")
        left.append(f"windows shorter than text.seq_len = {cell.recovery.text.seq_len}")
    elif isinstance(cell, Compress) and cell.calibration is not None:
        left.append(f"fewer windows than calibration.count = {cell.calibration.count}")
    share = "a smaller --gpu-memory (more of a GPU for each cell)" if device == "cuda" else "more --cpus a cell"
    return f"could help: {', '.join([*left, share, 'a larger machine'])}"


@lru_cache
def surroundings() -> dict[str, Any]:
    """What a manifest says of the code and machine that made it."""
    return {
        "git_commit": git_commit(),
        "versions": versions(),
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
    }
