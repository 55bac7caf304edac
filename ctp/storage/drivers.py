"""The drivers (running grids) that a store knows of, by the records that they keep in it."""

import json
import time
from typing import Any

from ctp.machine.process import BEAT, DEAD_SECONDS, OWNER, is_alive, signs
from ctp.storage.store import Store

RUNNING = "running"
SILENT = 60.0  # seconds without a sign, after which a driver is said to be silent


def is_left(record: dict[str, Any]) -> bool:
    """Did a driver leave this that is dead, or was not heard of for longer than a driver can be?"""
    return record["state"] == "dead" or record["silence"] > DEAD_SECONDS


def records(store: Store, grid: str | None) -> list[dict[str, Any]]:
    """What the drivers of a grid (None: of all) said last, the latest first; `silence`: seconds since then; `state`:
    "alive", "silent" (no sign for long, its machine may be gone) or "dead" (its process is known to be no more).

    Raises StoreError where the store does not answer.
    """
    found = []
    for path in store.folders.glob(RUNNING, "*.json"):
        try:
            record = json.loads(store.folders.read(path) or b"")
            if grid not in (None, record["grid"]):
                continue
            silence = max(0.0, time.time() - float(record["signs"][BEAT]))
            state = _state(record["signs"], silence)
        except (ValueError, KeyError, TypeError):
            continue  # cut off while it was written, or of another version
        found.append({**record, "path": path, "silence": silence, "state": state})
    return sorted(found, key=lambda r: r["silence"])


def _state(told: dict[str, str], silence: float) -> str:
    here = told[OWNER].partition(" ")[0] == signs()[OWNER].partition(" ")[0]
    if here and not is_alive(told, 0.0):
        return "dead"
    return "silent" if silence > SILENT else "alive"
