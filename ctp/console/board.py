"""What a run has told so far: which cells are at work and how far, how many have ended. Any thread may look at it."""

import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from ctp.cells.labels import slug
from ctp.planning.graph import Plan


@dataclass
class Running:
    """A cell at work. begun: as time.monotonic() has it. said: its last progress.

    warm, warm_step: time and number of the first step that it told after another one. What came before is not its pace:
    loading, what an earlier run did, and the step in which code is compiled and memory is found.
    """

    begun: float
    first_step: int | None = None
    warm: float = 0.0
    warm_step: int = 0
    said: dict[str, Any] = field(default_factory=dict)

    def tell(self, progress: dict[str, Any], now: float) -> None:
        """Take in a progress: step, steps, and numbers."""
        self.said = {**progress, "at": now}
        if self.first_step is None:
            self.first_step = progress["step"]
        elif not self.warm and progress["step"] > self.first_step:
            self.warm, self.warm_step = now, progress["step"]

    def left(self) -> float | None:
        """Seconds until its last step at the pace since it was warm; None where no pace is known yet."""
        made = self.said.get("step", 0) - self.warm_step
        if not self.warm or made <= 0:
            return None
        return (self.said["at"] - self.warm) / made * (self.said["steps"] - self.said["step"])


class Board:
    """The state of a run, made from its events. total: the cells that it is to do."""

    def __init__(self, plan: Plan, total: int) -> None:
        self.plan, self.total = plan, total
        self.begun, self.began_at = time.monotonic(), time.time()
        self.running: dict[str, Running] = {}
        self.ended: Counter[str] = Counter()  # done, failed, skipped
        self.failed: dict[str, str] = {}
        self._lock = threading.Lock()

    def expect(self, cells: set[str]) -> None:
        """These run again."""
        with self._lock:
            self.total += len(cells)

    def tell(self, event: dict[str, Any]) -> None:
        """An event of a cell: start, progress, done, failed, skipped."""
        k, kind, now = event["key"], event["event"], time.monotonic()
        with self._lock:
            if kind == "start":
                self.running[k] = Running(now)
            elif kind == "progress":
                self.running.setdefault(k, Running(now)).tell(event, now)
            else:
                self.running.pop(k, None)
                self.ended[kind] += 1
                if kind == "failed":
                    self.failed[k] = event["error"]

    def snapshot(self) -> dict[str, Any]:
        """Plain data for other processes: counts, and of each running cell its name, seconds at work and progress."""
        now = time.monotonic()
        with self._lock:
            cells = list(self.running.items())
            counts = {"total": self.total, **{n: self.ended[n] for n in ("done", "failed", "skipped")}}
        return {**counts, "began": self.began_at, "cells": [self._told(k, r, now) for k, r in cells]}

    def _told(self, k: str, r: Running, now: float) -> dict[str, Any]:
        cell = self.plan.nodes[k].cell
        told = {n: r.said[n] for n in ("step", "steps", "loss", "best_val_loss", "tokens_per_s", "at_once")
                if r.said.get(n) is not None}  # fmt: skip
        left = r.left()
        return {"key": k, "kind": cell.kind, "name": slug(cell), "seconds": now - r.begun, **told,
                **({} if left is None else {"left": left})}  # fmt: skip
