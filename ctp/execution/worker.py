"""One cell in a worker: done, told as it goes, and its failure kept, however it ends."""

import logging
import time
import traceback
from collections.abc import Callable
from typing import Any

from ctp.cells.cell import from_json, key, to_json
from ctp.cells.labels import slug
from ctp.cells.runtime import Runtime
from ctp.common.messages import plain
from ctp.common.redact import scrub
from ctp.machine import arithmetic, device, signals
from ctp.machine.contained import contained
from ctp.planning import plugins
from ctp.storage.ref import ref
from ctp.storage.store import Store

Event = dict[str, Any]
ENDED = "the method itself ended the process; a cell fails by raising an error"


def do(data: dict[str, Any], place: Store, how: Runtime, tell: Callable[[Event], None], run: str = "") -> None:
    """One cell, told as it starts, goes on, and ends. run: a word of this run; with it a cell that crashed its process
    is not tried again on the same machine."""
    k, cell = data["key"], None
    try:
        with contained(run, k):
            plugins.load(how.plugins)
            from ctp.execution.execute import execute  # torch and transformers: in workers only

            cell = from_json(data)
            k = key(cell)
            tell({"event": "start", "key": k})
            if text := arithmetic.notice(cell.dtype, device.pick(how.device)):
                tell({"event": "notice", "key": k, "text": text})
            begun = time.monotonic()
            execute(cell, place, how, _throttled(k, tell))
    except signals.Drained:
        tell({"event": "drained", "key": k})
    except BaseException as e:  # this cell's failure, and only this cell's; a thread of its own gets no signals
        end = "" if isinstance(e, Exception) else f": {ENDED}"
        error = plain(scrub(f"{type(e).__name__}: {e}".strip(": "))) + end
        trace = plain(scrub(traceback.format_exc()))
        if cell is not None:
            keep_failure(place, cell, error, trace)
        tell({"event": "failed", "key": k, "error": error, "traceback": trace})
    else:
        tell({"event": "done", "key": k, "seconds": time.monotonic() - begun})


def keep_failure(place: Any, cell: Any, error: str, trace: str) -> None:
    try:
        place.failures.record(ref(cell), to_json(cell), error, trace)
    except Exception:  # a store that is gone is no reason to lose the error itself
        logging.getLogger(__name__).warning("the failure of %s could not be stored", slug(cell))


def _throttled(k: str, tell: Callable[[Event], None], seconds: float = 1.0) -> Callable[[dict[str, Any]], None]:
    """Reports of a cell, at most one a second but for notices and those with a validation loss."""
    last = 0.0

    def report(numbers: dict[str, Any]) -> None:
        nonlocal last
        if "notice" in numbers:
            tell({"event": "notice", "key": k, "text": numbers["notice"]})
        elif time.monotonic() - last >= seconds or "val_loss" in numbers:
            last = time.monotonic()
            tell({**numbers, "event": "progress", "key": k})

    return report
