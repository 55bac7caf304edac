"""What is written of a cell into its MLflow run: as it is learned, when it failed, and all there is once it is done."""

import json
from typing import Any

from mlflow.entities import Metric, Param, RunTag

from ctp.cells.cell import Evaluate, Learn
from ctp.cells.events import Progress
from ctp.planning.graph import Node, Plan
from ctp.storage.store import Store
from ctp.tracking.entries import CURVES, ERROR, PARENT, TOKENS_PER_S, entry, settings, tags
from ctp.tracking.runs import Known, Runs

ATTACHED = 4 * 2**20  # bytes of a file that MLflow gets a copy of
BATCH = 900  # MLflow takes 1,000 metrics a call
PARAMS = 80  # and 100 params, of 1,000 things in all
Point = tuple[str, int, float]  # metric, step, value


class CellRuns(Runs):
    """The runs of a plan's cells. parent: the run of the invocation that writes, once there is one.

    live: keys of prompts that are being learned now, for all that was written. manifests: of the cells that were
    finished here, as JSON by their keys.
    """

    def __init__(self, uri: str, plan: Plan, store: Store) -> None:
        super().__init__(uri, plan.name)
        self.plan, self.store = plan, store
        self.parent: str | None = None
        self.live: set[str] = set()
        self.manifests: dict[str, str] = {}
        self._curves: dict[str, set[Point]] = {}  # key of a prompt -> what its curves have, where that is known

    def forget(self) -> None:
        super().forget()
        self._curves.clear()

    def start(self, node: Node) -> None:
        """The prompt is being learned, by this invocation."""
        self.live.add(node.key)
        run = self.run(node)
        if self.parent is not None and run.tags.get(PARENT) != self.parent:  # else it would pass for a dead one's
            self.client.set_tag(run.run_id, PARENT, self.parent)
            run.tags[PARENT] = self.parent
        self.client.update_run(run.run_id, status="RUNNING")
        run.status = "RUNNING"

    def cut_off(self, k: str) -> None:
        """Whoever was at this cell is no more; what it had logged stays."""
        known = self.known()[k]
        self.client.set_terminated(known.run_id, "KILLED")
        known.status = "KILLED"
        self.live.discard(k)

    def progress(self, events: list[Progress]) -> None:
        """Curves of prompts that are being learned, with points as of when they were reported."""
        metrics: dict[str, list[Metric]] = {}
        for event in events:
            if not isinstance(self.plan.nodes[event.key].cell, Learn):
                continue
            numbers, names = event.numbers(), CURVES | {"tokens_per_s": TOKENS_PER_S}
            metrics.setdefault(event.key, []).extend(
                Metric(name, float(numbers[n]), int(1000 * event.at), event.step)
                for n, name in names.items()
                if n in numbers
            )
        for k, found in metrics.items():
            run = self.run(self.plan.nodes[k])
            self._log(run.run_id, self._lacking(k, run.run_id, found))

    def _lacking(self, k: str, run: str, points: list[Metric]) -> list[Metric]:
        """Those that the run's curves do not have: whoever goes on from a saved state passes the same steps again, and
        the history of a finished prompt has what was told on the way."""
        if k not in self._curves:
            there = (m for name in CURVES.values() for m in self.client.get_metric_history(run, name))
            self._curves[k] = {_point(m) for m in there}
        new = {_point(m): m for m in points if _point(m) not in self._curves[k]}
        self._curves[k] |= new.keys()
        return list(new.values())

    def _log(self, run: str, metrics: list[Metric], keep: int = 0) -> list[Metric]:
        """Log them, but for the last of at most `keep` that one more call takes; returns those."""
        while len(metrics) > keep:
            self.client.log_batch(run, metrics=metrics[:BATCH])
            metrics = metrics[BATCH:]
        return metrics

    def fail(self, node: Node, error: str, trace: str) -> None:
        """The cell's last try failed; trace: the traceback, empty where there is none."""
        run = self.run(node)
        run.tags |= {ERROR: error[:5000]}
        self.client.set_tag(run.run_id, ERROR, run.tags[ERROR])
        if trace:
            self.client.log_text(run.run_id, trace, "traceback.txt")
        self.client.set_terminated(run.run_id, "FAILED")
        run.status = "FAILED"
        self.live.discard(node.key)

    def run(self, node: Node) -> Known:
        """The cell's run, made with its settings where there is none."""
        if node.key not in self.known():
            run = self._create(node, None, {})
            self._log_params(run.run_id, _params(node), keep=0)
        return self.known()[node.key]

    def _create(self, node: Node, start: int | None, more: dict[str, str]) -> Known:
        """A new run of the cell. start: milliseconds since 1970, None for now."""
        own = tags(self.plan.name, node) | more | ({PARENT: self.parent} if self.parent else {})
        if isinstance(node.cell, Learn):
            self._curves[node.key] = set()
        return self.create(node.key, start, own)

    def _log_params(self, run: str, params: list[Param], keep: int) -> list[Param]:
        """Log them, but for the last of at most `keep` that one more call takes; returns those."""
        while len(params) > keep:
            self.client.log_batch(run, params=params[:PARAMS])
            params = params[PARAMS:]
        return params

    def finish(self, node: Node) -> tuple[str, ...]:
        """Write all there is to say of a finished cell, in few requests: there may be thousands of short cells.

        Returns the metrics that MLflow does not take.
        """
        manifest = self.store.manifest(node.ref)
        history = []
        if isinstance(node.cell, Learn) and "history.json" in manifest["files"]:
            history = json.loads((self.store.fetch(node.ref) / "history.json").read_text())["history"]
        found, new = entry(node, manifest, history), node.key not in self.known()
        run = self._create(node, found.start, found.tags) if new else self.known()[node.key]
        run.tags |= found.tags
        if isinstance(node.cell, Evaluate):
            self._log_files(node, run.run_id, manifest["files"])
        metrics = [Metric(n, v, found.end, step) for n, v, step in found.metrics]
        if isinstance(node.cell, Learn):
            metrics = self._lacking(node.key, run.run_id, metrics)
            del self._curves[node.key]
        last = self._log(run.run_id, metrics, keep=BATCH)
        written = () if new else [RunTag(n, v) for n, v in found.tags.items()]
        left = self._log_params(run.run_id, _params(node), keep=PARAMS)
        self.client.log_batch(run.run_id, metrics=last, params=left, tags=written)
        if run.tags.pop(ERROR, None) is not None:
            self.client.delete_tag(run.run_id, ERROR)
        self.client.set_terminated(run.run_id, "FINISHED", found.end)
        run.status = "FINISHED"
        self.live.discard(node.key)
        self.manifests[node.key] = json.dumps(manifest)
        return found.left_out

    def _log_files(self, node: Node, run: str, files: dict[str, Any]) -> None:
        """An evaluation's answers, single timings, nearest words as artifacts: MLflow alone tells it all."""
        small = [n for n, f in files.items() if n.endswith(".json") and f["size"] <= ATTACHED]
        if small != ["result.json"]:  # whose numbers are metrics already
            folder = self.store.fetch(node.ref)
            for name in small:
                self.client.log_artifact(run, str(folder / name))


def _point(metric: Metric) -> Point:
    return metric.key, metric.step, metric.value


def _params(node: Node) -> list[Param]:
    return [Param(n, v) for n, v in settings(node).items()]
