"""MLflow runs as a whole paper's grid would leave them, without its computing: numbers made from the paper's."""

import json
import math
import sqlite3
import time

import pandas as pd
import yaml
from mlflow.entities import Metric, Param
from mlflow.tracking import MlflowClient

from analysis import paper
from analysis.roles import own_name
from analysis.runs import typed

SOLVER = {"dense": {"method": "dense"}}
for _bits in (4, 3, 2):
    SOLVER[f"gptq-{_bits}bit"] = {"method": "gptq", "bits": _bits}
for _kept in (0.5, 0.625, 0.75):
    SOLVER[f"sparsegpt-{100 * _kept:g}"] = {"method": "sparsegpt", "sparsity": _kept}
SOLVER["sparsegpt-50-4bit"] = {"method": "sparsegpt", "sparsity": 0.5, "bits": 4}


class Writer:
    """Writes runs into the experiment "g". Every call of `write` is one finished run."""

    def __init__(self, uri, define=None, studies=()):
        with sqlite3.connect(uri.removeprefix("sqlite:///")) as db:
            db.execute("PRAGMA journal_mode=WAL")  # as ctp.track does: three times as fast
        self.client = MlflowClient(uri)
        self.experiment = self.client.create_experiment("g", artifact_location=uri.replace("sqlite:///", "") + ".files")
        grid = self.client.create_run(self.experiment, tags={"ctp.kind": "grid"}).info.run_id
        text = yaml.safe_dump({"define": define or {}, "studies": {s: {} for s in studies}})
        self.client.log_text(grid, text, "grid.yaml")

    def write(self, entry, metrics, params=None, tags=None, files=None):
        own, labels = described(entry, params, tags)
        run = self.client.create_run(self.experiment, tags=labels).info.run_id
        now = int(1000 * time.time())
        logged = [Metric(n, float(v), now, 0) for n, v in metrics.items()]
        self.client.log_batch(run, metrics=logged, params=[Param(n, v) for n, v in own.items()])
        for name, content in (files or {}).items():
            self.client.log_text(run, json.dumps(content), name)
        self.client.set_terminated(run, "FINISHED")
        return run

    def paper(self, *tables, factor=1.0):
        """One run for every different measurement of these tables; `factor` times the paper's numbers."""
        for entry, metrics, tags in measurements(tables, factor):
            self.write(entry, metrics, None, tags)


def frame(*tables, factor=1.0):
    """What `analysis.runs.finished` would read of the runs that `Writer.paper` writes."""
    rows = []
    for i, (entry, metrics, tags) in enumerate(measurements(tables, factor)):
        params, labels = described(entry, None, tags)
        told = {n: labels[f"ctp.{n}"] for n in ("data", "protocol", "device")}
        told |= {"tokenizer": labels["ctp.tokenizer_sha256"], "studies": tuple(labels["ctp.studies"].split(","))}
        rows.append(params | metrics | told | {"run_id": f"run{i}"})
    return typed(pd.DataFrame(rows))


def measurements(tables, factor):
    """(entry, metrics, tags) of every different measurement."""
    kin = {}
    for entry in (e for t in tables for e in paper.entries(t)):
        kin.setdefault(json.dumps(entry.where, sort_keys=True), []).append(entry)
    for same in kin.values():
        value = next((e.value for e in same if e.value is not None), 12.0) * factor
        yield same[0], numbers(same[0], value), {"ctp.studies": ",".join(dict.fromkeys(e.table for e in same))}


def described(entry, params=None, tags=None):
    """Params and tags of a run of this measurement, all strings; some changed."""
    own = {n: str(v) for n, v in (run_params(entry) | (params or {})).items()}
    labels = {"ctp.kind": own["kind"], "ctp.current": "yes", "ctp.tokenizer_sha256": own["model"],
              "ctp.data": own.get("dataset") or own.get("task") or "none", "ctp.protocol": "p", "ctp.device": "cuda",
              "ctp.studies": entry.table}  # fmt: skip
    return own, labels | (tags or {})


def numbers(entry, value):
    """Metrics of a run whose number, as the paper would report it, is `value`."""
    measure = entry.where["measure"]
    if measure == "perplexity":
        k = entry.where.get("k", 0)
        ppl = value ** ((1023 + k) / 1023)
        scored = 1023 * 100
        return {"ppl": ppl, "ppl_paper": value, "nll_sum": scored * math.log(ppl), "scored_tokens": scored,
                "positions": (1023 + k) * 100}  # fmt: skip
    if measure == "task":
        return {"score": value, "score_stderr": entry.stderr or 0.02}
    if measure == "latency":
        return {"prefill_seconds": value / 100, "prefill_seconds_iqr": 0.002, "decode_seconds_per_token": 0.03,
                "decode_seconds_per_token_iqr": 0.001}  # fmt: skip
    return {"trainable_parameters": value} if measure == "learn" else {"questions": 8}


def run_params(entry):
    """The params that a run of the paper's own measurement has."""
    where = entry.where
    out = {"kind": "evaluate", "measure": where["measure"], "model": own_name(where["model"]), "dtype": "float16"}
    if "dataset" in where:
        split = paper.document()["datasets"][where["dataset"]]["split"]
        out |= {"dataset": own_name(where["dataset"]), "split": split, "seq_len": 1024}
    if "task" in where:
        out |= {"task": own_name(where["task"]), "shots": 0}
    target = where.get("target", "dense")
    out |= {"target": target + "-plain"} | spec("target.compression", target)
    out |= {"recovery": where.get("recovery", "random_prompt"), "k": where.get("k", 0), "source": "none"}
    if "learned_on" in where:
        source = "source.compression" if where["measure"] == "learn" else "recovery.source.compression"
        out |= {"source": where["source"] + "-plain", "learned_on": own_name(where["learned_on"]), "seed": 0}
        out |= spec(source, where["source"])
    elif where.get("recovery") != "none":
        out |= {"source": "untrained"}
    if "rank" in where:
        out |= {"rank": where["rank"]}
    if where["measure"] == "learn":
        out = {n: v for n, v in out.items() if n not in ("measure", "target")} | {"kind": "learn"}
    return out


def spec(path, name):
    return {f"spec.{path}.{n}": v for n, v in SOLVER[name].items()}
