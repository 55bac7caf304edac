"""The only file that knows Ray: one Tuner over the whole graph, a searcher that walks it, resources per trial.

A trial is a task: one Compress or Learn cell, or several Evaluate cells of one target, whose model is then loaded once.
The searcher hands a task out when its inputs are in the store. The store is the resume: every start is a fresh Tuner
over what is missing. Errors of a cell are caught in the trial and reported; Tune's retries are for machines that die.
"""

import json
import logging
import math
import os
import socket
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from ctp import cost, plugins
from ctp.labels import slug
from ctp.plan import Plan, runnable
from ctp.resources import BUSY, Resources, alone, bundles
from ctp.spec import Evaluate, Runtime, from_json, key, to_json
from ctp.store import Store

# Tune reads these when it is imported. Its own progress tables and result files are not for thousands of short trials.
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import ray
from ray import tune
from ray.tune.search import Searcher

WORKER_DIED = "its worker died (out of memory, or the machine went away) and so did the retries"
Event = dict[str, Any]


class ResourceError(Exception):
    """There is no cluster at the address, or a cell asks for more than any machine in it has."""


@dataclass
class Outcome:
    """How a run ended: key -> reason for what failed or was skipped; `unfinished` was neither (interrupted).

    errors: what Ray says of trials whose worker died.
    """

    done: set[str] = field(default_factory=set)
    failed: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    unfinished: set[str] = field(default_factory=set)
    errors: list[str] = field(default_factory=list)


class GraphSearch(Searcher):
    """Walks the graph: suggests tasks whose inputs are done, learns from reports what that makes ready."""

    def __init__(self, plan: Plan, todo: set[str], done: set[str], slots: int, resources: dict[str, dict[str, float]],
                 on_event: Callable[[Event], None], fail_fast: bool) -> None:  # fmt: skip
        super().__init__()
        self.plan, self.slots, self.resources, self.on_event = plan, slots, resources, on_event
        self.fail_fast, self.stopped = fail_fast, False
        self.outcome = Outcome()
        self.skip(runnable(plan, todo, done))
        self.waiting = {k for k in plan.nodes if k in todo and k not in self.outcome.skipped}
        self.finished = set(done)
        self.tasks: dict[str, list[str]] = {}
        self.current: dict[str, str] = {}  # trial -> the cell that it said it had started
        self.own = {k: cost.of(n.cell, n.facts).flops for k, n in plan.nodes.items()}
        rank = _ranks(plan, {k: self.own[k] for k in self.waiting})
        self.order = {k: (-rank[k][0], -rank[k][1], i) for i, k in enumerate(plan.nodes)}

    def set_search_properties(self, *args: Any, **kwargs: Any) -> bool:
        return True

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        task = [] if self.stopped else self._next_task()
        if task:
            self.waiting.difference_update(task)
            self.tasks[trial_id] = task
            cells = [to_json(self.plan.nodes[k].cell) | {"key": k} for k in task]
            return {"cells": json.dumps(cells), "bundle": self.resources[task[0]]}
        return None if self.tasks else Searcher.FINISHED

    def _next_task(self) -> list[str]:
        ready = [k for k in self.waiting if all(i in self.finished for i in self.plan.nodes[k].inputs)]
        if not ready:
            return []
        ready.sort(key=self.order.__getitem__)
        cell = self.plan.nodes[ready[0]].cell
        if not isinstance(cell, Evaluate):
            return [] if self._hold(ready[0]) else ready[:1]
        others = (self.plan.nodes[k].cell for k in ready)
        mates = [
            k
            for k, c in zip(ready, others, strict=True)
            if isinstance(c, Evaluate) and c.target == cell.target and alone(c) == alone(cell)
        ]
        # Target and prompt: what a prompt is asked comes in a row, and its rows go through the model once.
        turn = {inputs: i for i, inputs in enumerate(dict.fromkeys(self.plan.nodes[k].inputs for k in mates))}
        mates.sort(key=lambda k: turn[self.plan.nodes[k].inputs])
        return mates[: math.ceil(len(ready) / self.slots)]  # no slot idles while another has all the rest

    def _hold(self, k: str) -> bool:
        """Hours of learning are not begun while what a longer path begins with is still running, for minutes."""
        running = (i for task in self.tasks.values() for i in task if i not in self.finished)
        return self.own[k] >= BUSY and any(self.order[i] < self.order[k] and self.own[i] < BUSY for i in running)

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        k, event = result.get("key"), result.get("event")
        if k is None or k in self.finished or (event != "done" and k in self.outcome.failed):
            return  # Tune repeats a trial's last report when the trial ends
        if event == "start":
            self.current[trial_id] = k
        elif event == "done":
            self.finished.add(k)
            self.outcome.done.add(k)
            self.outcome.failed.pop(k, None)
        elif event == "failed":
            self._fail(k, result["error"])
        self.on_event(result)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        if result:
            self.on_trial_result(trial_id, result)
        left = [k for k in self.tasks.pop(trial_id, []) if k not in self.finished and k not in self.outcome.failed]
        if not error or not left:
            return
        # Only the cell that it died on has failed; those that travelled with it go to another worker.
        culprit = self.current[trial_id] if self.current.get(trial_id) in left else left[0]
        self.waiting.update(k for k in left if k != culprit)
        self._fail(culprit, WORKER_DIED)
        self.on_event({"event": "failed", "key": culprit, "error": WORKER_DIED})

    def _fail(self, k: str, error: str) -> None:
        self.outcome.failed[k] = error
        self.stopped = self.stopped or self.fail_fast
        blocked = runnable(self.plan, self.waiting, self.finished | set().union(*self.tasks.values(), set()) - {k})
        self.skip(blocked)
        self.waiting.difference_update(blocked)

    def skip(self, blocked: Any) -> None:
        self.outcome.skipped.update(blocked)
        for k, reason in blocked.items():
            self.on_event({"event": "skipped", "key": k, "error": reason})

    def __getstate__(self) -> dict[str, Any]:
        """Tune pickles its searcher to restore it later; this one is never restored."""
        return {}

    def save(self, checkpoint_path: str) -> None:
        """Nothing to save: the store is the state."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing to restore."""


