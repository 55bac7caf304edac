"""The record that a running driver keeps in the store, for `--status` on any machine that reads the store.

{root}/running/{grid}-{8 hex digits}.json   one file a driver, written every SECONDS, removed when the driver ends
"""

import os
import platform
import re
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from ctp.common.redact import scrub
from ctp.console.board import Board
from ctp.machine.process import signs
from ctp.storage.drivers import RUNNING, About, Driver, records
from ctp.storage.store import Store

SECONDS = 10.0


@contextmanager
def beating(store: Store, board: Board, about: About, seconds: float = SECONDS) -> Iterator[None]:
    """Inside, a thread keeps the record of this driver; records of dead drivers of this grid are removed.

    A store that is away does not stop the run: the next record replaces the last.
    """
    name = re.sub(r"[^\w.-]", "-", board.plan.name)
    path = f"{store.folders.root}/{RUNNING}/{name}-{uuid.uuid4().hex[:8]}.json"
    for driver in records(store, board.plan.name):
        if driver.is_left:
            with suppress(Exception):
                store.folders.remove(driver.path)
    ended = threading.Event()

    def beat() -> None:
        while True:
            with suppress(Exception):
                store.folders.write(path, record(board, about).model_dump_json(exclude_none=True).encode())
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


def record(board: Board, about: About) -> Driver:
    """The record of this driver as of now."""
    more = {n: scrub(v) if isinstance(v, str) else v for n, v in about}
    return Driver(grid=board.plan.name, machine=platform.node(), pid=os.getpid(), signs=signs(), began=board.began_at,
                  cells=board.cells(), **board.counts(), **more)  # fmt: skip
