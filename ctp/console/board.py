"""The state of a run, made from its events: which cells are running and how far, how many have ended."""

import threading
import time
from collections import Counter
from dataclasses import dataclass

from ctp.cells.events import OUTCOMES, Event, Progress, Started
from ctp.cells.labels import slug
from ctp.planning.graph import Plan
from ctp.storage.drivers import CellAtWork


@dataclass
class Running:
    """A running cell. begun, at, warm: of its start, last progress and second reported step, by time.monotonic().

    Its pace counts from the second reported step: earlier time went into loading, an earlier run's steps and compiling.
    """

    begun: float
    last: Progress | None = None
    at: float = 0.0
    first_step: int | None = None
    warm: float = 0.0
    warm_step: int = 0

    def update(self, progress: Progress, now: float) -> None:
        self.last, self.at = progress, now
        if self.first_step is None:
            self.first_step = progress.step
        elif not self.warm and progress.step > self.first_step:
            self.warm, self.warm_step = now, progress.step

    def left(self) -> float | None:
        """Seconds until its last step; None where no pace is known yet."""
        if self.last is None or not self.warm or self.last.step <= self.warm_step:
            return None
        return (self.at - self.warm) / (self.last.step - self.warm_step) * (self.last.steps - self.last.step)


class Board:
    """Counts and running cells of a run. total: cells that it is to do. Any thread may read it."""

    def __init__(self, plan: Plan, total: int) -> None:
        self.plan, self.total = plan, total
        self.began_at = time.time()
        self.running: dict[str, Running] = {}
        self.ended: Counter[str] = Counter()  # done, failed, skipped
        self._lock = threading.Lock()

    def expect(self, cells: set[str]) -> None:
        """These cells run again."""
        with self._lock:
            self.total += len(cells)

    def update(self, event: Event) -> None:
        k, now = event.key, time.monotonic()
        with self._lock:
            if isinstance(event, Started):
                self.running[k] = Running(now)
            elif isinstance(event, Progress):
                self.running.setdefault(k, Running(now)).update(event, now)
            elif type(event) in OUTCOMES:
                self.running.pop(k, None)
                self.ended[OUTCOMES[type(event)]] += 1

    def counts(self) -> dict[str, int]:
        """Cells: total, done, failed, skipped."""
        with self._lock:
            return {"total": self.total, **{n: self.ended[n] for n in OUTCOMES.values()}}

    def cells(self) -> list[CellAtWork]:
        """The running cells, in the order in which they started."""
        with self._lock:
            return [self._at_work(k, r) for k, r in self.running.items()]

    def cell(self, k: str) -> CellAtWork:
        return self._at_work(k, self.running[k])

    def _at_work(self, k: str, r: Running) -> CellAtWork:
        cell, numbers = self.plan.nodes[k].cell, r.last.numbers() if r.last else {}
        seconds = time.monotonic() - r.begun
        return CellAtWork(key=k, kind=cell.kind, name=slug(cell), seconds=seconds, left=r.left(), **numbers)
