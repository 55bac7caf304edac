"""A plan run by Ray Tune: one Tuner over the whole graph, a searcher that walks it, resources per trial.

A trial is a task (see `walk`). The searcher hands a task out when its inputs are in the store. Nothing of Tune's is
restored: every start is a fresh Tuner over what the store lacks. Errors of a cell are caught in the trial and reported;
Tune's retries are for machines that die.
"""

import json
import os
import queue
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ray import tune
from ray.experimental import internal_kv
from ray.tune.execution import class_cache
from ray.tune.schedulers import FIFOScheduler
from ray.tune.search import Searcher

from ctp.cells.cell import to_json
from ctp.cells.events import Done, Event, Failed
from ctp.cells.labels import slug
from ctp.cells.runtime import Runtime
from ctp.common.messages import plain
from ctp.common.redact import scrub
from ctp.execution import worker
from ctp.machine import signals
from ctp.planning import cost
from ctp.planning.graph import Plan
from ctp.planning.resources import Fleet, alone, bundles
from ctp.planning.states import Outcome
from ctp.scheduling.cluster import ResourceError, join
from ctp.scheduling.options import Options
from ctp.scheduling.walk import Settings, Walk, ended_for_memory, expected, without_commands
from ctp.storage.store import Store

# Of Ray and Tune. Their progress tables, result files and saved states are too slow for thousands of trials.
SETTINGS = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # ctp.machine.signals has its own
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Ray prints these, paragraphs long, among the driver's lines; the failed cell's record has what they say.
    "RAY_DEDUP_LOGS_SKIP_REGEX": "worker died or was killed|node running low on memory",
}
for name, value in SETTINGS.items():
    os.environ.setdefault(name, value)
# Tune would hand AWS keys to its workers by a way that Ray writes into its logs. Workers have their node's environment.
class_cache.ENV_VARS_TO_PROPAGATE = {n for n in class_cache.ENV_VARS_TO_PROPAGATE if not n.startswith("AWS_")}

REPORT_SECONDS = 0.25  # between two reports of a worker: each costs Tune's loop some milliseconds
SILENCE_SECONDS = 2.0  # between two reports of a worker without events, after which Tune can stop it


class GraphSearch(Walk, Searcher):
    """The walk over the graph as Tune's searcher: a trial is a task."""

    def __init__(
        self, plan: Plan, todo: set[str], done: set[str], settings: Settings, on_event: Callable[[Event], None]
    ) -> None:
        Searcher.__init__(self)
        Walk.__init__(self, plan, todo, done, settings, on_event)
        self.messages: dict[str, str] = {}  # trial -> what Ray says of its worker's death

    def set_search_properties(self, *args: object, **kwargs: object) -> bool:
        return True

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        if task := self.next_task(trial_id):
            cells = [to_json(self.plan.nodes[k].cell) | {"key": k} for k in task]
            return {"cells": json.dumps(cells), "bundle": self.settings.resources[task[0]]}
        return None if self.tasks else Searcher.FINISHED

    def on_trial_result(self, trial_id: str, result: Mapping[str, Any]) -> None:
        for event in result.get("events", ()):
            self.receive(trial_id, event)

    def on_trial_complete(self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False) -> None:
        self.on_trial_result(trial_id, result or {})
        self.end(trial_id, error, self.messages.pop(trial_id, ""))

    def __getstate__(self) -> dict[str, Any]:
        """Tune pickles its searcher to restore it later; this one is never restored."""
        return {}

    def save(self, checkpoint_path: str) -> None:
        """Nothing to save: the store is the state."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing to restore."""


class Witness(FIFOScheduler):
    """Reads why a trial failed: Tune tells its scheduler of every retry, and only then its searcher of the failure.

    A retry of what was ended for memory starts with half as many windows at once, and the next with a quarter.
    """

    def __init__(self, search: GraphSearch) -> None:
        super().__init__()
        self.search = search

    def on_trial_error(self, tune_controller: object, trial: Any) -> None:
        with suppress(OSError, TypeError):  # no file, no folder for one
            message = plain(scrub(without_commands(Path(trial.error_file).read_text(errors="replace"))))
            self.search.messages[trial.trial_id] = message
            trial.config["halved"] = ended_for_memory(message)


def run(plan: Plan, todo: set[str], done: set[str], *, store: str, runtime: Runtime, options: Options,
        on_event: Callable[[Event], None]) -> Outcome:  # fmt: skip
    """Run the cells in `todo`. Raises ResourceError before anything starts where a cell fits no machine."""
    place = Store(store)

    def receive(event: Event) -> None:
        if isinstance(event, Failed) and event.died:  # a worker that lives has stored its failures itself
            worker.store_failure(place, plan.nodes[event.key].cell, event.error, event.traceback)
        on_event(event)

    with join(options.address, options.insecure) as machines:
        search = GraphSearch(plan, todo, done, _settings(plan, todo, machines, place, runtime, options), receive)
        os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(search.settings.slots + 1)
        with _stoppable(search) as word:
            _fit(search, store, runtime, word)
    outcome = search.outcome
    outcome.unfinished = todo - outcome.done - outcome.failed.keys() - outcome.skipped.keys()
    if outcome.stopped_by:  # some may have been done in time, without being heard any more
        for k in place.done(plan.nodes[k].ref for k in outcome.unfinished):
            outcome.unfinished.remove(k)
            outcome.done.add(k)
            on_event(Done(k))
    return outcome


