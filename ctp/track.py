"""MLflow, written from the store: one experiment per grid, one run per cell, found again by its key.

Only the driver writes, from one thread that replays finished artifacts and reported progress: a slow or dead server
never stalls the grid. What it missed is written when it answers again, at the end, or by `python -m ctp.track sync
NAME`, which writes from the store whatever MLflow lacks.
"""

import json
import queue
import random
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from itertools import takewhile
from typing import Any, TypeVar

from mlflow.entities import Metric, Param

from ctp.alive import BEAT, BEAT_SECONDS, signs
from ctp.cellruns import BATCH, CellRuns, Event
from ctp.invocation import GRID_FILE, MANIFESTS, Invocation, document
from ctp.plan import Plan
from ctp.redact import scrub
from ctp.runinfo import CURRENT, ERROR, KEY, KIND, PARENT, TrackError, asked, fingerprint
from ctp.runs import first_line
from ctp.spec import Cell, Learn
from ctp.store import Store, StoreError

PATIENCE = 5.0, 300.0  # seconds until a server that did not answer is tried again: at first, and at most
T = TypeVar("T")
BACKLOG = 10_000  # events that wait for a server; of more, progress is dropped


class Tracker:
    """The writer of one grid's experiment. Raises TrackError from the constructor, `begin`, `sync` and `close` only.

    plan: the whole grid, also where a run is of a part of it.
    """

    def __init__(self, uri: str, plan: Plan, store: Store) -> None:
        self.uri, self.plan, self.store = uri, plan, store
        self.runs = CellRuns(uri, plan, store)
        self.client, self.experiment = self.runs.client, self.runs.experiment
        self.invocation: Invocation | None = None  # once it has begun
        self.ended = 0  # runs of dead invocations that were still RUNNING
        self.trouble = ""  # the first thing that went wrong while the grid ran
        self._whole = False
        self._events: queue.Queue[Event | None] = queue.Queue()
        self._backlog: deque[Event] = deque()  # not written yet, in order
        self._aside: list[Event] = []  # what a server that answers does not take
        self._thread: threading.Thread | None = None
        self._wait, self._resume, self._beat_at = 0.0, 0.0, 0.0  # seconds; the last two as time.monotonic() has them

    # ----------------------------------------------------------------- the driver's side

    @property
    def parent(self) -> str | None:
        """The run of this invocation, once it has begun."""
        return self.runs.parent

    def begin(self, command: str, cells: int | None = None) -> None:
        """Open the parent run of this invocation and start writing. cells: how many it is to run."""
        self.invocation = Invocation(self.plan.name, command, cells)
        try:
            parent = self.client.create_run(self.experiment, tags=self.invocation.tags()).info.run_id
            self.runs.parent = parent
            self.client.log_batch(parent, params=[Param(n, v) for n, v in self.invocation.params().items()])
            self.client.log_text(parent, scrub(self.plan.grid.text), GRID_FILE)
        except Exception as e:
            raise TrackError(f"MLflow at {self.uri}: {type(e).__name__}: {first_line(e)}") from e
        self._beat_at = time.monotonic() + BEAT_SECONDS
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._thread.start()

    def knows_grid(self) -> bool:
        """Is there a parent run, whose grid.yaml says what the cells' runs stand for?"""
        try:
            return bool(self.client.search_runs([self.experiment], f"tags.`{KIND}` = 'grid'", max_results=1))
        except Exception as e:
            raise self._lost(e) from e

    def tell(self, event: Event) -> None:
        """Hand over an event; returns at once."""
        if self.invocation is not None:
            self.invocation.tell(event)
        if event["event"] != "skipped":  # such a cell has no run
            self._events.put({"at": time.time(), **event})

    def close(self, status: str) -> None:
        """Write what is left, then end the parent run, and cells that were cut off, as FINISHED, FAILED or KILLED."""
        if self._thread is not None:
            self._events.put(None)
            self._thread.join()
        try:
            self.sync(self._whole)
            self._twice(self._rest)
        finally:
            self._twice(lambda: self._end(status))

    def sync(self, whole: bool = False, trust: bool = False) -> int:
        """Write every finished cell that MLflow lacks, and why others failed; returns how many. Of cells with several
        runs one is left, and what dead invocations left RUNNING is ended. whole: retire runs of other cells.

        trust: where the experiment says that it was checked with these very cells and tags done, a cell drawn at random
        is there, and no invocation died, nothing more is asked. Runs that were removed one by one are found without it
        only.
        """
        self._whole = whole
        written, found = self._twice(lambda: self._sync(whole, trust))
        self.ended += found
        return written

    def _sync(self, whole: bool, trust: bool) -> tuple[int, int]:
        """(runs written, runs ended that dead invocations had left)."""
        done = self.store.done(self.plan.cells())
        mark = fingerprint(self.plan.nodes[k] for k in done)
        said = f"{'whole' if whole else 'part'} {mark}"
        orphans = self.runs.orphans()
        marked = trust and not orphans and self.runs.synced in (f"whole {mark}", said)
        if marked and (not done or self.runs.has(random.choice(list(done)))):
            self.runs.checked = done
            return 0, 0
        written = self._write(done)
        self._adopt({r.info.run_id: r for r in orphans}, done)
        written += self._write_failures(done)
        self.runs.settle(self.runs.created)
        written += self._write(done & self.runs.created)  # of two writers the other one's run may have stayed
        if whole:
            self._retire()
        self.runs.mark(said)
        for run in orphans:  # last: as long as they are there, nothing is trusted
            if run.data.tags.get(KIND) == "grid":
                self.runs.end_invocation(run)
        return written, len(orphans)

    def _twice(self, write: Callable[[], T]) -> T:
        """What `write` returns. Where it fails it is tried once more, and what MLflow has is read anew: another driver
        may have deleted a double that was to be written. Raises TrackError."""
        for left in (1, 0):
            try:
                return write()
            except StoreError:
                raise
            except Exception as e:
                if not left:
                    raise self._lost(e) from e
                self.runs.forget()
        raise AssertionError("unreachable")

    def _write(self, done: set[str]) -> int:
        """Finish the runs of finished cells that are not."""
        written = 0
        for k in self.plan.nodes:
            if k not in done or k in self.runs.checked:
                continue
            known = self.runs.known().get(k)
            if known is None or known.status != "FINISHED":
                self.runs.finish(self.plan.nodes[k])
                written += 1
                continue
            for name, value in asked(self.plan.nodes[k]).items() - known.tags.items():
                self.client.set_tag(known.run_id, name, value)
        return written

    def _write_failures(self, done: set[str]) -> int:
        """Fail the runs of cells whose last try failed, and that nobody is trying again now."""
        written = 0
        for k, error in self.store.failures().items():
            if k in done or k not in self.plan.nodes:
                continue
            known = self.runs.known().get(k)
            if known is None or (known.status != "RUNNING" and known.tags.get(ERROR) != error[:5000]):
                node = self.plan.nodes[k]
                self.runs.fail(node, error, _traceback(self.store, node.cell))
                written += 1
        return written

    def _adopt(self, orphans: dict[str, Any], done: set[str]) -> None:
        """End the runs of cells that dead invocations were at; those of finished cells are FINISHED by now."""
        cells = {r.data.tags[KEY] for r in orphans.values() if KEY in r.data.tags}
        self.runs.settle(cells)
        for k in cells:
            known = self.runs.known()[k]
            if known.status != "RUNNING" or known.run_id not in orphans:
                continue
            if k in done and k in self.plan.nodes:
                self.runs.finish(self.plan.nodes[k])
            else:
                self.runs.cut_off(k)

    def _retire(self) -> None:
        for k, known in self.runs.known().items():
            if k not in self.plan.nodes and known.tags.get(CURRENT) == "yes":
                self.client.set_tag(known.run_id, CURRENT, "no")

    def _rest(self) -> None:
        """What the thread could not write, but for what the store has told since."""
        left = [*self._aside, *self._backlog]
        self.runs.progress([e for e in left if e["event"] == "progress"])
        for event in left:
            known = self.runs.known().get(event["key"])
            if event["event"] == "failed" and (known is None or known.status != "FINISHED"):
                self._handle(event)

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

    def _lost(self, e: Exception) -> TrackError:
        return TrackError(
            f"MLflow at {self.uri}: {type(e).__name__}: {first_line(e)}. Nothing is lost: the store has it all; "
            f"`python -m ctp.track sync {self.plan.name}` writes it when the server is back"
        )

    # ----------------------------------------------------------------- the thread's side

    def _work(self) -> None:
        """Write events as they come. While the server is away they wait, and it is tried again ever more seldom;
        what still waits at the end is left to `close`."""
        while True:
            due = self._resume if self._wait else self._beat_at
            try:
                event = self._events.get(timeout=max(0.0, due - time.monotonic()))
            except queue.Empty:
                event = {}
            if event is None:
                return
            if event and (len(self._backlog) < BACKLOG or event["event"] != "progress"):
                self._backlog.append(event)
            if time.monotonic() >= self._resume:
                self._write_backlog()

    def _write_backlog(self) -> None:
        """Write what waits, in order, until the server does not take one."""
        answers = False
        try:
            if self._wait or time.monotonic() >= self._beat_at:
                self._beat()
                answers = True
            while self._backlog:
                batch = list(takewhile(lambda e: e["event"] == "progress", self._backlog))[: BATCH // 2]
                if batch:
                    self.runs.progress(batch)
                else:
                    self._handle(self._backlog[0])
                for _ in range(max(1, len(batch))):
                    self._backlog.popleft()
            self._wait = 0.0
        except Exception as e:
            self.trouble = self.trouble or scrub(f"{type(e).__name__}: {first_line(e)}")
            self.runs.forget()  # a run may have been made whose id was not heard, or deleted as another's double
            if answers and self._wait:  # twice now: it is not the server, it is the event
                self._aside.append(self._backlog.popleft())
            self._wait = min(max(2 * self._wait, PATIENCE[0]), PATIENCE[1])
            self._resume = time.monotonic() + self._wait

    def _beat(self) -> None:
        """Say that this invocation lives."""
        if self.parent is not None:
            self.client.set_tag(self.parent, BEAT, signs()[BEAT])
        self._beat_at = time.monotonic() + BEAT_SECONDS

    def _handle(self, event: Event) -> None:
        node = self.plan.nodes[event["key"]]
        kind = event["event"]
        if kind == "done":
            self.runs.finish(node)
        elif kind == "failed":
            self.runs.fail(node, event["error"], event.get("traceback", ""))
        elif kind == "start" and isinstance(node.cell, Learn):
            self.runs.start(node)
        elif kind == "progress":
            self.runs.progress([event])


def _traceback(store: Store, cell: Cell) -> str:
    """Of the cell's last try; empty where it was cut off while it was written."""
    name = store.folder(cell).rpartition("/")[2]
    try:
        return str(json.loads(store.fs.cat_file(f"{store.root}/failed/{name}.json"))["traceback"])
    except (OSError, ValueError, KeyError):
        return ""


if __name__ == "__main__":
    from ctp.resync import main

    sys.exit(main())
