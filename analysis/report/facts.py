"""The tables of a report: what ran, ours beside the paper's, tasks, failures, cost, versions."""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

import pandas as pd

from ctp.common import terminal
from ctp.common.terminal import duration

from .. import paper, tables
from ..compare import MISSING, TOLERANCE, VERDICTS, Line, judged, shown
from ..runs import AXES, AnalysisError
from .figures import by_severity, recovery_of
from .read import Record
from .table import Sheet, Show, Value, listing, number, of_paper, text

TONE = {"ok": "ok", "better": "ok", "worse": "bad"}
SLOWEST = 10
TRACES = 20  # failures whose traceback is shown
TRACE = 4000  # last characters of one
DENOMINATORS = (
    "`ppl` divides the summed negative log-likelihood by the scored tokens alone: it is the one to draw conclusions "
    "from, and every figure here shows it. `ppl_paper` divides the same sum by all positions, those of the k prompt "
    "vectors too, which score nothing, as the code behind the paper's tables does: it is lower for any prompt, good "
    "or bad, the same without one, and stands here for the comparison with those tables only."
)
PACKAGES = ("ctp", "mlflow", "pandas", "torch", "transformers")
KINDS = ["compress", "learn", "evaluate"]


def when(milliseconds: int) -> str:
    """A time as UTC."""
    return f"{datetime.fromtimestamp(milliseconds / 1000, UTC):%Y-%m-%d %H:%M} UTC" if milliseconds else "-"


def took(seconds: float) -> Value:
    """A duration that sorts."""
    return number(seconds, "-" if math.isnan(seconds) else duration(seconds))


def size(count: float) -> Value:
    """Bytes for people, which sort."""
    return number(count, terminal.size(count))


def counted(count: int, bad: bool = False) -> Value:
    """A number of things; in red where they are bad and there are some."""
    return Value(str(count), count, "bad" if bad and count else "")


def what_ran(record: Record) -> list[Sheet]:
    """The cells by kind, the models, compressions, recoveries and texts."""
    sheets = _kinds(record), _compressed(record), _learned(record), _texts(record)
    return [s for i, s in enumerate(sheets) if i == 0 or s.rows]


def _by_kind(cells: pd.DataFrame) -> Iterable[tuple[str, str, pd.DataFrame]]:
    """(kind, measure, cells) in the order in which they run; the measure is - where it is the kind."""
    order = cells.assign(order=cells.kind.map(lambda k: KINDS.index(k) if k in KINDS else len(KINDS)))
    for (_, kind, measure), own in order.groupby(["order", "kind", "measure"]):
        yield str(kind), "-" if measure == kind else str(measure), own


def _kinds(record: Record) -> Sheet:
    body = []
    for kind, measure, own in _by_kind(record.cells):
        finished, failed = int((own.status == "FINISHED").sum()), int((own.status == "FAILED").sum())
        body.append([text(kind), text(measure), counted(len(own)), counted(finished), counted(failed, bad=True),
                     counted(len(own) - finished - failed), text(", ".join(sorted(own.model.unique())))])  # fmt: skip
    head = ["kind", "measure", "cells", "finished", "failed", "not finished", "models"]
    return Sheet("Cells, as MLflow has them", head, body)


def _compressed(record: Record) -> Sheet:
    rows = record.rows[(record.rows.kind == "compress") & (record.rows.compression != "dense")]
    rows = rows.assign(zeros=[100 * record.metric(run, "sparsity") for run in rows.run_id])  # a param's name too
    small = rows.model_ratio.min() < 1 if "model_ratio" in rows else False
    notes = ["Less than 1 is larger: where pruned weights, embeddings and head are kept in float32."] if small else []
    columns: dict[str, Show] = {
        "model": "model", "compression": "compression", "bits per weight": ("bits_per_weight", "{:.2f}"),
        "zeros": ("zeros", "{:.1f} %"), "times smaller than float16": ("model_ratio", "{:.2f}"),
        "size": lambda r: size(r.get("model_bytes", math.nan)), "took": lambda r: took(r.get("seconds", math.nan)),
    }  # fmt: skip
    return listing("Compressed models", rows.sort_values(["model", "compression"]), columns, notes)


