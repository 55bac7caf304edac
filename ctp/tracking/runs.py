"""One grid's experiment in MLflow: every cell has one run, whoever writes, and none is left running by the dead.

MLflow cannot find or create in one step, so that two writers may both make a run of a cell. Of several the one with the
least id stays: a rule by which any number of writers keep the same one, whatever each of them has seen.
"""

import logging
import os
import sqlite3
from collections.abc import Collection, Iterable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow.exceptions import MlflowException
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
from mlflow.tracking import MlflowClient
from requests import RequestException

from ctp.machine.process import is_alive, last_sign
from ctp.tracking import database
from ctp.tracking.entries import KEY, KIND, PARENT, SYNCED, TrackError, every_run, sqlite_file, sqlite_uri

os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # the default waits four minutes for a dead server
os.environ.setdefault("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "1")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

for _name in ("alembic", "mlflow.store.db.utils"):  # they tell of every table they make
    logging.getLogger(_name).setLevel(logging.WARNING)

FEW = 50  # cells that are asked for one by one


@dataclass
class Known:
    """A cell's run as MLflow has it."""

    run_id: str
    status: str
    tags: dict[str, str]


class Runs:
    """The runs of the experiment called `name`. Whatever MLflow's client raises is passed on, but by the constructor:
    TrackError."""

    def __init__(self, uri: str, name: str) -> None:
        self.uri, self.name, self.file = uri, name, sqlite_file(uri)
        self.rebuilt = database.set_aside(self.file) if self.file and self.file.exists() else ""  # what to say of it
        try:
            try:
                self._connect(anew=bool(self.rebuilt))
            except TrackError:
                raise
            except Exception:
                if not self.renew():
                    raise
        except TrackError:
            raise
        except Exception as e:  # whatever the client raises: sqlite, HTTP, its own
            raise TrackError(f"MLflow at {uri} cannot be reached: {type(e).__name__}: {first_line(e)}") from e

    def _connect(self, anew: bool) -> None:
        """anew: connections that this process still has are to a file that is gone."""
        if anew and (engine := SqlAlchemyStore._engine_map.get(self.uri)):
            engine.dispose()
        self.client, self.experiment, self.synced = _open(self.uri, self.name)
        self.opened = database.mark(self.file)
        self.checked: set[str] = set()  # keys of finished cells that an earlier invocation found in order
        self.created: set[str] = set()  # keys of cells whose run is made here
        self._known: dict[str, Known] | None = None  # key -> run, but for those in `checked`

    def renew(self) -> str:
        """What has happened to the SQLite file, if it is lost; then there is a new one. Empty where it is not.

        It is lost where it was removed or replaced since it was opened, or is damaged, which is then moved aside.
        """
        if self.file is None:
            return ""
        said = database.set_aside(self.file, whole=True)
        if not said and database.mark(self.file) == self.opened:
            return ""
        self._connect(anew=True)
        self.checked, self.created, self._known = set(), set(), None
        self.rebuilt = said or f"MLflow's database {self.file} was removed or replaced while it was in use"
        return self.rebuilt

    def answers(self) -> None:
        """Raise what the client raises where MLflow is away."""
        self.client.search_runs([self.experiment], "", max_results=1)

    def known(self) -> dict[str, Known]:
        """Every run of a cell by its key, read when it is first needed; only unfinished ones where the others are
        checked."""
        if self._known is None:
            which = f"tags.`{KIND}` != 'grid'" + (" and attributes.status != 'FINISHED'" if self.checked else "")
            self._known = self._one_each(every_run(self.client, self.experiment, which))
        return self._known

    def forget(self) -> None:
        """Something went wrong, and what MLflow has is to be read anew."""
        self._known = None

    def has(self, k: str) -> bool:
        """Is there a finished run of the cell with this key?"""
        which = f"tags.`{KEY}` = '{k}' and attributes.status = 'FINISHED'"
        return bool(self.client.search_runs([self.experiment], which, max_results=1))

    def create(self, k: str, start: int | None, tags: dict[str, str]) -> Known:
        """A new run of the cell with this key. start: milliseconds since 1970, None for now."""
        known = self.known()
        self.created.add(k)
        made = self.client.create_run(self.experiment, start_time=start, tags=tags)
        known[k] = Known(made.info.run_id, "RUNNING", tags)
        return known[k]

    def settle(self, keys: Collection[str]) -> None:
        """Look these cells up again, and delete what is there twice."""
        if len(keys) > FEW:
            self.checked = set()  # or only unfinished ones would be read
            self.forget()
            self.known()
        elif keys:
            found = [r for k in keys for r in every_run(self.client, self.experiment, f"tags.`{KEY}` = '{k}'")]
            self.known().update(self._one_each(found))

    def orphans(self) -> list[Any]:
        """Runs that say RUNNING, and are neither of a living invocation nor one."""
        runs = every_run(self.client, self.experiment, "attributes.status = 'RUNNING'")
        living = {
            r.info.run_id
            for r in runs
            if r.data.tags.get(KIND) == "grid" and is_alive(r.data.tags, r.info.start_time / 1000)
        }
        return [r for r in runs if not living & {r.info.run_id, r.data.tags.get(PARENT)}]

    def end_invocation(self, run: Any) -> None:
        """The invocation of this run is dead: since its last sign of life."""
        ended = int(1000 * last_sign(run.data.tags, run.info.start_time / 1000))
        self.client.set_terminated(run.info.run_id, "KILLED", ended)

    def mark(self, said: str) -> None:
        """Have the experiment say what it was brought up to date with."""
        if said != self.synced:
            self.client.set_experiment_tag(self.experiment, SYNCED, said)
            self.synced = said

    def _one_each(self, runs: Iterable[Any]) -> dict[str, Known]:
        found: dict[str, Known] = {}
        for run in sorted(runs, key=lambda r: r.info.run_id):
            k = run.data.tags[KEY]
            if k in found:
                self.client.delete_run(run.info.run_id)
            else:
                found[k] = Known(run.info.run_id, run.info.status, run.data.tags)
        return found


def away(e: BaseException | None) -> bool:
    """Does this say that MLflow cannot be reached, and nothing of what it was given?"""
    while e is not None:
        if isinstance(e, ConnectionError | TimeoutError | RequestException):
            return True
        e = e.__cause__ or e.__context__
    return False


def first_line(e: BaseException) -> str:
    return (str(e).strip().splitlines() or [""])[0][:300]


def _open(uri: str, name: str) -> tuple[MlflowClient, str, str]:
    """Client, experiment id, and what the experiment says it was brought up to date with."""
    artifacts = None
    if (file := sqlite_file(uri)) is not None:
        _make_database(file)
        artifacts = (file.parent / "mlartifacts" / name).absolute().as_uri()
    client = MlflowClient(tracking_uri=uri)
    known = client.get_experiment_by_name(name)
    if known is None:
        try:
            return client, client.create_experiment(name, artifact_location=artifacts), ""
        except MlflowException:
            known = client.get_experiment_by_name(name)  # another driver made it just now
            if known is None:
                raise
    if known.lifecycle_stage == "deleted":
        raise TrackError(
            f"MLflow at {uri}: the experiment {name!r} was deleted and keeps its name: `mlflow experiments restore -x "
            f"{known.experiment_id}` brings it back, `mlflow gc --experiment-ids {known.experiment_id}` removes it"
        )
    return client, known.experiment_id, known.tags.get(SYNCED, "")


def _make_database(file: Path) -> None:
    """A new SQLite file, made by one process while others wait, in WAL mode (three times as fast).

    MLflow needs a second for its tables and cannot go on with half of them, so that the file gets its name when it is
    whole: who is killed before leaves nothing that the next one would read.
    """
    if file.exists():
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    with database.locked(file.parent):
        if not file.exists():
            new = file.with_name(f"{file.name}.making")
            for leftover in file.parent.glob(f"{new.name}*"):
                leftover.unlink()
            store = SqlAlchemyStore(sqlite_uri(new), (file.parent / "mlartifacts").absolute().as_uri())
            store.engine.dispose()
            with closing(sqlite3.connect(new)) as db:
                db.execute("PRAGMA journal_mode=WAL")
            database.clear(file)
            new.rename(file)
