"""MLflow, written from the store: one experiment per grid, one run per cell, found again by its key.

Only the driver writes, from one thread that replays finished artifacts and reported progress: a slow or dead server
never stalls the grid, and `python -m ctp.track sync NAME` writes from the store whatever MLflow lacks.
"""

import json
import logging
import os
import queue
import random
import sqlite3
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # the default waits four minutes for a dead server
os.environ.setdefault("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "1")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

from mlflow.entities import Metric, Param, RunTag
from mlflow.tracking import MlflowClient

from ctp.plan import Node, Plan
from ctp.redact import scrub
from ctp.runinfo import (
    CURRENT,
    ERROR,
    KEY,
    KIND,
    PARENT,
    SYNCED,
    TrackError,
    asked,
    entry,
    every_run,
    fingerprint,
    settings,
    tags,
)
from ctp.spec import Evaluate, Learn
from ctp.store import Store, StoreError

for _name in ("alembic", "mlflow.store.db.utils"):  # they tell of every table they make
    logging.getLogger(_name).setLevel(logging.WARNING)

ATTACHED = 4 * 2**20  # bytes of a file that MLflow gets a copy of
BATCH = 900  # MLflow takes 1,000 metrics a call


@dataclass
class Known:
    """A cell's run as MLflow has it."""

    run_id: str
    status: str
    tags: dict[str, str]


class Tracker:
    """The writer of one grid's experiment. Raises TrackError from the constructor, `begin`, `sync` and `close` only.

    plan: the whole grid, also where a run is of a part of it.
    """

    def __init__(self, uri: str, plan: Plan, store: Store) -> None:
        self.uri, self.plan, self.store = uri, plan, store
        try:
            self.client, self.experiment, self._synced = _open(uri, plan.name)
        except TrackError:
            raise
        except Exception as e:  # whatever the client raises: sqlite, HTTP, its own
            raise TrackError(f"MLflow at {uri} cannot be reached: {type(e).__name__}: {_first_line(e)}") from e
        self.parent: str | None = None
        self._known: dict[str, Known] | None = None  # key -> run, but for those in `_checked`
        self._checked: set[str] = set()  # finished cells that an earlier invocation found in order
        self._whole = False
        self._live: set[str] = set()  # learning now
        self.trouble = ""  # the first thing that went wrong while the grid ran
        self._events: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._missed: list[dict[str, Any]] = []  # failures that could not be written when they happened
        self._thread: threading.Thread | None = None

    # ----------------------------------------------------------------- the driver's side

    def begin(self, command: str) -> None:
        """Open the parent run of this invocation and start writing."""
        own = {KIND: "grid", "ctp.command": scrub(command), "mlflow.runName": f"grid {self.plan.name}"}
        try:
            self.parent = self.client.create_run(self.experiment, tags=own).info.run_id
            self.client.log_text(self.parent, scrub(self.plan.grid.text), "grid.yaml")
        except Exception as e:
            raise TrackError(f"MLflow at {self.uri}: {type(e).__name__}: {_first_line(e)}") from e
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._thread.start()

    def knows_grid(self) -> bool:
        """Is there a parent run, whose grid.yaml says what the cells' runs stand for?"""
        try:
            return bool(self.client.search_runs([self.experiment], f"tags.`{KIND}` = 'grid'", max_results=1))
        except Exception as e:
            raise self._lost(e) from e

    def tell(self, event: dict[str, Any]) -> None:
        """Hand over an event; returns at once."""
        self._events.put(event)

    def close(self, status: str) -> None:
        """Write what is left, then end the parent run, and cells that were cut off, as FINISHED, FAILED or KILLED."""
        if self._thread is not None:
            self._events.put(None)
            self._thread.join()
        self.sync(self._whole)
        try:
            for event in self._missed:
                self._handle(event)
            for k in self._live:
                self.client.set_terminated(self._run(self.plan.nodes[k]).run_id, "KILLED")
            if self.parent is not None:
                self.client.set_terminated(self.parent, status)
        except Exception as e:
            raise self._lost(e) from e

    def sync(self, whole: bool = False, trust: bool = False) -> int:
        """Write every finished cell that MLflow lacks; returns how many. whole: retire runs of other cells.

        trust: where the experiment says that it was checked with these very cells and tags done, and a cell drawn at
        random is there, nothing more is asked. Runs that were removed one by one are found without it only.
        """
        self._whole = whole
        done = self.store.done(self.plan.cells())
        mark = fingerprint(self.plan.nodes[k] for k in done)
        try:
            marked = self._synced in (f"whole {mark}", f"{'whole' if whole else 'part'} {mark}")
            if trust and marked and (not done or self._has(random.choice(list(done)))):
                self._checked = done
                return 0
            written = self._write(done)
            if whole:
                self._retire()
            said = f"{'whole' if whole else 'part'} {mark}"
            if said != self._synced:
                self.client.set_experiment_tag(self.experiment, SYNCED, said)
                self._synced = said
        except StoreError:
            raise
        except Exception as e:
            raise self._lost(e) from e
        return written

    def _write(self, done: set[str]) -> int:
        written = 0
        for k in self.plan.nodes:
            if k not in done or k in self._checked:
                continue
            known = self._runs().get(k)
            if known is None or known.status != "FINISHED":
                self._finish(self.plan.nodes[k])
                written += 1
                continue
            for name, value in asked(self.plan.nodes[k]).items() - known.tags.items():
                self.client.set_tag(known.run_id, name, value)
        return written

    def _retire(self) -> None:
        for k, known in self._runs().items():
            if k not in self.plan.nodes and known.tags.get(CURRENT) == "yes":
                self.client.set_tag(known.run_id, CURRENT, "no")

    def _lost(self, e: Exception) -> TrackError:
        return TrackError(
            f"MLflow at {self.uri}: {type(e).__name__}: {_first_line(e)}. Nothing is lost: the store has it all; "
            f"`python -m ctp.track sync {self.plan.name}` writes it when the server is back"
        )

    # ----------------------------------------------------------------- the thread's side

    def _work(self) -> None:
        """After a first error only failures are kept, for `close`: it writes all else from the store, and waiting for
        a dead server event by event would outlast the grid."""
        while (event := self._events.get()) is not None:
            try:
                if not self.trouble:
                    self._handle(event)
                    continue
            except Exception as e:
                self.trouble = scrub(f"{type(e).__name__}: {_first_line(e)}")
            if event["event"] == "failed":
                self._missed.append(event)

    def _handle(self, event: dict[str, Any]) -> None:
        node = self.plan.nodes[event["key"]]
        kind = event["event"]
        if kind == "done":
            self._finish(node)
        elif kind == "failed":
            run = self._run(node)
            run.tags |= {ERROR: event["error"][:5000]}
            self.client.set_tag(run.run_id, ERROR, run.tags[ERROR])
            if event.get("traceback"):
                self.client.log_text(run.run_id, event["traceback"], "traceback.txt")
            self.client.set_terminated(run.run_id, "FAILED")
            run.status = "FAILED"
            self._live.discard(node.key)
        elif kind == "start" and isinstance(node.cell, Learn):
            self._live.add(node.key)
            self.client.update_run(self._run(node).run_id, status="RUNNING")
        elif kind == "progress" and isinstance(node.cell, Learn) and event.get("loss") is not None:
            now = int(1000 * time.time())
            live = {"live/loss": event["loss"], "live/tokens_per_s": event.get("tokens_per_s")}
            metrics = [Metric(n, float(v), now, int(event["step"])) for n, v in live.items() if v is not None]
            self.client.log_batch(self._run(node).run_id, metrics=metrics)

    def _run(self, node: Node) -> Known:
        """The cell's run, made with its settings where there is none."""
        if node.key not in self._runs():
            run = self._create(node, None, {})
            self.client.log_batch(run.run_id, params=_params(node))
        return self._runs()[node.key]

    def _create(self, node: Node, start: int | None, more: dict[str, str]) -> Known:
        """A new run of the cell. start: milliseconds since 1970, None for now."""
        own = tags(self.plan.name, node) | more | ({PARENT: self.parent} if self.parent else {})
        made = self.client.create_run(self.experiment, start_time=start, tags=own)
        self._runs()[node.key] = Known(made.info.run_id, "RUNNING", own)
        return self._runs()[node.key]

    def _finish(self, node: Node) -> None:
        """Write all there is to say of a finished cell, in few requests: there may be thousands of short cells."""
        manifest = self.store.manifest(node.cell)
        history = []
        if isinstance(node.cell, Learn) and "history.json" in manifest["files"]:
            history = json.loads((self.store.fetch(node.cell) / "history.json").read_text())["history"]
        found, new = entry(node, manifest, history), node.key not in self._runs()
        run = self._create(node, found.start, found.tags) if new else self._runs()[node.key]
        run.tags |= found.tags
        if isinstance(node.cell, Evaluate):
            self._log_files(node, run.run_id, manifest["files"])
        metrics = [Metric(n, v, found.end, step) for n, v, step in found.metrics]
        for i in range(BATCH, len(metrics), BATCH):
            self.client.log_batch(run.run_id, metrics=metrics[i : i + BATCH])
        written = () if new else [RunTag(n, v) for n, v in found.tags.items()]
        self.client.log_batch(run.run_id, metrics=metrics[:BATCH], params=_params(node), tags=written)
        if run.tags.pop(ERROR, None) is not None:
            self.client.delete_tag(run.run_id, ERROR)
        self.client.set_terminated(run.run_id, "FINISHED", found.end)
        run.status = "FINISHED"
        self._live.discard(node.key)

    def _log_files(self, node: Node, run: str, files: dict[str, Any]) -> None:
        """An evaluation's answers, single timings, nearest words as artifacts: MLflow alone tells it all."""
        small = [n for n, f in files.items() if n.endswith(".json") and f["size"] <= ATTACHED]
        if small != ["result.json"]:  # whose numbers are metrics already
            folder = self.store.fetch(node.cell)
            for name in small:
                self.client.log_artifact(run, str(folder / name))

    def _runs(self) -> dict[str, Known]:
        """Every run of a cell, read when it is first needed; only unfinished ones where the others are checked."""
        if self._known is None:
            which = f"tags.`{KIND}` != 'grid'" + (" and attributes.status != 'FINISHED'" if self._checked else "")
            runs = every_run(self.client, self.experiment, which)
            self._known = {r.data.tags[KEY]: Known(r.info.run_id, r.info.status, r.data.tags) for r in runs}
        return self._known

    def _has(self, k: str) -> bool:
        """Is there a finished run of the cell with this key?"""
        which = f"tags.`{KEY}` = '{k}' and attributes.status = 'FINISHED'"
        return bool(self.client.search_runs([self.experiment], which, max_results=1))


def _open(uri: str, name: str) -> tuple[MlflowClient, str, str]:
    """Client, experiment id, and what the experiment says it was brought up to date with.

    A new SQLite file is made here, once, in WAL mode (three times as fast).
    """
    artifacts = None
    if uri.startswith("sqlite:///"):
        file = Path(uri.removeprefix("sqlite:///"))
        file.parent.mkdir(parents=True, exist_ok=True)
        with sqlite3.connect(file) as db:
            db.execute("PRAGMA journal_mode=WAL")
        artifacts = (file.parent / "mlartifacts" / name).absolute().as_uri()
    client = MlflowClient(tracking_uri=uri)
    known = client.get_experiment_by_name(name)
    if known is None:
        return client, client.create_experiment(name, artifact_location=artifacts), ""
    if known.lifecycle_stage == "deleted":
        raise TrackError(
            f"MLflow at {uri}: the experiment {name!r} was deleted and keeps its name: `mlflow experiments restore -x "
            f"{known.experiment_id}` brings it back, `mlflow gc --experiment-ids {known.experiment_id}` removes it"
        )
    return client, known.experiment_id, known.tags.get(SYNCED, "")


def _params(node: Node) -> list[Param]:
    return [Param(n, v) for n, v in settings(node).items()]


def _first_line(e: Exception) -> str:
    return (str(e).strip().splitlines() or [""])[0][:300]


if __name__ == "__main__":
    from ctp.resync import main

    sys.exit(main())
