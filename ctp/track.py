"""MLflow, written from the store: one experiment per grid, one run per cell, found again by its key.

Only the driver writes, from one thread that replays finished artifacts and reported progress: a slow or dead server
never stalls the grid, and `python -m ctp.track sync NAME` writes from the store whatever MLflow lacks.
"""

import argparse
import json
import logging
import os
import queue
import sqlite3
import sys
import threading
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # the default waits four minutes for a dead server
os.environ.setdefault("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "1")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

from mlflow.entities import Metric, Param, Run, RunTag
from mlflow.tracking import MlflowClient

from ctp import gridfile
from ctp.gridtext import GridError
from ctp.labels import fingerprints, params, slug
from ctp.pins import Pins
from ctp.plan import Node, Plan, make
from ctp.spec import Evaluate, Learn
from ctp.store import DEFAULT_STORE, Store, StoreError, default_store

for _name in ("alembic", "mlflow.store.db.utils"):  # they tell of every table they make
    logging.getLogger(_name).setLevel(logging.WARNING)

ATTACHED = 4 * 2**20  # bytes of a file that MLflow gets a copy of
KEY, KIND, CURRENT, STUDIES, PARENT = "ctp.key", "ctp.kind", "ctp.current", "ctp.studies", "mlflow.parentRunId"


class TrackError(Exception):
    """MLflow cannot be reached or does not take what it is given."""


def tracking_uri(store: str) -> str:
    """MLFLOW_TRACKING_URI, else an SQLite file beside a local store (in ./results for a remote one)."""
    if given := os.environ.get("MLFLOW_TRACKING_URI"):
        return given
    folder = Path(DEFAULT_STORE if "://" in store else store).absolute().parent
    return f"sqlite:///{folder / 'mlflow.db'}"


class Tracker:
    """The writer of one grid's experiment. Raises TrackError from the constructor, `sync` and `close` only."""

    def __init__(self, uri: str, plan: Plan, store: Store) -> None:
        self.uri, self.plan, self.store = uri, plan, store
        try:
            self.client, self.experiment = _open(uri, plan.name)
            self.runs = self._known_runs()
        except Exception as e:  # whatever the client raises: sqlite, HTTP, its own
            raise TrackError(f"MLflow at {uri} cannot be reached: {type(e).__name__}: {_first_line(e)}") from e
        self.parent: str | None = None
        self._live: set[str] = set()  # learning now
        self.trouble = ""  # the first thing that went wrong while the grid ran
        self._events: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._missed: list[dict[str, Any]] = []  # failures that could not be written when they happened
        self._thread: threading.Thread | None = None

    # ----------------------------------------------------------------- the driver's side

    def begin(self, command: str) -> None:
        """Open the parent run of this invocation and start writing."""
        tags = {KIND: "grid", "ctp.command": command, "mlflow.runName": f"grid {self.plan.name}"}
        try:
            self.parent = self.client.create_run(self.experiment, tags=tags).info.run_id
            self.client.log_text(self.parent, self.plan.grid.text, "grid.yaml")
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
        self.sync()
        try:
            for event in self._missed:
                self._handle(event)
            for k in self._live:
                self.client.set_terminated(self._run(self.plan.nodes[k]), "KILLED")
            if self.parent is not None:
                self.client.set_terminated(self.parent, status)
        except Exception as e:
            raise self._lost(e) from e

    def sync(self, whole: bool = False) -> int:
        """Write every finished cell that MLflow lacks; returns how many. whole: retire runs of other cells."""
        written = 0
        try:
            for k in self.store.done(self.plan.cells()):
                known = self.runs.get(k)
                if known is None or known.info.status != "FINISHED":
                    self._finish(self.plan.nodes[k])
                    written += 1
                    continue
                for name, value in _asked(self.plan.nodes[k]).items() - known.data.tags.items():
                    self.client.set_tag(known.info.run_id, name, value)
            if whole:
                for k, run in self.runs.items():
                    if k not in self.plan.nodes and run.data.tags.get(CURRENT) == "yes":
                        self.client.set_tag(run.info.run_id, CURRENT, "no")
        except StoreError:
            raise
        except Exception as e:
            raise self._lost(e) from e
        return written

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
                self.trouble = f"{type(e).__name__}: {_first_line(e)}"
            if event["event"] == "failed":
                self._missed.append(event)

    def _handle(self, event: dict[str, Any]) -> None:
        node = self.plan.nodes[event["key"]]
        kind = event["event"]
        if kind == "done":
            self._finish(node)
        elif kind == "failed":
            run = self._run(node)
            self.client.set_tag(run, "ctp.error", event["error"][:5000])
            self.runs[node.key] = self.client.get_run(run)
            if event.get("traceback"):
                self.client.log_text(run, event["traceback"], "traceback.txt")
            self.client.set_terminated(run, "FAILED")
            self._live.discard(node.key)
        elif kind == "start" and isinstance(node.cell, Learn):
            self._live.add(node.key)
            self.client.update_run(self._run(node), status="RUNNING")
        elif kind == "progress" and isinstance(node.cell, Learn) and event.get("loss") is not None:
            now = int(1000 * time.time())
            live = {"live/loss": event["loss"], "live/tokens_per_s": event.get("tokens_per_s")}
            metrics = [Metric(n, float(v), now, int(event["step"])) for n, v in live.items() if v is not None]
            self.client.log_batch(self._run(node), metrics=metrics)

    def _run(self, node: Node, start: int | None = None) -> str:
        """The id of the cell's run, made where there is none. start: milliseconds since 1970, None for now."""
        if node.key not in self.runs:
            tags = _tags(self.plan, node) | ({PARENT: self.parent} if self.parent else {})
            self.runs[node.key] = self.client.create_run(self.experiment, start_time=start, tags=tags)
            settings = [Param(n, str(v)[:6000]) for n, v in params(node.cell).items()]
            self.client.log_batch(self.runs[node.key].info.run_id, params=settings)
        return str(self.runs[node.key].info.run_id)

    def _finish(self, node: Node) -> None:
        manifest = self.store.manifest(node.cell)
        end = int(1000 * manifest["created"])
        start = end - int(1000 * manifest["seconds"])
        run = self._run(node, start)
        numbers = manifest["metrics"] | {n: manifest[n] for n in ("seconds", "peak_memory_bytes")}
        metrics = [Metric(n, float(v), end, 0) for n, v in numbers.items()]
        if isinstance(node.cell, Learn) and "history.json" in manifest["files"]:
            metrics += _curve(json.loads((self.store.fetch(node.cell) / "history.json").read_text())["history"], start)
        settings = [Param(n, str(v)[:6000]) for n, v in params(node.cell).items()]
        extra = {"ctp.device": manifest["device"], "ctp.git_commit": manifest["git_commit"] or ""}
        if "task" in manifest:
            extra["ctp.metric"] = manifest["task"]["metric"]
        if "machine_detail" in manifest:
            extra["ctp.machine"] = _machine(manifest["machine_detail"])
        extra |= {f"ctp.{n}": str(v) for n, v in manifest.get("text", {}).items()} | _asked(node)
        if isinstance(node.cell, Evaluate):
            self._log_files(node, run, manifest["files"])
        tags = [RunTag(n, v) for n, v in extra.items()]
        for i in range(0, len(metrics), 900):  # MLflow takes 1,000 metrics a call
            self.client.log_batch(run, metrics=metrics[i : i + 900])
        self.client.log_batch(run, params=settings, tags=tags)
        if "ctp.error" in self.runs[node.key].data.tags:
            self.client.delete_tag(run, "ctp.error")
        self.client.set_terminated(run, "FINISHED", end)
        self._live.discard(node.key)
        self.runs[node.key] = self.client.get_run(run)

    def _log_files(self, node: Node, run: str, files: dict[str, Any]) -> None:
        """An evaluation's answers, single timings, nearest words as artifacts: MLflow alone tells it all."""
        small = [n for n, f in files.items() if n.endswith(".json") and f["size"] <= ATTACHED]
        if small != ["result.json"]:  # whose numbers are metrics already
            folder = self.store.fetch(node.cell)
            for name in small:
                self.client.log_artifact(run, str(folder / name))

    def _known_runs(self) -> dict[str, Run]:
        found: dict[str, Run] = {}
        token = None
        while True:
            page = self.client.search_runs(
                [self.experiment], f"tags.`{KIND}` != 'grid'", max_results=1000, page_token=token
            )
            for run in page:
                found[run.data.tags[KEY]] = run
            token = page.token
            if not token:
                return found


def _open(uri: str, name: str) -> tuple[MlflowClient, str]:
    """Client and experiment id. A new SQLite file is made here, once, in WAL mode (three times as fast)."""
    artifacts = None
    if uri.startswith("sqlite:///"):
        file = Path(uri.removeprefix("sqlite:///"))
        file.parent.mkdir(parents=True, exist_ok=True)
        with sqlite3.connect(file) as db:
            db.execute("PRAGMA journal_mode=WAL")
        artifacts = (file.parent / "mlartifacts" / name).absolute().as_uri()
    client = MlflowClient(tracking_uri=uri)
    known = client.get_experiment_by_name(name)
    return client, known.experiment_id if known else client.create_experiment(name, artifact_location=artifacts)


def _tags(plan: Plan, node: Node) -> dict[str, str]:
    return {
        KEY: node.key,
        KIND: node.cell.kind,
        "ctp.grid": plan.name,
        "mlflow.runName": slug(node.cell),
        **_asked(node),
    }


def _asked(node: Node) -> dict[str, str]:
    """Tags that follow the grid as it is now, and what an evaluation may be compared with."""
    own = fingerprints(node.cell) if isinstance(node.cell, Evaluate) else {}
    return {CURRENT: "yes", STUDIES: ",".join(node.studies), **{f"ctp.{n}": v for n, v in own.items()}}


def _machine(detail: dict[str, Any]) -> str:
    """The processor that a timing is of, in a few words."""
    gpus = [g.get("name", "GPU") for g in detail.get("gpus") or []]
    return ", ".join(gpus) or f"{detail.get('cpu')}, {detail.get('threads')} threads"


def _curve(history: list[dict[str, Any]], at: int) -> list[Metric]:
    """Learning curve as metrics by step: loss (training) and val_loss."""
    return [
        Metric(name, float(point[name]), at, int(point["step"]))
        for point in history
        for name in ("loss", "val_loss")
        if point.get(name) is not None
    ]


def _first_line(e: Exception) -> str:
    return (str(e).strip().splitlines() or [""])[0][:300]


def main(argv: list[str] | None = None) -> int:
    """`python -m ctp.track sync NAME`: write from the store what MLflow lacks; returns the exit code."""
    p = argparse.ArgumentParser(prog="python -m ctp.track", description="Rebuild MLflow from the store.")
    p.add_argument("action", choices=("sync",))
    p.add_argument("grid", metavar="NAME", help="grid/NAME.yaml, or the path of a grid file")
    p.add_argument("--store", default=default_store(), metavar="URI", help="default %(default)s")
    p.add_argument("--set", action="append", default=[], metavar="PATH=VALUE", dest="settings", help="as in ctp.grid")
    p.add_argument("--data", metavar="DIR", help="as in ctp.grid")
    args = p.parse_args(argv)
    try:
        pins = Pins(args.data)
        plan = make(gridfile.load(args.grid, args.settings, pins), pins)
        store = Store(args.store)
        tracker = Tracker(tracking_uri(store.uri), plan, store)
        written = tracker.sync(whole=True)
        if not tracker.knows_grid():
            tracker.begin(f"python -m ctp.track sync {args.grid}")
            tracker.close("FINISHED")
    except (GridError, StoreError, TrackError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2 if isinstance(e, GridError) else 3
    print(f"{plan.name}: {written} runs written, {len(store.done(plan.cells()))} there. MLflow: {tracker.uri}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
