"""What MLflow lacks of a plan's cells, written from the store: their runs, found again by key."""

import random
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

from mlflow.entities import Param

from ctp.cells.labels import slug
from ctp.common.redact import scrub
from ctp.planning.graph import Node, Plan
from ctp.storage.remote import StoreError
from ctp.storage.store import Store
from ctp.tracking.cell_runs import CellRuns
from ctp.tracking.entries import (
    CURRENT,
    ERROR,
    GRID_FILE,
    KEY,
    KIND,
    LEFT_OUT,
    Invocation,
    TrackError,
    asked,
    fingerprint,
)
from ctp.tracking.runs import away, first_line

T = TypeVar("T")


class Writer:
    """Writes the runs of one grid's cells. Raises TrackError from the constructor and `sync` only.

    plan: the whole grid, also where a run is of a part of it.
    """

    def __init__(self, uri: str, plan: Plan, store: Store) -> None:
        self.uri, self.plan, self.store = uri, plan, store
        self.runs = CellRuns(uri, plan, store)
        self.invocation: Invocation | None = None  # once it has begun
        self.ended = 0  # runs of dead invocations that were still RUNNING
        self.notes: list[str] = []  # what became of a database that was lost
        self.refused: dict[str, str] = {}  # key -> what MLflow does not take of a cell
        self._whole = False
        self._tell_rebuilt()

    @property
    def client(self) -> Any:
        return self.runs.client

    @property
    def experiment(self) -> str:
        return self.runs.experiment

    @property
    def parent(self) -> str | None:
        """The run of this invocation, once it has begun."""
        return self.runs.parent

    def knows_grid(self) -> bool:
        """Is there a parent run, whose grid.yaml says what the cells' runs stand for?"""
        try:
            return bool(self.client.search_runs([self.experiment], f"tags.`{KIND}` = 'grid'", max_results=1))
        except Exception as e:
            raise self._lost(e) from e

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
        self.store.repair(self.plan.refs())
        done = self.store.done(self.plan.refs())
        mark = fingerprint(self.plan.nodes[k] for k in done)
        said = f"{'whole' if whole else 'part'} {mark}"
        orphans = self.runs.orphans()
        marked = trust and not orphans and not self.runs.rebuilt and self.runs.synced in (f"whole {mark}", said)
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
        if not self.refused:  # or it is looked at again, and said again
            self.runs.mark(said)
        self.runs.rebuilt = ""
        for run in orphans:  # last: as long as they are there, nothing is trusted
            if run.data.tags.get(KIND) == "grid":
                self.runs.end_invocation(run)
        return written, len(orphans)

    # ------------------------------------------------------------------- what goes wrong

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
                self._after(e)
        raise AssertionError("unreachable")

    def _after(self, e: Exception) -> None:
        """Something went wrong: what MLflow has is to be read anew, of a new database where the old one is lost."""
        self.runs.forget()
        if not away(e):
            self._renewed()

    def _each(self, k: str, write: Callable[[], object], ends: bool = True) -> None:
        """Write something of one cell. What a server that answers does not take is noted, and holds nobody up.

        ends: then the cell's run is ended. Raises what the client raises where MLflow is away.
        """
        for left in (1, 0):
            try:
                write()
                return
            except StoreError:
                raise
            except Exception as e:
                if away(e):
                    raise
                self._after(e)
                self.runs.answers()
                if not left and ends:
                    self.refused[k] = f"MLflow does not take {slug(self.plan.nodes[k].cell)}: {first_line(e)}"
                    with suppress(Exception):
                        self.runs.fail(self.plan.nodes[k], self.refused[k], "")

    def _renewed(self) -> bool:
        """Was the database lost? Then there is a new one, with this invocation; cells are written by the next sync."""
        if not self.runs.renew():
            return False
        self._tell_rebuilt()
        if self.invocation is not None:
            self._open(self.invocation)
        return True

    def _tell_rebuilt(self) -> None:
        if self.runs.rebuilt:
            self.notes.append(f"{self.runs.rebuilt}; this grid's runs are written anew from the store, those of others "
                              "by `python -m ctp.track sync NAME`")  # fmt: skip

    def _open(self, invocation: Invocation) -> None:
        parent = self.client.create_run(self.experiment, tags=invocation.tags()).info.run_id
        self.runs.parent = parent
        self.client.log_batch(parent, params=[Param(n, v) for n, v in invocation.params().items()])
        self.client.log_text(parent, scrub(self.plan.grid.text), GRID_FILE)

    def _lost(self, e: Exception) -> TrackError:
        return TrackError(
            f"MLflow at {self.uri}: {type(e).__name__}: {first_line(e)}. Nothing is lost: the store has it all; "
            f"`python -m ctp.track sync {self.plan.name}` writes it when the server is back"
        )

    # ------------------------------------------------------------------------ cells

    def _write(self, done: set[str]) -> int:
        """Finish the runs of finished cells that are not."""
        written = 0
        for k in self.plan.nodes:
            if k not in done or k in self.runs.checked:
                continue
            known = self.runs.known().get(k)
            if known is None or known.status != "FINISHED":
                self._each(k, partial(self._finish, k))
                written += k not in self.refused
                continue
            self._note(k, known.tags.get(LEFT_OUT, ""))
            for name, value in asked(self.plan.nodes[k]).items() - known.tags.items():
                self.client.set_tag(known.run_id, name, value)
        return written

    def _finish(self, k: str) -> None:
        left_out = self.runs.finish(self.plan.nodes[k])
        self.refused.pop(k, None)
        self._note(k, ", ".join(left_out))

    def _note(self, k: str, left_out: str) -> None:
        if left_out:
            name = slug(self.plan.nodes[k].cell)
            self.refused[k] = f"MLflow does not take these metrics of {name}, which the store has: {left_out}"

    def _write_failures(self, done: set[str]) -> int:
        """Fail the runs of cells whose last try failed, and that nobody is trying again now."""
        written = 0
        for k, error in self.store.failures.all().items():
            if k in done or k not in self.plan.nodes:
                continue
            known = self.runs.known().get(k)
            if known is None or (known.status != "RUNNING" and known.tags.get(ERROR) != error[:5000]):
                node = self.plan.nodes[k]
                self._each(k, partial(self.runs.fail, node, error, _traceback(self.store, node)))
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
                self._each(k, partial(self._finish, k))
            else:
                self.runs.cut_off(k)

    def _retire(self) -> None:
        for k, known in self.runs.known().items():
            if k not in self.plan.nodes and known.tags.get(CURRENT) == "yes":
                self.client.set_tag(known.run_id, CURRENT, "no")


def _traceback(store: Store, node: Node) -> str:
    """Of the cell's last try; empty where it was cut off while it was written."""
    try:
        return store.failures.trace(node.ref)
    except (OSError, ValueError, KeyError):
        return ""
