"""The tables of a report: what ran, ours beside the paper's, tasks, failures, cost, versions."""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata

import pandas as pd

from ctp.common.terminal import duration

from .. import paper, tables
from ..compare import BETTER, MISSING, OK, OTHER, WORSE, Line, judge, shown
from ..runs import AXES, AnalysisError
from .figures import by_severity, called
from .read import FINISHED, Cell, Record
from .table import LONG, Sheet, Value, number, of_paper, text

TOLERANCE = 0.05  # as `analysis.compare` has it
TONE = {OK: "ok", BETTER: "ok", WORSE: "bad"}
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


def when(milliseconds: int) -> str:
    """A time as UTC."""
    return f"{datetime.fromtimestamp(milliseconds / 1000, UTC):%Y-%m-%d %H:%M} UTC" if milliseconds else "-"


def took(seconds: float) -> Value:
    """A duration that sorts."""
    return number(seconds, "-" if math.isnan(seconds) else duration(seconds))


def size(count: float) -> str:
    """Bytes for people."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if count >= scale:
            return f"{count / scale:#.3g}".rstrip(".") + f" {unit}"
    return f"{count / 1e3:.3g} kB"


def what_ran(record: Record) -> list[Sheet]:
    """The cells by kind, the models, compressions, recoveries and texts."""
    return [_kinds(record), *filter(None, (_compressed(record), _learned(record), _read(record)))]


def _kinds(record: Record) -> Sheet:
    body = []
    for (kind, measure), own in _grouped(record.cells).items():
        states = Counter(c.status for c in own)
        models = sorted({c.model for c in own})
        failed = states["FAILED"]
        body.append([
            text(kind), text(measure if measure != kind else "-"), number(len(own), str(len(own))),
            number(states[FINISHED], str(states[FINISHED])), Value(str(failed), failed, tone="bad" if failed else ""),
            number(len(own) - states[FINISHED] - failed, str(len(own) - states[FINISHED] - failed)),
            text(", ".join(models)),
        ])  # fmt: skip
    head = ["kind", "measure", "cells", "finished", "failed", "not finished", "models"]
    return Sheet("Cells, as MLflow has them", head, body, {2, 3, 4, 5})


def _grouped(cells: Iterable[Cell]) -> dict[tuple[str, str], list[Cell]]:
    order = ["compress", "learn", "evaluate"]
    out: dict[tuple[str, str], list[Cell]] = {}
    for cell in sorted(cells, key=lambda c: (order.index(c.kind) if c.kind in order else 9, c.measure)):
        out.setdefault((cell.kind, cell.measure), []).append(cell)
    return out


def _compressed(record: Record) -> Sheet | None:
    rows = record.rows[record.rows.kind == "compress"] if "kind" in record.rows else record.rows.iloc[:0]
    if rows.empty:
        return None
    wanted = ["parameters", "sparsity", "bits_per_weight", "model_ratio", "model_bytes", "seconds"]
    rows = rows.reindex(columns=list(dict.fromkeys([*rows.columns, *wanted])))
    rows = rows.assign(zeros=_metric(record, rows, "sparsity"))
    body = [
        [text(r.model), text(r.compression), number(r.bits_per_weight, f"{r.bits_per_weight:.2f}"),
         number(r.zeros, f"{100 * r.zeros:.1f} %"), number(r.model_ratio, f"{r.model_ratio:.2f}"),
         number(r.model_bytes, size(r.model_bytes)), took(r.seconds)]
        for _, r in rows.sort_values(["model", "compression"]).iterrows() if r.compression != "dense"
    ]  # fmt: skip
    head = ["model", "compression", "bits per weight", "zeros", "times smaller than float16", "size", "took"]
    notes = ["Less than 1 is larger: where pruned weights, embeddings and head are kept in float32."]
    notes = notes if any(row[4].sort is not None and row[4].sort < 1 for row in body) else []
    return Sheet("Compressed models", head, body, {2, 3, 4, 5, 6}, notes, len(body) > LONG) if body else None


def _metric(record: Record, rows: pd.DataFrame, name: str) -> pd.Series:
    """A metric that shares its name with a param, which goes before it in the rows."""
    return pd.Series([record.metric(run, name) for run in rows.run_id], index=rows.index, dtype=float)


def _learned(record: Record) -> Sheet | None:
    rows = record.measured("learn")
    if rows.empty:
        return None
    wanted = ["trainable_parameters", "initial_val_loss", "best_val_loss", "best_step", "seconds"]
    rows = rows.reindex(columns=list(dict.fromkeys([*rows.columns, *wanted])))
    body = [
        [text(r.model), text(r.source), text(r.recovery_label), text(r.learned_on or "-"),
         number(r.trainable_parameters, f"{r.trainable_parameters:,.0f}"),
         number(r.initial_val_loss, f"{r.initial_val_loss:.3f}"), number(r.best_val_loss, f"{r.best_val_loss:.3f}"),
         number(r.best_step, f"{r.best_step:.0f}"), took(r.seconds)]
        for _, r in rows.sort_values(["model", "source", "recovery_label"]).iterrows()
    ]  # fmt: skip
    head = ["model", "learned through", "recovery", "learned on", "trained numbers", "first loss", "best loss",
            "best step", "took"]  # fmt: skip
    notes = ["Losses are of the validation text, in nats per scored token."]
    return Sheet("Prompts and adapters", head, body, {4, 5, 6, 7, 8}, notes, long=len(body) > LONG)


def _read(record: Record) -> Sheet | None:
    rows = record.measured("perplexity")
    if rows.empty:
        return None
    body = []
    for (model, dataset, split, _), own in rows.groupby(AXES):
        tokens, window = float(own.scored_tokens.iloc[0]), int(own.seq_len.iloc[0])
        body.append([text(model), text(dataset), text(split), number(window, f"{window:,}"),
                     number(tokens, f"{tokens:,.0f}"), number(len(own), str(len(own)))])  # fmt: skip
    head = ["model", "text", "split", "window, tokens", "scored tokens", "evaluations"]
    return Sheet("Texts that perplexities are of", head, body, {3, 4, 5}, long=len(body) > 8)


def perplexities(record: Record) -> Sheet | None:
    """Every perplexity, both denominators."""
    rows = record.measured("perplexity")
    if rows.empty:
        return None
    body = [
        [text(r.model), text(f"{r.dataset} {r.split}"), text(r.target), text("-" if r.source == "none" else r.source),
         text("no prompt" if r.source == "none" else r.recovery_label or called(r)), number(r.ppl), number(r.ppl_paper),
         number(r.scored_tokens, f"{r.scored_tokens:,.0f}")]
        for r in by_severity(rows)
    ]  # fmt: skip
    head = ["model", "text", "model behind (target)", "learned through (source)", "prompt or adapter", "ppl",
            "ppl_paper", "scored tokens"]  # fmt: skip
    return Sheet("Every perplexity", head, body, {5, 6, 7}, long=True)


def tasks(record: Record) -> Sheet | None:
    """Every score of a task."""
    rows = record.measured("task")
    if rows.empty:
        return None
    rows = rows.reindex(columns=list(dict.fromkeys([*rows.columns, "score_stderr", "documents"])))
    body = [
        [text(r.model), text(r.task), text(r.target), text("no prompt" if r.source == "none" else called(r)),
         number(r.score, f"{r.score:.3f}"), number(r.score_stderr, f"{r.score_stderr:.3f}"), text(r.metric or "-"),
         number(r.documents, f"{r.documents:.0f}")]
        for r in by_severity(rows)
    ]  # fmt: skip
    head = ["model", "task", "compression", "prompt or adapter", "score", "standard error", "metric", "documents"]
    return Sheet("Scores of tasks", head, body, {4, 5, 7}, long=len(body) > LONG)


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
            own = _judged(record, name)
            if name in tables.TABLES and any(line.verdict != MISSING for line in own):
                sheet = of_paper(tables.build(name, record.results))
                sheet.notes = [n for n in sheet.notes if n not in {said for s in sheets for said in s.notes}]
                sheets.append(sheet)
            lines += own
        except AnalysisError as e:
            troubles.append(f"{name}: {e}")
    counts = Counter(line.verdict for line in lines)
    verdicts = [(v, counts[v], TONE.get(v, "")) for v in (OK, BETTER, WORSE, OTHER, MISSING) if lines]
    measured = [line for line in lines if line.verdict != MISSING]
    every = _lines(measured) if measured else None
    return Comparison(verdicts, sheets, every, troubles)


def _judged(record: Record, name: str) -> list[Line]:
    numbers = [e for e in paper.entries(name) if e.value is not None]
    return [judge(n, measured, TOLERANCE) for n, measured in record.results.table(numbers).items()]


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
    return Sheet("Every number of the paper that ran here", head, body, {1, 2, 3, 4}, notes, long=True)


@dataclass(frozen=True)
class Failure:
    """A cell that failed. trace: the end of its traceback; "" where there is none."""

    cell: Cell
    trace: str


def failures(record: Record) -> list[Failure]:
    """The cells whose last attempt failed, by name."""
    failed = sorted((c for c in record.cells if c.status == "FAILED"), key=lambda c: c.name)
    return [Failure(c, record.trace(c.run_id)[-TRACE:] if i < TRACES else "") for i, c in enumerate(failed)]


def cost(record: Record) -> list[Sheet]:
    """Time and memory by kind, the longest cells, the invocations."""
    finished = [c for c in record.cells if c.status == FINISHED]
    body = []
    for (kind, measure), own in _grouped(finished).items():
        times = [c.seconds for c in own if not math.isnan(c.seconds)]
        memory = max((c.memory for c in own if not math.isnan(c.memory)), default=math.nan)
        devices = ", ".join(sorted({c.device for c in own if c.device}))
        body.append([text(kind if kind == measure else f"{kind}, {measure}"), number(len(own), str(len(own))),
                     took(sum(times)), took(sum(times) / len(times) if times else math.nan),
                     took(max(times, default=math.nan)), number(memory, size(memory)), text(devices)])  # fmt: skip
    head = ["kind", "cells", "all together", "mean", "longest", "peak memory", "device"]
    slow = sorted((c for c in finished if not math.isnan(c.seconds)), key=lambda c: -c.seconds)[:SLOWEST]
    slowest = [[text(c.name), text(c.kind), took(c.seconds), number(c.memory, size(c.memory))] for c in slow]
    calls = [[text(i.command), text(when(i.start)), took(i.seconds), text(i.status.lower())]
             for i in record.invocations]  # fmt: skip
    notes = ["Time of the cells added up; cells that ran beside each other count in full."]
    sheets = [Sheet("Time and memory", head, body, {1, 2, 3, 4, 5}, notes)]
    sheets.append(Sheet("The longest cells", ["cell", "kind", "took", "peak memory"], slowest, {2, 3}, long=True))
    return [*sheets, Sheet("Invocations", ["command", "began", "took", "ended"], calls, {2}, long=len(calls) > LONG)]


def provenance(record: Record, found: list[dict[str, str]]) -> list[Sheet]:
    """Commits and machines of the cells, packages of some, and of this report. found: as `versions` gives them."""
    finished = [c for c in record.cells if c.status == FINISHED]
    by = Counter((c.commit or "not known", c.device or "-", c.machine or "-") for c in finished)
    body = [[text(commit), text(device), text(machine), number(n, str(n))]
            for (commit, device, machine), n in by.most_common()]  # fmt: skip
    sheets = [Sheet("What the cells were computed with", ["git commit", "device", "machine", "cells"], body, {3})]
    own = {"report written by": {p: metadata.version(p) for p in PACKAGES if _installed(p)}}
    sets = {f"cells{f', {i + 1}' if len(found) > 1 else ''}": v for i, v in enumerate(found)} | own
    names = sorted({n for v in sets.values() for n in v})
    rows = [[text(n), *(text(v.get(n, "-")) for v in sets.values())] for n in names]
    notes = [] if found else ["The store could not be asked which packages the cells were computed with."]
    return [*sheets, Sheet("Packages", ["package", *sets], rows, set(), notes)]


def _installed(name: str) -> bool:
    try:
        return bool(metadata.version(name))
    except metadata.PackageNotFoundError:
        return False
