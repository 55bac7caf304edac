"""A grid as MLflow has it, read once: every cell, finished or not, and the invocations."""

import json
import math
from functools import cached_property
from typing import Any

import mlflow
import pandas as pd
import yaml

from ctp.storage.manifest import MANIFEST
from ctp.storage.ref import Ref
from ctp.storage.store import Store
from ctp.tracking.entries import ERROR, KEY, KIND

from .. import roles
from ..results import Results
from ..runs import CELLS, REQUIRED, AnalysisError, artifact, frame, invocations, of_measure, search

FINISHED = "FINISHED"
MANIFESTS = 20  # read at most, for versions
TAGS = {"name": "mlflow.runName", "error": ERROR, "key": KEY, "commit": "ctp.git_commit", "device": "ctp.device",
        "machine": "ctp.machine"}  # fmt: skip
COLUMNS = [*TAGS, "kind", "measure", "model", "status", "end", "seconds", "memory", "run_id"]


class Record:
    """Raises AnalysisError where MLflow has no such grid.

    cells: one row a cell that the grid still has, finished or not: name, kind, measure, model, status, error, key,
    commit, device, machine, end (milliseconds since 1970), seconds and memory (nan where unknown), run_id. calls: one
    row an invocation. rows: the finished cells, as `analysis.runs.finished` gives them. troubles: why measures are
    missing from them, of which a run lacks a number.
    """

    def __init__(self, grid: str) -> None:
        self.grid, self.client = grid, mlflow.MlflowClient()
        runs, calls = search(grid, CELLS), invocations(grid)
        self.text = artifact(calls[0].info.run_id, "grid.yaml")
        self.calls = pd.DataFrame([_call(r) for r in reversed(calls)])
        self.cells = pd.DataFrame([_cell(r) for r in runs], columns=COLUMNS)
        done = [r for r in runs if r.info.status == FINISHED]
        self._metrics: dict[str, dict[str, float]] = {r.info.run_id: r.data.metrics for r in done}
        self.rows, self.troubles = _usable(frame(done), grid)

    @cached_property
    def results(self) -> Results:
        """The finished cells, looked up by entries of the paper."""
        return Results(self.rows, *roles.of_grid(self.text))

    @cached_property
    def description(self) -> str:
        """The grid file's own description; "" where it has none."""
        content = yaml.safe_load(self.text)
        return str(content.get("description") or "") if isinstance(content, dict) else ""

    @property
    def finished(self) -> pd.DataFrame:
        """Those of `cells` that are finished."""
        return self.cells[self.cells.status == FINISHED]

    def measured(self, measure: str) -> pd.DataFrame:
        """The finished rows of one measure, or of "learn"."""
        return self.rows[self.rows.measure == measure]

    def trace(self, run_id: str) -> str:
        """A failed cell's traceback, "" where there is none."""
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


def versions(cells: pd.DataFrame, store: Store) -> list[dict[str, str]]:
    """Python and packages of the cells' manifests, one for each commit, machine and kind; each different set once.

    MLflow does not have them; what cannot be read is left out.
    """
    found: list[dict[str, str]] = []
    finished = cells[cells.status == FINISHED].drop_duplicates(["commit", "machine", "kind"], keep="last")
    for cell in finished.head(MANIFESTS).itertuples():
        try:
            path = f"{store.folder(Ref(str(cell.kind), str(cell.name), str(cell.key)))}/{MANIFEST}"
            manifest = json.loads(store.folders.read(path) or b"")
            some = {"python": str(manifest["python"])} | {str(n): str(v) for n, v in manifest["versions"].items()}
        except Exception:  # whatever the object store's client raises; the numbers do not depend on it
            continue
        if some not in found:
            found.append(some)
    return found


def _usable(rows: pd.DataFrame, grid: str) -> tuple[pd.DataFrame, list[str]]:
    """The rows of those measures whose runs have all their numbers, and what is wrong with the others."""
    troubles = []
    for measure in REQUIRED:
        try:
            of_measure(rows, measure, grid)
        except AnalysisError as e:
            rows = rows[rows.measure != measure]
            troubles.append(f"{measure} is left out: {e}")
    return rows, troubles


def _cell(run: Any) -> dict[str, Any]:
    params, metrics = run.data.params, run.data.metrics
    kind = params.get("kind") or run.data.tags.get(KIND, "")
    return {name: run.data.tags.get(tag, "") for name, tag in TAGS.items()} | {
        "kind": kind, "measure": params.get("measure", kind), "model": params.get("model", ""),
        "status": run.info.status, "end": run.info.end_time or 0, "seconds": metrics.get("seconds", math.nan),
        "memory": metrics.get("peak_memory_bytes", math.nan), "run_id": run.info.run_id,
    }  # fmt: skip


def _call(run: Any) -> dict[str, Any]:
    """seconds: nan while it runs."""
    start, end = run.info.start_time, run.info.end_time
    return {"command": run.data.tags.get("ctp.command", ""), "status": run.info.status.lower(), "start": start,
            "seconds": (end - start) / 1000 if end else math.nan}  # fmt: skip
