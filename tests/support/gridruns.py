"""Grids run as commands or in this process, and what a run leaves: lines, manifests, MLflow runs."""

import contextlib
import json
import subprocess
import sys

from mlflow.tracking import MlflowClient

from ctp.cells.cell import to_json
from ctp.execution import worker
from ctp.scheduling.walk import Settings, Walk
from ctp.storage.store import Store


def command(module, *args):
    """The arguments of a process that runs this module."""
    return [sys.executable, "-m", module, *map(str, args)]


def run(module, *args, cwd):
    """Run a module to its end; never raises for its exit code."""
    return subprocess.run(command(module, *args), cwd=cwd, capture_output=True, text=True, timeout=600, check=False)


def run_here(plan, todo, done, *, store, runtime, options, on_event):
    """A run in this process instead of Ray's workers, where a test can break what it likes."""
    settings = Settings(1, {k: {"CPU": 1} for k in plan.nodes}, fail_fast=options.fail_fast)
    walk = Walk(plan, todo, done, settings, on_event)
    place, count = Store(store), 0
    while task := walk.next_task(str(count)):
        for k in task:
            data = to_json(plan.nodes[k].cell) | {"key": k}
            worker.do(data, place, runtime, lambda event, name=str(count): walk.receive(name, event))
        walk.end(str(count))
        count += 1
    return walk.outcome


def without_ray(monkeypatch):
    """Grids run in this process until the test ends: starting Ray takes seconds."""
    monkeypatch.setattr("ctp.scheduling.tune.run", run_here)
    monkeypatch.setattr("ctp.scheduling.cluster.join", lambda *args: contextlib.nullcontext())


def starting(lines, word):
    """The lines that start with `word`, stripped."""
    return [line.strip() for line in lines if line.strip().startswith(word)]


def manifests(folder):
    """Folder name -> manifest, of every artifact in the default store of `folder`."""
    return {p.parent.name: json.loads(p.read_text()) for p in folder.glob("results/store/*/*/manifest.json")
            if p.parent.parent.name not in ("partial", ".tmp")}  # fmt: skip


def runs(uri, grid="g"):
    """MLflow's runs of the cells of a grid."""
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name(grid).experiment_id
    return client.search_runs([experiment], "tags.`ctp.kind` != 'grid'")
