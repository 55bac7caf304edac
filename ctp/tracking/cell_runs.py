"""What is written into a cell's run: while a prompt is learned, when the cell failed, and all of it once it is done."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from mlflow.entities import Metric, Param, RunTag

from ctp.cells.cell import Evaluate, Learn
from ctp.cells.events import Progress
from ctp.planning.graph import Node, Plan
from ctp.storage.manifest import Manifest
from ctp.storage.store import Store
from ctp.tracking.entries import CURVES, ERROR, PARENT, TOKENS_PER_S, Entry, entry
from ctp.tracking.experiment import Experiment, Run

ATTACHED = 4 * 2**20  # bytes of a file that MLflow gets a copy of
BATCH = 900  # MLflow takes 1,000 metrics a call
PARAMS = 80  # and 100 params, of 1,000 things in all
LIVE = CURVES | {"tokens_per_s": TOKENS_PER_S}
Point = tuple[str, int, float]  # metric, step, value


class CellRuns:
    """Writes the runs of a plan's cells. parent: the run of the invocation that writes, once there is one.

    live: keys of prompts that this process is learning. manifests: JSON of the cells finished here, by key.
    """

    def __init__(self, experiment: Experiment, plan: Plan, store: Store) -> None:
        self.experiment, self.plan, self.store = experiment, plan, store
        self.parent: str | None = None
        self.live: set[str] = set()
        self.manifests: dict[str, str] = {}
        self._curves: dict[str, set[Point]] = {}  # id of a prompt's run -> the points it has, where that is known

    def forget(self) -> None:
        """Read what MLflow has again: a write may or may not have arrived."""
        self.experiment.forget()
        self._curves.clear()

    def start(self, node: Node) -> None:
        """This invocation learns the prompt now."""
        self.live.add(node.key)
        run = self.run(node)
        if self.parent is not None and run.tags.get(PARENT) != self.parent:  # else it would count as a dead one's
            self.experiment.client.set_tag(run.run_id, PARENT, self.parent)
            run.tags[PARENT] = self.parent
        self.experiment.client.update_run(run.run_id, status="RUNNING")
        run.status = "RUNNING"

    def progress(self, events: Sequence[Progress]) -> None:
        """Add points to the curves of prompts that are being learned, as of the times when they were reported."""
        points: dict[str, list[Metric]] = {}
        for event in events:
            numbers = event.numbers()
            points.setdefault(event.key, []).extend(
                Metric(name, float(numbers[n]), int(1000 * event.at), event.step)
                for n, name in LIVE.items()
                if n in numbers
            )
        for k, found in points.items():
            node = self.plan.nodes[k]
            if isinstance(node.cell, Learn):
                run = self.run(node).run_id
                self._log(run, self._new_points(run, found))

    def fail(self, node: Node, error: str, trace: str) -> None:
        """The cell's last attempt failed; trace: the traceback, empty where there is none."""
        run, client = self.run(node), self.experiment.client
        run.tags[ERROR] = error[:5000]
        client.set_tag(run.run_id, ERROR, run.tags[ERROR])
        if trace:
            client.log_text(run.run_id, trace, "traceback.txt")
        self._end(node.key, run, "FAILED")

    def cut_off(self, k: str) -> None:
        """The process that worked on this cell is gone; what it logged stays."""
        self._end(k, self.experiment.runs()[k], "KILLED")

    def finish(self, node: Node) -> tuple[str, ...]:
        """Write everything about a finished cell, in few requests: there may be thousands of short cells.

        Returns the metrics that MLflow does not accept.
        """
        manifest = self.store.manifest(node.ref)
        found = entry(self.experiment.name, node, manifest, self._history(node, manifest))
        known = self.experiment.runs().get(node.key)
        run = known or self._create(found)
        run.tags |= found.tags
        metrics = [Metric(n, v, found.end, step) for n, v, step in found.metrics]
        if isinstance(node.cell, Learn):
            metrics = self._new_points(run.run_id, metrics)
        elif isinstance(node.cell, Evaluate):
            self._log_files(node, run.run_id, manifest["files"])
        self._log(run.run_id, metrics, found.params, found.tags if known else {})
        if run.tags.pop(ERROR, None) is not None:
            self.experiment.client.delete_tag(run.run_id, ERROR)
        self._end(node.key, run, "FINISHED", found.end)
        self.manifests[node.key] = json.dumps(manifest)
        return found.left_out

    def run(self, node: Node) -> Run:
        """The cell's run, made with its settings where there is none."""
        if known := self.experiment.runs().get(node.key):
            return known
        found = entry(self.experiment.name, node)
        run = self._create(found)
        self._log(run.run_id, params=found.params)
        return run

    def _create(self, found: Entry) -> Run:
        run = self.experiment.create(found.start, found.tags | ({PARENT: self.parent} if self.parent else {}))
        self._curves[run.run_id] = set()
        return run

    def _end(self, k: str, run: Run, status: str, at: int | None = None) -> None:
        """at: milliseconds since 1970, None for now."""
        self.experiment.client.set_terminated(run.run_id, status, at)
        run.status = status
        self.live.discard(k)
        self._curves.pop(run.run_id, None)

    def _log(self, run: str, metrics: Sequence[Metric] = (), params: Mapping[str, str] | None = None,
             tags: Mapping[str, str] | None = None) -> None:  # fmt: skip
        """In as few requests as MLflow's limits allow."""
        settings = [Param(n, v) for n, v in (params or {}).items()]
        marks = [RunTag(n, v) for n, v in (tags or {}).items()]
        for i in range(max(math.ceil(len(metrics) / BATCH), math.ceil(len(settings) / PARAMS))):
            batch, some = metrics[i * BATCH :][:BATCH], settings[i * PARAMS :][:PARAMS]
            self.experiment.client.log_batch(run, metrics=batch, params=some, tags=[] if i else marks)

    def _new_points(self, run: str, points: list[Metric]) -> list[Metric]:
        """Those that the run lacks: a resumed learner passes the same steps again, and the history of a finished
        prompt repeats what was reported on the way."""
        if run not in self._curves:
            there = (m for name in CURVES.values() for m in self.experiment.client.get_metric_history(run, name))
            self._curves[run] = {_point(m) for m in there}
        new = {_point(m): m for m in points if _point(m) not in self._curves[run]}
        self._curves[run] |= new.keys()
        return list(new.values())

    def _history(self, node: Node, manifest: Manifest) -> list[dict[str, Any]]:
        """Of learning, by step."""
        if not isinstance(node.cell, Learn) or "history.json" not in manifest["files"]:
            return []
        found: list[dict[str, Any]] = json.loads((self.store.fetch(node.ref) / "history.json").read_text())["history"]
        return found

    def _log_files(self, node: Node, run: str, files: dict[str, Any]) -> None:
        """Attach an evaluation's answers, single timings and nearest words: analysis reads MLflow alone."""
        small = [n for n, f in files.items() if n.endswith(".json") and f["size"] <= ATTACHED]
        if small != ["result.json"]:  # whose numbers are metrics already
            folder = self.store.fetch(node.ref)
            for name in small:
                self.experiment.client.log_artifact(run, str(folder / name))


def _point(metric: Metric) -> Point:
    return metric.key, metric.step, metric.value