def _ranks(plan: Plan, own: Mapping[str, float]) -> dict[str, tuple[float, int]]:
    """The longest path from each cell to the end: operations of what is still to be done, then cells behind it.

    Handing out the largest first (Graham 1969) leaves short cells for the end, when machines would wait for a long one.
    """
    rank: dict[str, tuple[float, int]] = {}
    behind = dict.fromkeys(plan.nodes, (0.0, 0))
    for k in reversed(plan.nodes):
        rank[k] = own.get(k, 0.0) + behind[k][0], behind[k][1]
        for i in plan.nodes[k].inputs:
            behind[i] = max(behind[i], (rank[k][0], rank[k][1] + 1))
    return rank


# ------------------------------------------------------------------------ running


def run(plan: Plan, todo: set[str], done: set[str], *, store: str, runtime: Runtime, resources: Resources,
        address: str | None, fail_fast: bool, on_event: Callable[[Event], None]) -> Outcome:  # fmt: skip
    """Run the cells in `todo`. Raises ResourceError before anything starts where a cell fits no machine."""
    with _cluster(address) as total:
        bundles = _bundles(plan, resources, total.get("GPU", 0) > 0 and runtime.device != "cpu", runtime.batch)
        if runtime.device == "cuda" and not total.get("GPU"):
            raise ResourceError("--device cuda, but no machine here has a GPU")
        _check(plan, todo, bundles)
        slots = max(1, int(total.get("CPU", 1) // resources.cpus))
        if total.get("GPU", 0) and todo:
            slots = max(1, min(slots, int(total["GPU"] / max(bundles[k].get("GPU", 1) for k in todo))))
        search = GraphSearch(plan, todo, done, slots, bundles, on_event, fail_fast)
        os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(slots + 1)
        with tempfile.TemporaryDirectory(prefix="ctp-tune-") as scratch:
            tuner = tune.Tuner(
                tune.with_resources(
                    tune.with_parameters(_trial, store=store, runtime=runtime.model_dump(mode="json")),
                    lambda config: tune.PlacementGroupFactory([config["bundle"]]),
                ),
                tune_config=tune.TuneConfig(search_alg=search, num_samples=max(1, len(todo)), reuse_actors=True),
                run_config=tune.RunConfig(
                    storage_path=scratch, verbose=0, failure_config=tune.FailureConfig(max_failures=2)
                ),
            )
            results = tuner.fit()
    outcome = search.outcome
    outcome.errors = [str(e).strip() for e in results.errors]
    ended = outcome.done | set(outcome.failed) | set(outcome.skipped)
    outcome.unfinished = todo - ended
    return outcome


def _trial(config: dict[str, Any], store: str, runtime: dict[str, Any]) -> None:
    """One task, in a worker: its cells in turn, each reported as it starts, goes on, and ends."""
    place, how, tasks = Store(store), Runtime.model_validate(runtime), json.loads(config["cells"])
    try:
        plugins.load(how.plugins)
    except Exception as e:  # one that this machine cannot run is no reason to say that the machine died
        for data in tasks:
            error = f"plugins: {type(e).__name__}: {e}"
            tune.report({"event": "failed", "key": data["key"], "error": error, "traceback": traceback.format_exc()})
        return
    for data in tasks:
        cell = from_json(data)
        k = key(cell)
        tune.report({"event": "start", "key": k})
        try:
            from ctp.work import execute  # torch and transformers: in workers only

            execute(cell, place, how, _throttled(k))
        except Exception as e:  # whatever went wrong is this cell's failure, and only this cell's
            error = f"{type(e).__name__}: {e}".strip()
            trace = traceback.format_exc()
            _keep_failure(place, cell, error, trace)
            tune.report({"event": "failed", "key": k, "error": error, "traceback": trace})
        else:
            tune.report({"event": "done", "key": k})


def _keep_failure(place: Any, cell: Any, error: str, trace: str) -> None:
    try:
        place.record_failure(cell, error, trace)
    except Exception:  # a store that is gone is no reason to lose the error itself
        logging.getLogger(__name__).warning("the failure of %s could not be stored", slug(cell))


def _throttled(k: str, seconds: float = 1.0) -> Callable[[dict[str, Any]], None]:
    """Reports of a cell, at most one a second but for those with a validation loss."""
    last = 0.0

    def report(numbers: dict[str, Any]) -> None:
        nonlocal last
        if time.monotonic() - last >= seconds or "val_loss" in numbers:
            last = time.monotonic()
            tune.report({**numbers, "event": "progress", "key": k})

    return report


def _bundles(plan: Plan, resources: Resources, gpus: bool, batch: int) -> dict[str, dict[str, float]]:
    """What each cell's trial takes. A cell that must run alone gets all the cores of the smallest machine."""
    machines = [n["Resources"].get("CPU", 0) for n in ray.nodes() if n["Alive"]]
    cores = min((n for n in machines if n >= resources.cpus), default=resources.cpus)  # a head may run no trials
    return bundles(plan, resources, gpus, batch, cores)


def _check(plan: Plan, todo: set[str], bundles: dict[str, dict[str, float]]) -> None:
    """Tune would wait for ever for a bundle that no node can give."""
    nodes = [n["Resources"] for n in ray.nodes() if n["Alive"]]
    for k in todo:
        bundle = bundles[k]
        if not any(all(have.get(name, 0) >= want for name, want in bundle.items()) for have in nodes):
            have = [{name: n.get(name, 0) for name in ("CPU", "GPU")} for n in nodes]
            raise ResourceError(
                f"{slug(plan.nodes[k].cell)} needs {bundle}, and no node has it: {have}. --cpus sets the cores a trial "
                "takes, --gpu-memory says how large a GPU is"
            )


@contextmanager
def _cluster(address: str | None) -> Iterator[dict[str, float]]:
    """The cluster at `address`, or one of this machine's own; yields its resources in all."""
    for name in ("ray", "ray.tune", "ray.train"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    own: dict[str, Any] = {} if address else {"include_dashboard": False, "object_store_memory": 256 * 2**20}
    try:
        _knock(address)
        ray.init(address=address or "local", log_to_driver=False, logging_level=logging.CRITICAL, **own)
    except (OSError, RuntimeError, ValueError) as e:
        raise ResourceError(f"no Ray cluster at {address or 'this machine'}: {type(e).__name__}: {e}") from e
    try:
        yield ray.cluster_resources()
    finally:
        ray.shutdown()


def _knock(address: str | None) -> None:
    """Ray itself tries a dead address for minutes. Raises OSError where nobody listens."""
    host, colon, port = (address or "").removeprefix("ray://").rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host, int(port)), timeout=10).close()