def _settings(
    plan: Plan, todo: set[str], machines: Fleet, store: Store, runtime: Runtime, options: Options
) -> Settings:
    """What each cell takes of these machines, and how many run at once. Raises ResourceError."""
    each, gpus = options.resources, machines.gpus and runtime.device != "cpu"
    if runtime.device == "cuda" and not gpus:
        raise ResourceError("--device cuda, but no machine here has a GPU")
    needs = bundles(plan, each, gpus, runtime.batch, machines.cores(each.cpus))
    _check(plan, todo, needs, machines)
    share = max((needs[k].get("GPU", 0) for k in todo), default=0)
    alike = len({tuple(sorted(needs[k].items())) for k in todo if not alone(plan.nodes[k].cell)}) <= 1
    return Settings(
        slots=machines.slots({"CPU": each.cpus, "GPU": share}),
        resources=needs,
        weights=expected(plan, {k: cost.of(n.cell, n.facts, runtime.batch) for k, n in plan.nodes.items()}),
        fail_fast=options.fail_fast,
        # With every slot known, the next task is chosen when one is free; tasks in Tune's queue are chosen earlier.
        ahead=0 if alike and not options.address else None,
        landed=lambda k: store.has(plan.nodes[k].ref),
        reached=lambda k: store.states.started().get(plan.nodes[k].ref.folder, 0),
    )


@contextmanager
def _stoppable(search: GraphSearch) -> Iterator[str]:
    """SIGINT and SIGTERM drain the run in here. Yields the key under which the cluster tells its workers."""
    word = f"ctp-drain-{uuid.uuid4().hex}"
    with signals.draining(search.drain, lambda: internal_kv._internal_kv_put(word, b"1")) as came:
        yield word
    search.outcome.stopped_by = came[0] if came else 0


def _fit(search: GraphSearch, store: str, runtime: Runtime, word: str) -> None:
    """Have Tune run everything."""
    with tempfile.TemporaryDirectory(prefix="ctp-tune-") as scratch:
        tuner = tune.Tuner(
            tune.with_resources(
                tune.with_parameters(_Task, store=store, runtime=runtime.model_dump(mode="json"), word=word),
                lambda config: tune.PlacementGroupFactory([config["bundle"]]),
            ),
            tune_config=tune.TuneConfig(search_alg=search, num_samples=-1, reuse_actors=True,
                                        scheduler=Witness(search)),
            run_config=tune.RunConfig(
                storage_path=scratch, verbose=0, failure_config=tune.FailureConfig(max_failures=2),
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            ),
        )  # fmt: skip
        tuner.fit()


class _Task(tune.Trainable):
    """One task at a time: a thread executes its cells in turn and never waits for Tune; each step reports events."""

    def setup(self, config: dict[str, Any], store: str, runtime: dict[str, Any], word: str) -> None:
        self.store, self.runtime, self.word = Store(store), Runtime.model_validate(runtime), word
        self._begin()

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """The next task, in the process whose imports and model are there."""
        self._begin()
        return True

    def _begin(self) -> None:
        cells = json.loads(self.config.pop("cells"))  # Tune would send them back with every result
        self.runtime = self.runtime.model_copy(update={"halved": self.config.pop("halved", 0)})
        self._look()
        self.events: queue.SimpleQueue[Event | BaseException | None] = queue.SimpleQueue()
        threading.Thread(target=self._work, args=(cells,), daemon=True).start()

    def _look(self) -> None:
        """Is the run to stop?"""
        if not signals.stop_requested.is_set() and internal_kv._internal_kv_exists(self.word):
            signals.stop_requested.set()

    def step(self) -> dict[str, Any]:
        """The events since the last step."""
        self._look()
        events: list[Event] = []
        end = time.monotonic() + SILENCE_SECONDS
        while (left := end - time.monotonic()) > 0:
            try:
                event = self.events.get(timeout=left)
            except queue.Empty:
                break
            if event is None:
                return {"events": events, "done": True}
            if isinstance(event, BaseException):
                raise RuntimeError(scrub(f"{type(event).__name__}: {event}")) from None
            if not events:
                end = time.monotonic() + REPORT_SECONDS
            events.append(event)
        return {"events": events, "done": False}

    def _work(self, cells: list[worker.Task]) -> None:
        try:
            for data in cells:
                if signals.stop_requested.is_set():
                    break
                worker.do(data, self.store, self.runtime, self.events.put, self.word)
        except BaseException as e:  # not a cell's error: those are reported
            self.events.put(e)
        else:
            self.events.put(None)


def _check(plan: Plan, todo: set[str], bundles: dict[str, dict[str, float]], machines: Fleet) -> None:
    """Tune would wait for ever for a bundle that no machine can give."""
    for k in todo:
        if not machines.fits(bundles[k]):
            have = [{name: m.has.get(name, 0) for name in ("CPU", "GPU")} for m in machines.machines]
            raise ResourceError(
                f"{slug(plan.nodes[k].cell)} needs {bundles[k]}, and no machine has it: {have}. --cpus sets the cores "
                "a trial takes, --gpu-memory says how large a GPU is"
            )
