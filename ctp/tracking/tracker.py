"""MLflow, written from the store: one experiment per grid, one run per cell, found again by its key.

Only the driver writes: from a thread while the grid runs, and at its end what MLflow still lacks of the store. So does
`python -m ctp.track sync NAME`.
"""

import time
from collections.abc import Sequence
from functools import partial

from mlflow.entities import Metric
from mlflow.tracking import MlflowClient

from ctp.cells.cell import Learn
from ctp.cells.events import Done, Event, Failed, Notice, Progress, Skipped, Started
from ctp.common.redact import scrub
from ctp.machine.process import BEAT, signs
from ctp.planning.graph import Plan
from ctp.storage.store import Store
from ctp.tracking.background import EventThread
from ctp.tracking.entries import KIND, MANIFESTS, PARENT, Invocation, document
from ctp.tracking.experiment import first_line
from ctp.tracking.sync import sync
from ctp.tracking.writer import Writer


class Tracker:
    """Writes one grid's experiment. Raises TrackError from the constructor, `knows_grid`, `begin`, `sync` and `close`.

    plan: the whole grid, also where a run is of a part of it. trouble: the first error while the grid ran. ended: how
    many runs of dead invocations were still RUNNING. notes, refused: see Writer.
    """

    def __init__(self, uri: str, plan: Plan, store: Store) -> None:
        self.uri = uri
        self.writer = Writer(uri, plan, store)
        self.experiment, self.runs = self.writer.experiment, self.writer.runs
        self.notes, self.refused = self.writer.notes, self.writer.refused
        self.thread = EventThread(self._write, self._beat, self._failed)
        self.trouble, self.ended = "", 0
        self._whole = False

    @property
    def client(self) -> MlflowClient:
        return self.experiment.client

    @property
    def parent(self) -> str | None:
        """The run of this invocation, once it has begun."""
        return self.runs.parent

    def knows_grid(self) -> bool:
        """Is there a run of an invocation, whose grid.yaml says what the cells' runs stand for?"""
        return self.writer.retried(lambda: self.experiment.any(f"tags.`{KIND}` = 'grid'"))

    def sync(self, whole: bool = False, trust: bool = False) -> int:
        """Write every finished cell that MLflow lacks, and why others failed; returns how many. Of cells with several
        runs one is left, and what dead invocations left RUNNING is ended. whole: retire runs of other cells.

        trust: skip this where the experiment says that it was brought up to date with these very cells and tags, a
        finished cell drawn at random is there, and no invocation died. Runs that were removed one by one are found only
        without it.
        """
        self._whole = whole
        written, ended = self.writer.retried(lambda: sync(self.writer, whole, trust))
        self.ended += ended
        return written

    def begin(self, command: str, cells: int | None = None) -> None:
        """Open the run of this invocation and start the thread. cells: how many it is to run."""
        try:
            self.writer.open(Invocation(self.writer.plan.name, command, cells))
        except Exception as e:
            raise self.writer.error(e) from e
        self.thread.start()

    def tell(self, event: Event) -> None:
        """Hand over an event; returns at once."""
        if self.writer.invocation is not None:
            self.writer.invocation.tell(event)
        if not isinstance(event, Skipped | Notice):  # these are not in MLflow
            self.thread.put(event)

    def close(self, status: str) -> None:
        """Write what is left, then end the run of the invocation, and those of cells that were cut off.

        status: FINISHED, FAILED or KILLED.
        """
        self.thread.stop()
        try:
            self.writer.retried(self.writer.renew)
            self.sync(self._whole)
            self.writer.retried(self._write_backlog)
        finally:
            self.writer.retried(lambda: self._end(status))

    def _end(self, status: str) -> None:
        known = self.experiment.runs()
        for k in self.runs.live & set(known):
            if known[k].tags.get(PARENT) == self.parent:  # else another driver has taken it over
                self.runs.cut_off(k)
        if self.parent is None or self.writer.invocation is None:
            return
        text, count = document(self.runs.manifests)
        if count:
            self.client.log_text(self.parent, text, MANIFESTS)
        if count < len(self.runs.manifests):
            self.client.set_tag(self.parent, "ctp.manifests", f"{count} of {len(self.runs.manifests)}")
        now, metrics = int(1000 * time.time()), self.writer.invocation.metrics()
        self.client.log_batch(self.parent, [Metric(n, v, now, 0) for n, v in metrics.items()])
        self.client.set_terminated(self.parent, status)

    def _write(self, events: Sequence[Event]) -> None:
        """Several of progress, or one of another kind; what is refused here is tried again by `close`."""
        progress = [e for e in events if isinstance(e, Progress)]
        write = partial(self.runs.progress, progress) if progress else partial(self._handle, events[0])
        self.writer.cell(events[0].key, write, last=False)

    def _handle(self, event: Event) -> None:
        node = self.writer.plan.nodes[event.key]
        if isinstance(event, Done):
            self.writer.finish(node.key)
        elif isinstance(event, Failed):
            self.runs.fail(node, event.error, event.traceback)
        elif isinstance(event, Started) and isinstance(node.cell, Learn):
            self.runs.start(node)

    def _write_backlog(self) -> None:
        """What the thread could not write and the store does not have: progress, and failures of unfinished cells."""
        for event in self.thread.backlog:
            known = self.experiment.runs().get(event.key)
            if isinstance(event, Progress):
                self._write([event])
            elif isinstance(event, Failed) and (known is None or known.status != "FINISHED"):
                self.writer.cell(event.key, partial(self._handle, event))

    def _beat(self) -> None:
        """Show that this invocation is alive, in a new database if the old one is lost."""
        self.writer.renew()
        if self.parent is not None:
            self.client.set_tag(self.parent, BEAT, signs()[BEAT])

    def _failed(self, e: Exception) -> None:
        self.trouble = self.trouble or scrub(f"{type(e).__name__}: {first_line(e)}")
        self.runs.forget()  # a run may have been made whose id did not arrive, or deleted as another's double
