"""The sign of life that a run keeps in the store, for `--status` on any machine that reads the store.

{root}/running/{grid}-{8 hex digits}.json   one file a driver, written every SECONDS, removed when the driver ends
"""

import json
import os
import platform
import re
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from ctp.common.redact import scrub
from ctp.console.board import Board
from ctp.machine.process import signs
from ctp.storage.drivers import RUNNING, is_left, records
from ctp.storage.store import Store

SECONDS = 10.0
_NAME = re.compile(r"[^\w.-]")


@contextmanager
def beating(store: Store, board: Board, about: dict[str, Any], seconds: float = SECONDS) -> Iterator[None]:
    """In here a thread writes what the board says, and `about`, into the store. A store that is away is no reason to
    stop: the next sign says it all. What dead drivers of this grid left goes."""
    path = f"{store.folders.root}/{RUNNING}/{_NAME.sub('-', board.plan.name)}-{uuid.uuid4().hex[:8]}.json"
    for record in records(store, board.plan.name):
        if is_left(record):
            with suppress(Exception):
                store.folders.remove(record["path"])
    ended = threading.Event()

    def beat() -> None:
        while True:
            with suppress(Exception):
                store.folders.write(path, json.dumps(_record(board, about)).encode())
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
            store.folders.remove(path)


def _record(board: Board, about: dict[str, Any]) -> dict[str, Any]:
    said = {n: scrub(v) if isinstance(v, str) else v for n, v in about.items()}
    who = {"grid": board.plan.name, "machine": platform.node(), "pid": os.getpid(), "signs": signs()}
    return {**said, **who, **board.snapshot()}