def _learned(record: Record) -> Sheet:
    columns: dict[str, Show] = {
        "model": "model", "learned through": "source", "recovery": "recovery_label", "learned on": "learned_on",
        "trained numbers": ("trainable_parameters", "{:,.0f}"), "first loss": ("initial_val_loss", "{:.3f}"),
        "best loss": ("best_val_loss", "{:.3f}"), "best step": ("best_step", "{:.0f}"),
        "took": lambda r: took(r.get("seconds", math.nan)),
    }  # fmt: skip
    rows = record.measured("learn").sort_values(["model", "source", "recovery_label"])
    notes = ["Losses are of the validation text, in nats per scored token."]
    return listing("Prompts and adapters", rows, columns, notes)


def _texts(record: Record) -> Sheet:
    rows = record.measured("perplexity")
    texts = rows.assign(evaluations=rows.groupby(AXES).run_id.transform("size")).drop_duplicates(AXES).sort_values(AXES)
    columns: dict[str, Show] = {
        "model": "model", "text": "dataset", "split": "split", "window, tokens": ("seq_len", "{:,}"),
        "scored tokens": ("scored_tokens", "{:,.0f}"), "evaluations": ("evaluations", "{}"),
    }  # fmt: skip
    return listing("Texts that perplexities are of", texts, columns)


def perplexities(record: Record) -> Sheet:
    """Every perplexity, both denominators."""
    columns: dict[str, Show] = {
        "model": "model", "text": lambda r: text(f"{r.dataset} {r.split}"), "model behind (target)": "target",
        "learned through (source)": lambda r: text("-" if r.source == "none" else r.source),
        "prompt or adapter": lambda r: text(recovery_of(r, r.recovery_label)), "ppl": ("ppl", ""),
        "ppl_paper": ("ppl_paper", ""), "scored tokens": ("scored_tokens", "{:,.0f}"),
    }  # fmt: skip
    return listing("Every perplexity", by_severity(record.measured("perplexity")), columns, long=True)


def tasks(record: Record) -> Sheet:
    """Every score of a task."""
    columns: dict[str, Show] = {
        "model": "model", "task": "task", "compression": "target",
        "prompt or adapter": lambda r: text(recovery_of(r)), "score": ("score", "{:.3f}"),
        "standard error": ("score_stderr", "{:.3f}"), "metric": "metric", "documents": ("documents", "{:.0f}"),
    }  # fmt: skip
    return listing("Scores of tasks", by_severity(record.measured("task")), columns)


@dataclass(frozen=True)
class Comparison:
    """Ours beside the paper's. verdicts: (verdict, how often, tone)."""

    verdicts: list[tuple[str, int, str]]
    sheets: list[Sheet]
    every: Sheet | None
    troubles: list[str]


def against_paper(record: Record) -> Comparison:
    """The paper's tables of which something has run, and every number with its verdict."""
    sheets: list[Sheet] = []
    troubles: list[str] = []
    lines: list[Line] = []
    for name in paper.tables():
        try:
            own = judged(record.results, name, TOLERANCE)
            if name in tables.TABLES and any(line.verdict != MISSING for line in own):
                sheet = of_paper(tables.build(name, record.results))
                sheet.notes = [n for n in sheet.notes if n not in {note for s in sheets for note in s.notes}]
                sheets.append(sheet)
            lines += own
        except AnalysisError as e:
            troubles.append(f"{name}: {e}")
    counts = Counter(line.verdict for line in lines)
    verdicts = [(v, counts[v], TONE.get(v, "")) for v in VERDICTS if lines]
    measured = [line for line in lines if line.verdict != MISSING]
    return Comparison(verdicts, sheets, _lines(measured) if measured else None, troubles)


