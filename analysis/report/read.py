"""What a report says, read from MLflow once: every cell of the grid, finished or not, and who asked for it."""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import mlflow
import pandas as pd
import yaml

from analysis import roles
from analysis.results import Results
from analysis.runs import REQUIRED, AnalysisError, artifact, frame, of_measure
from ctp.storage.manifest import MANIFEST
from ctp.storage.ref import Ref
from ctp.storage.store import Store
from ctp.tracking.entries import CURRENT, ERROR, KEY, KIND, every_run

FINISHED = "FINISHED"
MANIFESTS = 20  # read at most, for versions


@dataclass(frozen=True)
class Cell:
    """A cell's run. start, end: milliseconds since 1970, 0 where unknown. seconds: nan where not told."""

    name: str
    kind: str
    measure: str
    model: str
    status: str
    error: str
    key: str
    commit: str
    device: str
    machine: str
    start: int
    end: int
    seconds: float
    memory: float
    run_id: str


@dataclass(frozen=True)
class Invocation:
    """One call of the grid. seconds: nan while it runs."""

    command: str
    status: str
    start: int
    seconds: float


class Record:
    """A grid as MLflow has it. Raises AnalysisError where it has no such grid.

    cells: all that the grid still has. rows: the finished ones, as `analysis.runs.finished` gives them. troubles: why
    measures are left out of them, of which a run lacks a number.
    """

    def __init__(self, grid: str) -> None:
        self.grid, self.client = grid, mlflow.MlflowClient()
        try:
            experiment = self.client.get_experiment_by_name(grid)
            if experiment is None:
                raise AnalysisError(f"MLflow at {mlflow.get_tracking_uri()} has no experiment {grid!r}")
            own = f"tags.`{CURRENT}` = 'yes' and tags.`{KIND}` != 'grid'"
            runs = every_run(self.client, experiment.experiment_id, own)
            calls = every_run(self.client, experiment.experiment_id, f"tags.`{KIND}` = 'grid'")
        except mlflow.exceptions.MlflowException as e:
            raise AnalysisError(f"MLflow at {mlflow.get_tracking_uri()}: {e}") from e
        if not calls:
            raise AnalysisError(f"{grid}: no run of the grid itself; `ctp track sync {grid}` makes one")
        calls.sort(key=lambda r: r.info.start_time)
        self.invocations = [_invocation(r) for r in calls]
        self.text = artifact(str(calls[-1].info.run_id), "grid.yaml")
        self.cells = [_cell(r) for r in runs]
        done = [r for r in runs if r.info.status == FINISHED]
        self._metrics: dict[str, dict[str, float]] = {r.info.run_id: r.data.metrics for r in done}
        self.rows, self.troubles = _usable(frame(done))

    @cached_property
    def results(self) -> Results:
        """The finished cells, asked by entries of the paper."""
        return Results(self.rows, *roles.of_grid(self.text))

    @cached_property
    def description(self) -> str:
        """What the grid file says of itself; "" where it says nothing."""
        said = yaml.safe_load(self.text)
        return str(said.get("description") or "") if isinstance(said, dict) else ""

    def measured(self, measure: str) -> pd.DataFrame:
        """The finished rows of one measure, or of "learn"."""
        return self.rows[self.rows.measure == measure]

    def json(self, run_id: str, name: str) -> Any:
        """A run's artifact. Raises AnalysisError where it is missing or no JSON."""
        try:
            return json.loads(artifact(run_id, name))
        except ValueError as e:
            raise AnalysisError(f"run {run_id}: {name} is not JSON: {e}") from e

    def trace(self, run_id: str) -> str:
        """A failed cell's traceback, "" where none was kept."""
        try:
            return artifact(run_id, "traceback.txt")
        except AnalysisError:
            return ""

    def metric(self, run_id: str, name: str) -> float:
        """A finished run's metric, nan where it has none; rows hide those whose name is a param's too."""
        return self._metrics[run_id].get(name, math.nan)

    def history(self, run_id: str, metric: str) -> list[tuple[int, float]]:
        """(step, value) of a metric, by step."""
        try:
            return sorted({m.step: m.value for m in self.client.get_metric_history(run_id, metric)}.items())
        except mlflow.exceptions.MlflowException as e:
            raise AnalysisError(f"run {run_id}: {metric}: {e}") from e


def versions(cells: Iterable[Cell], store: Store) -> list[dict[str, str]]:
    """Python and packages of the cells' manifests, one for each commit, machine and kind; each different set once.

    MLflow does not have them; what cannot be read is left out.
    """
    some = {(c.commit, c.machine, c.kind): c for c in cells if c.status == FINISHED}
    found: list[dict[str, str]] = []
    for cell in list(some.values())[:MANIFESTS]:
        try:
            path = f"{store.folder(Ref(cell.kind, cell.name, cell.key))}/{MANIFEST}"
            manifest = json.loads(store.folders.read(path) or b"")
            told = {"python": str(manifest["python"])} | {str(n): str(v) for n, v in manifest["versions"].items()}
        except Exception:  # whatever the object store's client raises; the numbers do not depend on it
            continue
        if told not in found:
            found.append(told)
    return found


def _usable(rows: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """The rows of those measures whose runs are whole, and what is wrong with the others."""
    troubles = []
    for measure in REQUIRED:
        try:
            of_measure(rows, measure)
        except AnalysisError as e:
            rows = rows[rows.measure != measure]
            troubles.append(f"{measure} is left out: {e}")
    return rows, troubles


def _cell(run: Any) -> Cell:
    tags, params, metrics = run.data.tags, run.data.params, run.data.metrics
    kind = params.get("kind") or tags.get(KIND, "")
    return Cell(
        name=tags.get("mlflow.runName", ""), kind=kind, measure=params.get("measure", kind),
        model=params.get("model", ""), status=run.info.status, error=tags.get(ERROR, ""), key=tags.get(KEY, ""),
        commit=tags.get("ctp.git_commit", ""), device=tags.get("ctp.device", ""), machine=tags.get("ctp.machine", ""),
        start=run.info.start_time or 0, end=run.info.end_time or 0,
        seconds=float(metrics.get("seconds", "nan")), memory=float(metrics.get("peak_memory_bytes", "nan")),
        run_id=run.info.run_id,
    )  # fmt: skip


def _invocation(run: Any) -> Invocation:
    start, end = run.info.start_time, run.info.end_time
    seconds = (end - start) / 1000 if end else float("nan")
    return Invocation(run.data.tags.get("ctp.command", ""), run.info.status, start, seconds)
