"""Writes cells' runs although MLflow may be away, refuse something, or lose its database."""

from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

from mlflow.entities import Param
from mlflow.tracking import MlflowClient

from ctp.cells.labels import slug
from ctp.common.redact import scrub
from ctp.planning.graph import Plan
from ctp.storage.remote import StoreError
from ctp.storage.store import Store
from ctp.tracking.cell_runs import CellRuns
from ctp.tracking.entries import GRID_FILE, Invocation, TrackError
from ctp.tracking.experiment import Experiment, first_line, is_away

T = TypeVar("T")


class Writer:
    """notes: what happened to a lost database. refused: what MLflow does not take of a cell, by key.

    Raises TrackError from the constructor and `retried`, all else what MLflow's client raises.
    """

    def __init__(self, uri: str, plan: Plan, store: Store) -> None:
        self.plan, self.store = plan, store
        self.experiment = Experiment(uri, plan.name)
        self.runs = CellRuns(self.experiment, plan, store)
        self.invocation: Invocation | None = None  # once it has begun
        self.notes: list[str] = []
        self.refused: dict[str, str] = {}
        self._note_rebuilt()

    @property
    def client(self) -> MlflowClient:
        return self.experiment.client

    def open(self, invocation: Invocation) -> None:
        """Make the run of this invocation."""
        self.invocation = invocation
        parent = self.client.create_run(self.experiment.id, tags=invocation.tags()).info.run_id
        self.runs.parent = parent
        self.client.log_batch(parent, params=[Param(n, v) for n, v in invocation.params().items()])
        self.client.log_text(parent, scrub(self.plan.grid.text), GRID_FILE)

    def finish(self, k: str) -> None:
        """Write everything about a finished cell."""
        left_out = self.runs.finish(self.plan.nodes[k])
        self.refused.pop(k, None)
        self.note_left_out(k, ", ".join(left_out))

    def note_left_out(self, k: str, metrics: str) -> None:
        """Of a cell whose run lacks these metrics, if there are any."""
        if metrics:
            name = slug(self.plan.nodes[k].cell)
            self.refused[k] = f"MLflow does not take these metrics of {name}, which the store has: {metrics}"

    def cell(self, k: str, write: Callable[[], object], last: bool = True) -> None:
        """Write something of one cell. What a server that answers refuses is noted, and holds up nothing else.

        last: nothing else will be written of it, so a refusal ends the cell's run. Raises where MLflow is away.
        """
        try:
            self._twice(write, retry=lambda e: not is_away(e))
        except Exception as e:
            if isinstance(e, StoreError) or is_away(e):
                raise
            self._recover(e)
            if last:
                self.refused[k] = f"MLflow does not take {slug(self.plan.nodes[k].cell)}: {first_line(e)}"
                with suppress(Exception):
                    self.runs.fail(self.plan.nodes[k], self.refused[k], "")

    def retried(self, write: Callable[[], T]) -> T:
        """What `write` returns, at the second attempt if the first one fails: another driver may have deleted a double
        that was to be written. Raises TrackError."""
        try:
            return self._twice(write)
        except StoreError:
            raise
        except Exception as e:
            raise self.error(e) from e

    def error(self, e: Exception) -> TrackError:
        return TrackError(
            f"MLflow at {self.experiment.uri}: {type(e).__name__}: {first_line(e)}. Nothing is lost: the store has it "
            f"all; `python -m ctp.track sync {self.plan.name}` writes it when the server is back"
        )

    def renew(self) -> None:
        """Where the database was lost, make a new one, with this invocation; the next sync writes the cells."""
        if self.experiment.renew():
            self.runs.forget()
            self._note_rebuilt()
            if self.invocation is not None:
                self.open(self.invocation)

    def _note_rebuilt(self) -> None:
        if self.experiment.rebuilt:
            self.notes.append(f"{self.experiment.rebuilt}; this grid's runs are written anew from the store, those of "
                              "others by `python -m ctp.track sync NAME`")  # fmt: skip

    def _twice(self, write: Callable[[], T], retry: Callable[[Exception], bool] = lambda e: True) -> T:
        """The second attempt reads MLflow again."""
        try:
            return write()
        except Exception as e:
            if isinstance(e, StoreError) or not retry(e):
                raise
            self._recover(e)
        return write()

    def _recover(self, e: Exception) -> None:
        """After an error: read MLflow again, from a new database where the old one is lost. Raises if it is away."""
        self.runs.forget()
        if not is_away(e):
            self.renew()
            self.experiment.any()
