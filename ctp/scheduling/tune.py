"""What knows Ray Tune: one Tuner over the whole graph, a searcher that walks it, resources per trial.

A trial is a task (see `walk`). The searcher hands a task out when its inputs are in the store. The store is the
resume: every start is a fresh Tuner over what is missing. Errors of a cell are caught in the trial and told; Tune's
retries are for machines that die.
"""

import json
import os
import queue
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ray import tune
from ray.experimental import internal_kv
from ray.tune.execution import class_cache
from ray.tune.schedulers import FIFOScheduler
from ray.tune.search import Searcher

from ctp.cells.cell import to_json
from ctp.cells.labels import slug
from ctp.cells.runtime import Runtime
from ctp.common.messages import plain
from ctp.common.redact import scrub
from ctp.execution.worker import do as _do
from ctp.execution.worker import keep_failure
from ctp.machine import signals
from ctp.planning import cost
from ctp.planning.graph import Plan
from ctp.planning.resources import Fleet, Resources, alone
from ctp.planning.resources import bundles as resources_of
from ctp.planning.states import Outcome
from ctp.scheduling.cluster import ResourceError, join
from ctp.scheduling.walk import Event, Walk, ended_for_memory, expected, own_words
from ctp.storage.store import Store

# Tune reads these when it is imported. Its own progress tables, result files and saved states are not for thousands of
# short trials.
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "3600")
os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # ctp.machine.signals has its own
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
# Ray prints these, paragraphs long, into whatever the driver prints: what they say is in the failed cell's record.
os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "worker died or was killed|node running low on memory")

# Tune would hand AWS keys to its workers by a way that Ray writes into its logs. Workers have their node's environment.
class_cache.ENV_VARS_TO_PROPAGATE = {n for n in class_cache.ENV_VARS_TO_PROPAGATE if not n.startswith("AWS_")}

TELL_SECONDS = 0.25  # at most so often a worker tells what happened: each time costs Tune's loop some milliseconds
SILENCE_SECONDS = 2.0  # a worker that has nothing to tell looks up so often, for Tune to stop it


class GraphSearch(Walk, Searcher):
    """The walk over the graph as Tune asks for it: a trial is a task."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        Searcher.__init__(self)
        Walk.__init__(self, *args, **kwargs)
        self.last_words: dict[str, str] = {}  # trial -> what Ray says of its death

    def set_search_properties(self, *args: Any, **kwargs: Any) -> bool:
        return True

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        if task := self.next_task(trial_id):
            cells = [to_json(self.plan.nodes[k].cell) | {"key": k} for k in task]
            return {"cells": json.dumps(cells), "bundle": self.resources[task[0]]}
        return None if self.tasks else Searcher.FINISHED

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        for event in result.get("events", [result] if "event" in result else []):
            self.hear(trial_id, event)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        if result:
            self.on_trial_result(trial_id, result)
        self.end(trial_id, error, self.last_words.pop(trial_id, ""))

    def __getstate__(self) -> dict[str, Any]:
        """Tune pickles its searcher to restore it later; this one is never restored."""
        return {}

    def save(self, checkpoint_path: str) -> None:
        """Nothing to save: the store is the state."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing to restore."""


class Witness(FIFOScheduler):
    """Tune tells its searcher that a trial failed, and just before, and at every retry, its scheduler: who can see why.

    A retry of what was ended for memory begins with half as many windows at once, and the next with a quarter.
    """

    def __init__(self, search: GraphSearch) -> None:
        super().__init__()
        self.search = search

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        with suppress(OSError, TypeError):  # no file, no folder for one
            words = plain(scrub(own_words(Path(trial.error_file).read_text(errors="replace"))))
            self.search.last_words[trial.trial_id] = words
            trial.config["halved"] = ended_for_memory(words)