def _lines(lines: list[Line]) -> Sheet:
    body = []
    for line in lines:
        name, ours, ppl_paper, printed, percent, verdict = shown(line)
        body.append([
            text(name), number(line.ours, ours), number(line.ppl_paper, ppl_paper), number(line.number.value, printed),
            number(line.percent, percent), Value(verdict, tone=TONE.get(line.verdict, "")),
        ])  # fmt: skip
    head = ["number", "ours", "ours, ppl_paper", "paper", "difference", "verdict"]
    notes = ["A perplexity behind a prompt is judged by ppl_paper; within 5 % and half a unit of the last digit is ok. "
             "Accuracies are ok within two combined standard errors."]  # fmt: skip
    return Sheet("Every number of the paper that ran here", head, body, notes, long=True)


@dataclass(frozen=True)
class Failure:
    """A cell that failed. trace: the end of its traceback; "" where there is none."""

    kind: str
    name: str
    error: str
    trace: str


def failures(record: Record) -> list[Failure]:
    """The cells whose last attempt failed, by name."""
    failed: list[Any] = list(record.cells[record.cells.status == "FAILED"].sort_values("name").itertuples())
    return [Failure(c.kind, c.name, c.error, record.trace(c.run_id)[-TRACE:] if i < TRACES else "")
            for i, c in enumerate(failed)]  # fmt: skip


def cost(record: Record) -> list[Sheet]:
    """Time and memory by kind, the longest cells, the invocations."""
    body = []
    for kind, measure, own in _by_kind(record.finished):
        times = own.seconds
        devices = ", ".join(sorted({d for d in own.device if d}))
        body.append([text(kind if measure == "-" else f"{kind}, {measure}"), counted(len(own)), took(times.sum()),
                     took(times.mean()), took(times.max()), size(own.memory.max()), text(devices)])  # fmt: skip
    head = ["kind", "cells", "all together", "mean", "longest", "peak memory", "device"]
    notes = ["Time of the cells added up; cells that ran beside each other count in full."]
    slow = record.finished.dropna(subset="seconds").sort_values("seconds", ascending=False, kind="stable").head(SLOWEST)
    spent: dict[str, Show] = {"took": lambda r: took(r.seconds), "peak memory": lambda r: size(r.memory)}
    calls: dict[str, Show] = {"command": "command", "began": lambda r: text(when(r.start)),
                              "took": lambda r: took(r.seconds), "ended": "status"}  # fmt: skip
    return [
        Sheet("Time and memory", head, body, notes),
        listing("The longest cells", slow, {"cell": "name", "kind": "kind", **spent}, long=True),
        listing("Invocations", record.calls, calls),
    ]


def provenance(record: Record, found: list[dict[str, str]]) -> list[Sheet]:
    """Commits and machines of the cells, packages of some, and of this report. found: as `versions` gives them."""
    by = record.finished.value_counts(["commit", "device", "machine"]).reset_index()
    made: dict[str, Show] = {"git commit": lambda r: text(r.commit or "not known"), "device": "device",
                             "machine": "machine", "cells": ("count", "{}")}  # fmt: skip
    sets = {f"cells{f', {i + 1}' if len(found) > 1 else ''}": v for i, v in enumerate(found)}
    sets["report written by"] = {p: v for p in PACKAGES if (v := _installed(p))}
    rows = [
        [text(n), *(text(v.get(n, "-")) for v in sets.values())] for n in sorted({n for v in sets.values() for n in v})
    ]
    notes = [] if found else ["The store does not say which packages the cells were computed with."]
    return [listing("What the cells were computed with", by, made),
            Sheet("Packages", ["package", *sets], rows, notes, long=False)]  # fmt: skip


def _installed(name: str) -> str:
    """The version of a package, "" where it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""
