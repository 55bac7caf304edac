"""A thread that writes events as they come, so that a slow or dead server never stalls the grid."""

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from itertools import islice, takewhile

from ctp.cells.events import Event, Progress
from ctp.machine.process import BEAT_SECONDS
from ctp.tracking.cell_runs import BATCH, LIVE

PATIENCE = 5.0, 300.0  # seconds until a server that did not answer is tried again: at first, and at most
BACKLOG = 10_000  # events that wait for a server; of more, progress is dropped


class EventThread(threading.Thread):
    """Hands events to `write` in order, progress in batches; after an error it tries again, ever more seldom.

    beat: called every BEAT_SECONDS, and before what had to wait. failed: called with each error; it must not raise.
    backlog: what is not written yet.
    """

    def __init__(self, write: Callable[[Sequence[Event]], None], beat: Callable[[], None],
                 failed: Callable[[Exception], None]) -> None:  # fmt: skip
        super().__init__(name="mlflow", daemon=True)
        self.backlog: deque[Event] = deque()
        self._write, self._beat, self._failed = write, beat, failed
        self._events: queue.Queue[Event | None] = queue.Queue()
        self._wait = 0.0  # seconds between attempts, 0 while the server answers
        self._resume, self._beat_at = 0.0, time.monotonic() + BEAT_SECONDS  # as time.monotonic() has them

    def put(self, event: Event) -> None:
        """Returns at once."""
        self._events.put(event)

    def stop(self) -> None:
        """End it when it has taken all events so far; what it could not write stays in `backlog`."""
        self._events.put(None)
        if self.ident is not None:
            self.join()

    def run(self) -> None:
        while True:
            due = self._resume if self._wait else self._beat_at
            try:
                event = self._events.get(timeout=max(0.0, due - time.monotonic()))
                if event is None:
                    return
                if len(self.backlog) < BACKLOG or not isinstance(event, Progress):
                    self.backlog.append(event)
            except queue.Empty:
                pass
            if time.monotonic() >= self._resume:
                self._try()

    def _try(self) -> None:
        try:
            if self._wait or time.monotonic() >= self._beat_at:
                self._beat()
                self._beat_at = time.monotonic() + BEAT_SECONDS
            self._write_backlog()
            self._wait = 0.0
        except Exception as e:
            self._failed(e)
            self._wait = min(max(2 * self._wait, PATIENCE[0]), PATIENCE[1])
            self._resume = time.monotonic() + self._wait

    def _write_backlog(self) -> None:
        while self.backlog:
            batch = self._next()
            self._write(batch)
            for _ in batch:  # only now: what `write` raised for is kept
                self.backlog.popleft()

    def _next(self) -> list[Event]:
        """The progress that comes first, as much as one request takes, else one event."""
        progress = takewhile(lambda e: isinstance(e, Progress), self.backlog)
        return list(islice(progress, BATCH // len(LIVE))) or [self.backlog[0]]