def run(plan: Plan, todo: set[str], done: set[str], *, store: str, runtime: Runtime, resources: Resources,
        address: str | None, fail_fast: bool, on_event: Callable[[Event], None],
        insecure: bool = False) -> Outcome:  # fmt: skip
    """Run the cells in `todo`. insecure: the cluster at `address` need not ask for a token.

    Raises ResourceError before anything starts where a cell fits no machine.
    """
    with join(address, insecure) as machines:
        gpus = machines.gpus and runtime.device != "cpu"
        costs = {k: cost.of(n.cell, n.facts, runtime.batch) for k, n in plan.nodes.items()}
        bundles = resources_of(plan, resources, gpus, runtime.batch, machines.cores(resources.cpus))
        if runtime.device == "cuda" and not gpus:
            raise ResourceError("--device cuda, but no machine here has a GPU")
        _check(plan, todo, bundles, machines)
        share = max((bundles[k].get("GPU", 0) for k in todo), default=0)
        slots = machines.slots({"CPU": resources.cpus, "GPU": share})
        # Where every slot is known, what to do next is decided when one is free; Tune's queue would be decided before.
        alike = len({tuple(sorted(bundles[k].items())) for k in todo if not alone(plan.nodes[k].cell)}) <= 1
        place = Store(store)

        def heard(event: Event) -> None:
            if event.get("died"):  # every other failure is kept by the worker that it happened to
                keep_failure(place, plan.nodes[event["key"]].cell, event["error"], event["traceback"])
            on_event(event)

        search = GraphSearch(
            plan, todo, done, slots, bundles, heard, fail_fast,
            weights=expected(plan, costs), landed=lambda k: place.has(plan.nodes[k].ref),
            reached=lambda k: place.states.started().get(plan.nodes[k].ref.folder, 0),
            ahead=None if address or not alike else 0,
        )  # fmt: skip
        os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(slots + 1)
        with _stoppable(search) as word:
            _fit(search, store, runtime, word)
    outcome = search.outcome
    outcome.unfinished = todo - outcome.done - set(outcome.failed) - set(outcome.skipped)
    for k in place.done(plan.nodes[k].ref for k in outcome.unfinished) if outcome.stopped_by else ():
        outcome.unfinished.remove(k)  # done in time, but nobody listened any more
        outcome.done.add(k)
        on_event({"event": "done", "key": k})
    return outcome


@contextmanager
def _stoppable(search: GraphSearch) -> Iterator[str]:
    """SIGINT and SIGTERM drain the run in here. Yields the word by which the cluster tells its workers."""
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
    """One task at a time: a thread does its cells in turn and never waits for Tune; each step tells what happened."""

    def setup(self, config: dict[str, Any], store: str, runtime: dict[str, Any], word: str) -> None:
        self.place, self.how, self.word = Store(store), Runtime.model_validate(runtime), word
        self._begin()

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """The next task, in the process whose imports and model are there."""
        self._begin()
        return True

    def _begin(self) -> None:
        cells = json.loads(self.config.pop("cells"))  # Tune would send them back with every result
        self.how = self.how.model_copy(update={"halved": self.config.pop("halved", 0)})
        self._look()
        self.told: queue.SimpleQueue[Event | BaseException | None] = queue.SimpleQueue()
        threading.Thread(target=self._work, args=(cells,), daemon=True).start()

    def _look(self) -> None:
        """Is the run to stop?"""
        if not signals.asked.is_set() and internal_kv._internal_kv_exists(self.word):
            signals.asked.set()

    def step(self) -> dict[str, Any]:
        """The events since the last step."""
        self._look()
        events: list[Event] = []
        end = time.monotonic() + SILENCE_SECONDS
        while (left := end - time.monotonic()) > 0:
            try:
                event = self.told.get(timeout=left)
            except queue.Empty:
                break
            if event is None:
                return {"events": events, "done": True}
            if isinstance(event, BaseException):
                raise RuntimeError(scrub(f"{type(event).__name__}: {event}")) from None
            if not events:
                end = time.monotonic() + TELL_SECONDS
            events.append(event)
        return {"events": events, "done": False}

    def _work(self, cells: list[dict[str, Any]]) -> None:
        try:
            for data in cells:
                if signals.asked.is_set():
                    break
                _do(data, self.place, self.how, self.told.put, self.word)
        except BaseException as e:  # not a cell's error: those are told
            self.told.put(e)
        else:
            self.told.put(None)


def _check(plan: Plan, todo: set[str], bundles: dict[str, dict[str, float]], machines: Fleet) -> None:
    """Tune would wait for ever for a bundle that no machine can give."""
    for k in todo:
        if not machines.fits(bundles[k]):
            have = [{name: m.has.get(name, 0) for name in ("CPU", "GPU")} for m in machines.machines]
            raise ResourceError(
                f"{slug(plan.nodes[k].cell)} needs {bundles[k]}, and no machine has it: {have}. --cpus sets the cores "
                "a trial takes, --gpu-memory says how large a GPU is"
            )
