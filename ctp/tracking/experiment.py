"""One grid's experiment in MLflow, in which every cell has one run, however many processes write.

MLflow cannot find or create in one step, so that two writers may both make a run of a cell. Of several the one with the
smallest id stays: a rule by which all writers keep the same one, whatever each of them has seen.
"""

import logging
import os
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from mlflow.entities import Run as MlflowRun
from mlflow.exceptions import MlflowException
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
from mlflow.tracking import MlflowClient
from requests import RequestException

from ctp.machine.process import is_alive, last_sign
from ctp.tracking import database
from ctp.tracking.entries import KEY, KIND, PARENT, SYNCED, TrackError, every_run, sqlite_file

os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # the default waits four minutes for a dead server
os.environ.setdefault("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "1")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

for _name in ("alembic", "mlflow.store.db.utils"):  # they report every table they make
    logging.getLogger(_name).setLevel(logging.WARNING)

FEW = 50  # cells that are looked up one by one


@dataclass
class Run:
    """A cell's run as MLflow has it."""

    run_id: str
    status: str
    tags: dict[str, str]


class Experiment:
    """The experiment called `name`. The constructor raises TrackError, all else what MLflow's client raises."""

    def __init__(self, uri: str, name: str) -> None:
        self.uri, self.name, self.file = uri, name, sqlite_file(uri)
        self.rebuilt = database.set_aside(self.file) if self.file and self.file.exists() else ""  # for the user
        try:
            try:
                self._connect(anew=bool(self.rebuilt))
            except Exception as e:
                if isinstance(e, TrackError) or not self.renew():
                    raise
        except TrackError:
            raise
        except Exception as e:  # whatever the client raises: sqlite, HTTP, its own
            raise TrackError(f"MLflow at {uri} cannot be reached: {type(e).__name__}: {first_line(e)}") from e

    def _connect(self, anew: bool) -> None:
        """anew: connections that this process still has are to a file that is gone."""
        if anew and (engine := SqlAlchemyStore._engine_map.get(self.uri)):
            engine.dispose()
        self.client, self.id, self.synced = _open(self.uri, self.name)
        self.opened = database.mark(self.file)
        self.checked: set[str] = set()  # keys of finished cells that an earlier invocation found in order
        self.created: set[str] = set()  # keys of cells whose run is made here
        self._runs: dict[str, Run] | None = None  # key -> run, without those in `checked`

    def renew(self) -> str:
        """Replace a lost SQLite file by a new one; returns what happened to it, empty where it is not lost.

        It is lost where it was removed or replaced since it was opened, or is damaged, which is then moved aside.
        """
        if self.file is None:
            return ""
        damaged = database.set_aside(self.file, whole=True)
        if not damaged and database.mark(self.file) == self.opened:
            return ""
        self._connect(anew=True)
        self.rebuilt = damaged or f"MLflow's database {self.file} was removed or replaced while it was in use"
        return self.rebuilt

    def runs(self) -> dict[str, Run]:
        """Every run of a cell by its key, read when first needed; only unfinished ones where the others are checked."""
        if self._runs is None:
            which = f"tags.`{KIND}` != 'grid'" + (" and attributes.status != 'FINISHED'" if self.checked else "")
            self._runs = self._one_each(every_run(self.client, self.id, which))
        return self._runs

    def forget(self) -> None:
        """Read the runs again when they are next needed."""
        self._runs = None

    def any(self, which: str = "") -> bool:
        """Is there a run that this filter of MLflow's selects? Raises what the client raises where MLflow is away."""
        return bool(self.client.search_runs([self.id], which, max_results=1))

    def create(self, start: int | None, tags: dict[str, str]) -> Run:
        """A new run of the cell that the tags name. start: milliseconds since 1970, None for now."""
        runs = self.runs()
        self.created.add(tags[KEY])
        made = self.client.create_run(self.id, start_time=start, tags=tags)
        runs[tags[KEY]] = Run(made.info.run_id, "RUNNING", dict(tags))
        return runs[tags[KEY]]

    def settle(self, keys: Collection[str]) -> None:
        """Look these cells up again, and delete what is there twice."""
        if len(keys) > FEW:
            self.checked = set()  # or only unfinished ones would be read
            self.forget()
            self.runs()
        elif keys:
            found = [r for k in keys for r in every_run(self.client, self.id, f"tags.`{KEY}` = '{k}'")]
            self.runs().update(self._one_each(found))

    def orphans(self) -> list[MlflowRun]:
        """Runs that say RUNNING, of invocations that are no longer alive: their own, and those of their cells."""
        runs = every_run(self.client, self.id, "attributes.status = 'RUNNING'")
        living = {
            r.info.run_id
            for r in runs
            if r.data.tags.get(KIND) == "grid" and is_alive(r.data.tags, r.info.start_time / 1000)
        }
        return [r for r in runs if not living & {r.info.run_id, r.data.tags.get(PARENT)}]

    def end_invocation(self, run: MlflowRun) -> None:
        """End the run of a dead invocation, as of its last sign of life."""
        ended = int(1000 * last_sign(run.data.tags, run.info.start_time / 1000))
        self.client.set_terminated(run.info.run_id, "KILLED", ended)

    def mark(self, synced: str) -> None:
        """Note in the experiment what it was brought up to date with."""
        if synced != self.synced:
            self.client.set_experiment_tag(self.id, SYNCED, synced)
            self.synced = synced

    def _one_each(self, runs: Iterable[MlflowRun]) -> dict[str, Run]:
        found: dict[str, Run] = {}
        for run in sorted(runs, key=lambda r: r.info.run_id):
            k = run.data.tags[KEY]
            if k in found:
                self.client.delete_run(run.info.run_id)
            else:
                found[k] = Run(run.info.run_id, run.info.status, run.data.tags)
        return found


def is_away(e: BaseException | None) -> bool:
    """Does the error say that MLflow cannot be reached, and not that it refused what it was given?"""
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
        database.make(file)
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
