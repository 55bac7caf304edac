"""execute(cell, store, runtime): give the cell's method what it needs, publish what it makes."""

import math
import platform
import time
import traceback
from functools import lru_cache

import torch

from ctp.cells import Dense, Learned
from ctp.cells.cell import Cell, Compress, Evaluate, Learn
from ctp.cells.events import Report
from ctp.cells.runtime import Runtime
from ctp.common.files import Changed
from ctp.common.messages import shown
from ctp.execution import payload
from ctp.execution.compress import compress
from ctp.execution.jobs import CompressJob, LearnJob, Place, evaluating
from ctp.execution.learn import recover
from ctp.execution.loading import forget
from ctp.execution.measure import measure
from ctp.execution.unchanged import reading
from ctp.machine.arithmetic import computed_in
from ctp.machine.device import pick
from ctp.machine.memory import explained, free, ran_out
from ctp.machine.record import process_peak
from ctp.machine.versions import git_commit, versions
from ctp.storage.manifest import Record
from ctp.storage.ref import identity, ref
from ctp.storage.store import Store
from ctp.tracking.entries import OWN, name_problem


def execute(cell: Cell, store: Store, runtime: Runtime, report: Report) -> None:
    """Do one cell, unless it is done; its inputs must be. `report` gets its progress and notices.

    Raises what the cell's method raises; OutOfMemory with what was tried and what could help; FloatingPointError if a
    metric is not finite; Changed if a model, text, adapter or task outside the store is not what was pinned. Nothing is
    published then.
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
    free()  # room for the next cell of this process: no frame of the failed one is held any more
    raise failure


def _publish(cell: Cell, store: Store, runtime: Runtime, device: str, report: Report) -> None:
    about = surroundings()  # before the work: what could fail here must not cost its result
    torch.manual_seed(0)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    begun = time.monotonic()
    with store.publish(ref(cell), identity(cell)) as draft, reading(cell, runtime.locations) as reads:
        metrics = _work(cell, (store, runtime, device, draft.path, draft.record, report, reads))
        peak = torch.cuda.max_memory_allocated() if device == "cuda" else process_peak()
        draft.record |= {
            "metrics": metrics,
            "seconds": time.monotonic() - begun,
            "device": device,
            "peak_memory_bytes": peak,
            "computed_in": computed_in(cell.dtype, device),
            "created": time.time(),
            **about,
        }


def _work(cell: Cell, place: Place) -> dict[str, float]:
    """The cell's metrics; what it makes is in its job's folder. Raises where either cannot be used."""
    width = 0
    if isinstance(cell, Compress):
        metrics = compress(CompressJob(*place, cell))
    elif isinstance(cell, Learn):
        learning = LearnJob(*place, cell)
        metrics, width = recover(learning), learning.width
    else:
        assert isinstance(cell, Evaluate)
        with evaluating(cell, place) as job:
            metrics = measure(job)
        check_finite(metrics, least=1)
        job.write_json("result.json", metrics)
    check_finite(metrics)
    payload.check(cell, place[3], width)
    return metrics


def check_finite(metrics: object, least: int = 0) -> None:
    """Raise FloatingPointError if a metric is NaN or infinite, TypeError if it is no number, ValueError if there are
    fewer than `least`, or MLflow does not take a name."""
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
    """What the user can do if memory is short for a cell: what is left to try, and what always helps."""
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
def surroundings() -> Record:
    """The fields of a manifest about code and machine."""
    return {
        "git_commit": git_commit(),
        "versions": versions(),
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
    }
