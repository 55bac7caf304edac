"""One cell in a worker: it is executed, its events are reported, and its failure is stored however it ends."""

import logging
import time
import traceback
from collections.abc import Callable
from dataclasses import replace

from ctp.cells.cell import Cell, CellData, from_json, key, to_json
from ctp.cells.events import Done, Drained, Event, Failed, Notice, Progress, Report, Started
from ctp.cells.labels import slug
from ctp.cells.runtime import Runtime
from ctp.common.messages import plain
from ctp.common.redact import scrub
from ctp.machine import arithmetic, device, signals
from ctp.machine.contained import contained
from ctp.planning import plugins
from ctp.storage.ref import ref
from ctp.storage.store import Store


class Task(CellData):
    """A cell as plain data, and its key."""

    key: str


REPORT_SECONDS = 1.0  # between two reports of a cell's progress
ENDED = "the method itself ended the process; a cell fails by raising an error"


def do(data: Task, store: Store, runtime: Runtime, emit: Callable[[Event], None], run: str = "") -> None:
    """Execute the cell that `data` (cell as JSON, and its key) describes; `emit` gets its events.

    run: identifies the run; with it, a cell that crashed its process is not tried again on the same machine.
    """
    k, cell = str(data["key"]), None
    try:
        with contained(run, k):
            plugins.load(runtime.plugins)
            from ctp.execution.execute import execute  # torch and transformers: in workers only

            cell = from_json(data)
            k = key(cell)
            emit(Started(k))
            if text := arithmetic.notice(cell.dtype, device.pick(runtime.device)):
                emit(Notice(text, k))
            begun = time.monotonic()
            execute(cell, store, runtime, _throttled(k, emit))
    except signals.Drained:
        emit(Drained(k))
    except BaseException as e:  # fails this cell only; this thread gets no signals
        end = "" if isinstance(e, Exception) else f": {ENDED}"
        error = plain(scrub(f"{type(e).__name__}: {e}".strip(": "))) + end
        trace = plain(scrub(traceback.format_exc()))
        if cell is not None:
            store_failure(store, cell, error, trace)
        emit(Failed(k, error, trace))
    else:
        emit(Done(k, time.monotonic() - begun))


def store_failure(store: Store, cell: Cell, error: str, trace: str) -> None:
    """Store why the cell failed; a store that cannot be reached is logged, as the error itself must not be lost."""
    try:
        store.failures.record(ref(cell), to_json(cell), error, trace)
    except Exception:
        logging.getLogger(__name__).warning("the failure of %s could not be stored", slug(cell))


def _throttled(k: str, emit: Callable[[Event], None]) -> Report:
    """Emits reports with the cell's key: all notices and validations, other progress at most once in REPORT_SECONDS."""
    last = 0.0

    def report(event: Progress | Notice) -> None:
        nonlocal last
        if isinstance(event, Progress):
            if time.monotonic() - last < REPORT_SECONDS and event.val_loss is None:
                return
            last = time.monotonic()
        emit(replace(event, key=k))

    return report
