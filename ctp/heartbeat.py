"""The sign of life that a run keeps in the store, for `--status` on any machine that reads the store.

{root}/running/{grid}-{8 hex digits}.json   one file a driver, written every SECONDS, removed when the driver ends
"""

import json
import os
import platform
import re
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from ctp.alive import BEAT, DEAD_SECONDS, OWNER, is_alive, signs
from ctp.board import Board
from ctp.redact import scrub
from ctp.store import Store

RUNNING = "running"
SECONDS = 10.0
SILENT = 60.0  # seconds without a sign, after which a driver is said to be silent
_NAME = re.compile(r"[^\w.-]")


@contextmanager
def beating(store: Store, board: Board, about: dict[str, Any], seconds: float = SECONDS) -> Iterator[None]:
    """In here a thread writes what the board says, and `about`, into the store. A store that is away is no reason to
    stop: the next sign says it all. What dead drivers of this grid left goes."""
    path = f"{store.root}/{RUNNING}/{_NAME.sub('-', board.plan.name)}-{uuid.uuid4().hex[:8]}.json"
    for record in records(store, board.plan.name):
        if is_left(record):
            with suppress(Exception):
                store.remove(record["path"])
    ended = threading.Event()

    def beat() -> None:
        while True:
            with suppress(Exception):
                store.write(path, json.dumps(_record(board, about)).encode())
            if ended.wait(seconds):
                return

    thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(timeout=30)
        with suppress(Exception):
            store.remove(path)


def _record(board: Board, about: dict[str, Any]) -> dict[str, Any]:
    said = {n: scrub(v) if isinstance(v, str) else v for n, v in about.items()}
    who = {"grid": board.plan.name, "machine": platform.node(), "pid": os.getpid(), "signs": signs()}
    return {**said, **who, **board.snapshot()}


def is_left(record: dict[str, Any]) -> bool:
    """Did a driver leave this that is dead, or was not heard of for longer than a driver can be?"""
    return record["state"] == "dead" or record["silence"] > DEAD_SECONDS


def records(store: Store, grid: str | None) -> list[dict[str, Any]]:
    """What the drivers of a grid (None: of all) said last, the latest first; `silence`: seconds since then; `state`:
    "alive", "silent" (no sign for long, its machine may be gone) or "dead" (its process is known to be no more).

    Raises StoreError where the store does not answer.
    """
    found = []
    for path in store.glob(RUNNING, "*.json"):
        try:
            record = json.loads(store.read(path) or b"")
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
