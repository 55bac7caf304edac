"""A finished grid of ten thousand cells without the work: its file, store and MLflow rows, for benchmarks.grid.

Every artifact and run is written as ctp writes it; MLflow's rows go into its SQLite tables in bulk, as its client would
need minutes. `python -m ctp.track sync` finds nothing to correct in them.
"""

import json
import math
import random
import sqlite3
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from ctp.cells.cell import Evaluate
from ctp.planning import gridfile
from ctp.planning.graph import Plan
from ctp.planning.pins import Pins
from ctp.planning.plan import make
from ctp.storage.manifest import MANIFEST, Manifest
from ctp.storage.ref import identity
from ctp.storage.store import Store
from ctp.tracking import entries
from ctp.tracking.tracker import Tracker

TEXT = {"dataset": "newswire", "split": "train", "seq_len": 24}
SIX = ["dense", {"method": "gptq", "bits": [2, 3, 4]}, {"method": "sparsegpt", "sparsity": [0.5, 0.75]}]
COLUMNS = ("run_uuid", "name", "source_type", "source_name", "entry_point_name", "user_id", "status", "start_time",
           "end_time", "source_version", "lifecycle_stage", "artifact_uri", "experiment_id")  # fmt: skip


def perplexity(dataset: str) -> dict[str, Any]:
    """A measure on few windows of a text."""
    return {"method": "perplexity", "text": {"dataset": dataset, "split": "test", "seq_len": 24, "count": 4}}


def prompts(seeds: int) -> dict[str, Any]:
    """Prompts of three lengths, so many of each."""
    return {"method": "soft_prompt", "k": [4, 8, 16], "seed": list(range(seeds)), "text": {**TEXT, "documents": 50},
            "validation": {"split": "train", "skip": 100, "count": 4}, "steps": 6, "validate_every": 2}  # fmt: skip


def mixed() -> dict[str, Any]:
    """A matrix of 6 x 6 x 3 prompts and the 6 models alone on newswire, among 9,960 cells of other kinds."""
    others = [
        {"method": "latency", "seq_len": [8, 16, 24, 32]},
        {"method": "generation", "new_tokens": [4, 8]},
        {"method": "neighbours", "top": [10, 20]},
        perplexity("pydoc"),
    ]
    studies = {
        "matrix": {"recovery": prompts(1), "measures": perplexity("newswire")},
        "others": {"recovery": prompts(10), "measures": others},
    }
    calibration = {**TEXT, "count": 8, "sampling": "crops"}
    return {"models": "tiny-llama", "compression": SIX, "sources": "all", "calibration": calibration,
            "studies": studies}  # fmt: skip


def write(folder: Path) -> Plan:
    """The plan of a grid file mixed.yaml in `folder`, with all its cells finished in store and MLflow."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "mixed.yaml"
    path.write_text(yaml.safe_dump(mixed(), sort_keys=False))
    pins = Pins()
    plan = make(gridfile.load(str(path), [], pins), pins)
    store, uri = Store(str(folder / "results" / "store")), f"sqlite:///{folder}/results/mlflow.db"
    tracker = Tracker(uri, plan, store)  # makes the database and the experiment
    manifests = dict(_artifacts(plan, store))
    _rows(plan, manifests, folder / "results" / "mlflow.db", tracker.experiment.id)
    tracker.begin("benchmark")
    tracker.close("FINISHED")
    return plan


def _artifacts(plan: Plan, store: Store) -> Iterator[tuple[str, Manifest]]:
    """Each cell's folder with its manifest; numbers are drawn."""
    draw = random.Random(0)
    for k, node in plan.nodes.items():
        nll = draw.uniform(200, 400)
        metrics = {"ppl": math.exp(nll / 92), "ppl_paper": math.exp(nll / 96), "nll_sum": nll, "scored_tokens": 92,
                   "positions": 96}  # fmt: skip
        manifest: Manifest = {
            **identity(node.cell), "metrics": metrics, "seconds": 0.1, "device": "cpu", "created": time.time(),
            "peak_memory_bytes": 1, "git_commit": None, "versions": {}, "machine": "", "python": "", "payload": "",
            "files": {"result.json": {"sha256": "0" * 64, "size": 0}},
        }  # fmt: skip
        if isinstance(node.cell, Evaluate) and node.cell.measure.method == "perplexity":
            manifest["text"] = {"tokens": 96, "sha256": "0" * 64, "tokenizer_sha256": "1" * 64}
        folder = Path(store.folder(node.ref))
        folder.mkdir(parents=True)
        (folder / "result.json").touch()
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True))
        yield k, manifest


def _rows(plan: Plan, manifests: dict[str, Manifest], file: Path, experiment: str) -> None:
    """The rows that MLflow's own client would write of these cells."""
    runs, tags, params, metrics = [], [], [], []
    for k, node in plan.nodes.items():
        run, found = uuid.uuid4().hex, entries.entry(plan.name, node, manifests[k])
        runs.append((run, found.tags["mlflow.runName"], "UNKNOWN", "", "", "unknown", "FINISHED", found.start,
                     found.end, "", "active",
                     f"{file.parent}/mlartifacts/{plan.name}/{run}/artifacts", experiment))  # fmt: skip
        tags += [(n, v, run) for n, v in found.tags.items()]
        params += [(n, v, run) for n, v in found.params.items()]
        metrics += [(n, v, found.end, run, step, 0) for n, v, step in found.metrics]
    with sqlite3.connect(file) as db:
        db.executemany(f"INSERT INTO runs ({', '.join(COLUMNS)}) VALUES ({', '.join('?' * len(COLUMNS))})", runs)
        db.executemany("INSERT INTO tags (key, value, run_uuid) VALUES (?, ?, ?)", tags)
        db.executemany("INSERT INTO params (key, value, run_uuid) VALUES (?, ?, ?)", params)
        for table in ("metrics", "latest_metrics"):
            names = "key, value, timestamp, run_uuid, step, is_nan"
            db.executemany(f"INSERT INTO {table} ({names}) VALUES (?, ?, ?, ?, ?, ?)", metrics)
