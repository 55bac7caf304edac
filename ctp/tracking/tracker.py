"""MLflow, written from the store: one experiment per grid, one run per cell, found again by its key.

Only the driver writes, from one thread that replays finished artifacts and reported progress: a slow or dead server
never stalls the grid. What it missed is written when it answers again, at the end, or by `python -m ctp.track sync
NAME`, which writes from the store whatever MLflow lacks.
"""

import queue
import threading
import time
from collections import deque
from collections.abc import Iterable
from functools import partial
from typing import TypeVar

from mlflow.entities import Metric

from ctp.cells.cell import Learn
from ctp.cells.events import Done, Event, Failed, Notice, Progress, Skipped, Started
from ctp.common.redact import scrub
from ctp.machine.process import BEAT, BEAT_SECONDS, signs
from ctp.planning.graph import Plan
from ctp.storage.store import Store
from ctp.tracking.cell_runs import BATCH
from ctp.tracking.entries import MANIFESTS, PARENT, Invocation, TrackError, document
from ctp.tracking.runs import first_line
from ctp.tracking.writer import Writer

PATIENCE = 5.0, 300.0  # seconds until a server that did not answer is tried again: at first, and at most
T = TypeVar("T")
BACKLOG = 10_000  # events that wait for a server; of more, progress is dropped


class Tracker(Writer):
    """The writer of one grid's experiment. Raises TrackError from the constructor, `begin`, `sync` and `close` only.

    plan: the whole grid, also where a run is of a part of it.
    """

    def __init__(self, uri: str, plan: Plan, store: Store) -> None:
        super().__init__(uri, plan, store)
        self.trouble = ""  # the first thing that went wrong while the grid ran
        self._events: queue.Queue[Event | None] = queue.Queue()
        self._backlog: deque[Event] = deque()  # not written yet, in order
        self._thread: threading.Thread | None = None
        self._wait, self._resume, self._beat_at = 0.0, 0.0, 0.0  # seconds; the last two as time.monotonic() has them

    # ----------------------------------------------------------------- the driver's side

    def begin(self, command: str, cells: int | None = None) -> None:
        """Open the parent run of this invocation and start writing. cells: how many it is to run."""
        self.invocation = Invocation(self.plan.name, command, cells)
        try:
            self._open(self.invocation)
        except Exception as e:
            raise TrackError(f"MLflow at {self.uri}: {type(e).__name__}: {first_line(e)}") from e
        self._beat_at = time.monotonic() + BEAT_SECONDS
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._thread.start()

    def tell(self, event: Event) -> None:
        """Hand over an event; returns at once."""
        if self.invocation is not None:
            self.invocation.tell(event)
        if not isinstance(event, Skipped | Notice):  # these are not in MLflow
            self._events.put(event)

    def close(self, status: str) -> None:
        """Write what is left, then end the parent run, and cells that were cut off, as FINISHED, FAILED or KILLED."""
        if self._thread is not None:
            self._events.put(None)
            self._thread.join()
        try:
            self._twice(self._renewed)
            self.sync(self._whole)
            self._twice(self._rest)
        finally:
            self._twice(lambda: self._end(status))

    def _rest(self) -> None:
        """What the thread could not write, but for what the store has told since."""
        for event in self._backlog:
            known = self.runs.known().get(event.key)
            failed = isinstance(event, Failed) and (known is None or known.status != "FINISHED")
            if failed or isinstance(event, Progress):
                self._each(event.key, partial(self._handle, event), ends=failed)

    def _end(self, status: str) -> None:
        for k in self.runs.live & set(self.runs.known()):
            if self.runs.known()[k].tags.get(PARENT) == self.parent:  # or another driver is at it by now
                self.runs.cut_off(k)
        if self.parent is not None and self.invocation is not None:
            text, count = document(self.runs.manifests)
            if count:
                self.client.log_text(self.parent, text, MANIFESTS)
            if count < len(self.runs.manifests):
                self.client.set_tag(self.parent, "ctp.manifests", f"{count} of {len(self.runs.manifests)}")
            now = int(1000 * time.time())
            self.client.log_batch(self.parent, [Metric(n, v, now, 0) for n, v in self.invocation.metrics().items()])
            self.client.set_terminated(self.parent, status)

    # ----------------------------------------------------------------- the thread's side

    def _work(self) -> None:
        """Write events as they come. While the server is away they wait, and it is tried again ever more seldom;
        what still waits at the end is left to `close`."""
        while True:
            due = self._resume if self._wait else self._beat_at
            try:
                event = self._events.get(timeout=max(0.0, due - time.monotonic()))
                if event is None:
                    return
                if len(self._backlog) < BACKLOG or not isinstance(event, Progress):
                    self._backlog.append(event)
            except queue.Empty:
                pass  # due
            if time.monotonic() >= self._resume:
                self._write_backlog()

    def _write_backlog(self) -> None:
        """Write what waits, in order, until the server does not take one."""
        try:
            if self._wait or time.monotonic() >= self._beat_at:
                self._renewed()
                self._beat()
            while self._backlog:
                event = self._backlog[0]
                batch = _first_progress(self._backlog, BATCH // 2)
                write = partial(self.runs.progress, batch) if batch else partial(self._handle, event)
                self._each(event.key, write, ends=False)  # the store tells it again at the end
                for _ in range(max(1, len(batch))):
                    self._backlog.popleft()
            self._wait = 0.0
        except Exception as e:
            self.trouble = self.trouble or scrub(f"{type(e).__name__}: {first_line(e)}")
            self.runs.forget()  # a run may have been made whose id was not heard, or deleted as another's double
            self._wait = min(max(2 * self._wait, PATIENCE[0]), PATIENCE[1])
            self._resume = time.monotonic() + self._wait

    def _beat(self) -> None:
        """Say that this invocation lives."""
        if self.parent is not None:
            self.client.set_tag(self.parent, BEAT, signs()[BEAT])
        self._beat_at = time.monotonic() + BEAT_SECONDS

    def _handle(self, event: Event) -> None:
        node = self.plan.nodes[event.key]
        match event:
            case Done():
                self._finish(node.key)
            case Failed():
                self.runs.fail(node, event.error, event.traceback)
            case Started() if isinstance(node.cell, Learn):
                self.runs.start(node)
            case Progress():
                self.runs.progress([event])


def _first_progress(events: Iterable[Event], most: int) -> list[Progress]:
    """The events of progress before any other event, at most `most`."""
    found: list[Progress] = []
    for event in events:
        if not isinstance(event, Progress) or len(found) == most:
            break
        found.append(event)
    return found
