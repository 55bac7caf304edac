"""The figures of a report: perplexity against compression, transfer, learning."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from ctp.evaluation.recovered import won_back
from ctp.tracking.entries import CURVES

from .. import transfer_matrix
from ..runs import AXES, NOT_LEARNED, AnalysisError, check_alike
from .chart import Chart, curves, levels
from .read import Record
from .table import Heat, Sheet, Value, heat, number, percent, reach, steady, text

VAL_LOSS = CURVES["val_loss"]
SERIES = 3  # kinds of prompts in a panel beside "no prompt"; tables have them all
FEW = 8  # rows of a table that stands open under its charts
LINES = 8  # of a panel of curves


@dataclass
class Part:
    """What belongs to one model (or run): charts, heat maps, tables, and what could not be drawn, with the reason."""

    title: str
    charts: list[Chart] = field(default_factory=list)
    heats: list[Heat] = field(default_factory=list)
    sheets: list[Sheet] = field(default_factory=list)
    troubles: list[str] = field(default_factory=list)

    def attempt(self, make: Callable[..., None], *given: Any) -> None:
        """Add something: make(self, *given). Why runs do not belong in one table is shown in its place."""
        try:
            make(self, *given)
        except AnalysisError as e:
            self.troubles.append(str(e))


def by_model(rows: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """The models, most cells first."""
    for model in rows.model.value_counts(sort=True).index:
        yield str(model), rows[rows.model == model]


def _texts(rows: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """The texts of one model, as (words, rows)."""
    for (_, dataset, split, seq_len), own in rows.groupby(AXES):
        yield f"{dataset} ({split}, windows of {int(str(seq_len)):,} tokens)", own


def called(row: Any) -> str:
    """A recovery's label whatever its seed."""
    return transfer_matrix.without_seed(row.recovery_label) or f"{row.recovery} {row.learned_on}".strip()


def recovery_of(row: Any, label: str = "") -> str:
    """What stands before the model of an evaluation: its label, or what it is called."""
    return "no prompt" if row.source == "none" else label or called(row)


def dense_of(rows: pd.DataFrame) -> float | None:
    """The perplexity of the model as it was; None where it was not evaluated."""
    own = rows[(rows.target_level == "dense") & (rows.source == "none")]
    return None if own.empty else float(own.ppl.mean())


def severity(name: str, row: Any, of: str = "target") -> tuple[Any, ...]:
    """Sorts compressions, targets or sources: dense, pruned, quantized, both; each the milder first."""

    def value(setting: str) -> float:
        found = row.get(f"spec.{of}.compression.{setting}")
        return 0.0 if found is None or pd.isna(found) else float(found)

    bits, zeros = value("bits"), value("sparsity")
    return (row.get(f"{of}_level", name) != "dense", bool(bits) + (bool(bits) and bool(zeros)), zeros, -bits, name)


def by_severity(rows: pd.DataFrame) -> pd.DataFrame:
    """Evaluations, the rows of one model, text or task after the other, from dense on, without a prompt first."""
    order = {i: (r.model, r.dataset, r.task, severity(r.target, r), r.source != "none", r.source, r.k)
             for i, (_, r) in enumerate(rows.iterrows())}  # fmt: skip
    return rows.iloc[sorted(order, key=lambda i: order[i])]


def compressions(record: Record) -> list[Part]:
    """For each model, a panel a text, and the numbers with how much of the loss was won back."""
    parts = []
    for model, rows in by_model(record.measured("perplexity")):
        part = Part(model)
        for name, own in _texts(rows):
            part.attempt(_one_text, name, own)
        parts.append(part)
    return parts


def _one_text(part: Part, name: str, rows: pd.DataFrame) -> None:
    check_alike(rows)
    targets = list(by_severity(rows).target.unique())
    without = rows[rows.source == "none"].groupby("target").ppl.mean()
    behind = own_prompts(rows)
    dense, whole = dense_of(rows), set(rows[rows.target_level == "dense"].target)
    shown = pd.concat([without.rename("no prompt"), behind.iloc[:, :SERIES].add_prefix("with its own ")], axis=1)
    shown = shown.reindex(targets).where(lambda v: (v > 0) & (v < math.inf))
    shown = shown[shown.notna().any(axis=1) & (~shown.index.isin(whole) | shown.iloc[:, 1:].notna().any(axis=1))]
    if len(shown):
        lines = [(str(t), [None if math.isnan(v) else v for v in row]) for t, row in shown.iterrows()]
        reference = ("dense, no prompt", dense) if dense else None
        part.charts.append(levels(name, "perplexity per scored token", lines, list(shown.columns), reference))
    part.sheets.append(_gains(f"{part.title} on {name}", targets, without, behind, dense))


def own_prompts(rows: pd.DataFrame) -> pd.DataFrame:
    """Target x recovery: mean perplexity of what was learned through the very model that it stands in front of; of
    several lengths the longest, most common kinds first."""
    own = rows[(rows.source == rows.target) & (rows.recovery != "none")]
    own = own.assign(called=[called(row) for _, row in own.iterrows()])
    common = own.groupby("called").agg(n=("target", "nunique"), k=("k", "max"))
    order = common.sort_values(["n", "k"], ascending=False, kind="stable").index
    return own.pivot_table(index="target", columns="called", values="ppl").reindex(columns=order)


def _gains(caption: str, targets: list[str], without: pd.Series, behind: pd.DataFrame, dense: float | None) -> Sheet:
    rows = []
    for t in targets:
        base = without.get(t)
        found = behind.loc[t].dropna() if t in behind.index else pd.Series(dtype=float)
        for label, ppl in zip(found.index, map(float, found), strict=True):
            tone = "ok" if base is not None and ppl < base else "bad"
            rows.append([text(t), number(base), text(label), Value(steady(ppl), ppl, tone),
                         percent(won_back(dense, base, ppl))])  # fmt: skip
        if found.empty:
            rows.append([text(t), number(base), text("-"), number(None), number(None)])
    head = ["compression", "no prompt", "learned through it", "perplexity behind it", "of the loss won back"]
    return Sheet(caption, head, rows, long=len(rows) > FEW)


def transfer(record: Record) -> list[Part]:
    """For each model, source x target of each text on which a prompt met another model than its own."""
    parts = []
    for model, rows in by_model(record.measured("perplexity")):
        part, found = Part(model), list[Matrix]()
        for name, own in _texts(rows):
            if _moved(own).any():
                part.attempt(_matrix, found, name, own)
        widest = reach([m.values for m in found], transfer_matrix.NO_PROMPT)
        part.heats = [heat(f"Perplexity on {m.name}", "learned through ↓ put before →", m.values, m.shown,
                           transfer_matrix.NO_PROMPT, m.own, widest) for m in found]  # fmt: skip
        if part.heats or part.troubles:
            parts.append(part)
    return parts


@dataclass(frozen=True)
class Matrix:
    """Perplexities on one text, source x target. shown: as text. own: (row, column) of the same model."""

    name: str
    values: pd.DataFrame
    shown: pd.DataFrame
    own: set[tuple[str, str]]


def _moved(rows: pd.DataFrame) -> "pd.Series[bool]":
    """Which rows are of something that was learned through another model than the one behind it."""
    return (rows.source != rows.target) & ~rows.source.isin(NOT_LEARNED)


def _matrix(_: Part, found: list[Matrix], name: str, rows: pd.DataFrame) -> None:
    """What moved, and no prompt; other rows, of one number each, stand with their own model."""
    labels = rows.apply(transfer_matrix.label, axis=1)
    kept = labels.isin({transfer_matrix.NO_PROMPT, *labels[_moved(rows)]})
    rows, source = rows[kept], dict(zip(labels[kept], rows.source[kept], strict=True))
    order = list(by_severity(rows).target.unique())
    met = {*rows[rows.source != "none"].target, *rows[rows.target_level == "dense"].target}
    values = transfer_matrix.matrix(rows, "ppl").drop(index=transfer_matrix.REFERENCE, errors="ignore")
    values = values[[t for t in order if t in met]].dropna(how="all")
    place = {r: order.index(source[r]) if source[r] in order else -1 for r in values.index}  # no prompt first
    values = values.loc[sorted(values.index, key=lambda r: (place[r], r))]  # the diagonal is a diagonal
    own = {(r, source[r]) for r in values.index}
    found.append(Matrix(name, values, transfer_matrix.spread(rows, "ppl"), own))


def learning(record: Record) -> list[Part]:
    """Validation loss by step of everything that was learned: a panel a model, text and kind of recovery."""
    parts = []
    rows = record.measured("learn")
    rows = rows[rows[VAL_LOSS].notna()] if VAL_LOSS in rows else rows.iloc[:0]
    for model, own in by_model(rows):
        part = Part(model)
        strength = {row.source: severity(row.source, row, "source") for _, row in own.iterrows()}
        homes = {source: i for i, source in enumerate(sorted(strength, key=lambda s: strength[s]))}
        for (method, learned_on), group in own.groupby(["recovery", "learned_on"]):
            group = group.assign(home=group.source.map(homes)).sort_values(["home", "recovery_label"])
            for i in range(0, len(group), LINES):
                more = f" ({i // LINES + 1})" if len(group) > LINES else ""
                caption = f"{method} learned on {learned_on}{more}"
                part.attempt(_losses, record, caption, group.iloc[i : i + LINES])
        parts.append(part)
    return parts


def series_of(homes: list[int]) -> list[int]:
    """A series for each line. homes: which one its source has in every panel of the model; the first line of a source
    gets it, others one that is no line's home here."""
    free = iter(i for i in range(len(homes) + max(homes) + 1) if i not in homes)
    return [home if home not in homes[:i] else next(free) for i, home in enumerate(homes)]


def _losses(part: Part, record: Record, caption: str, rows: pd.DataFrame) -> None:
    alike = rows.recovery_label.nunique() == 1
    lines, homes = [], []
    for _, row in rows.iterrows():
        points = [(float(s), v) for s, v in record.history(row.run_id, VAL_LOSS) if math.isfinite(v)]
        if points:
            lines.append((str(row.source) if alike else f"{row.source}, {row.recovery_label}", points))
            homes.append(int(row.home))
    if not lines:
        raise AnalysisError(f"{caption}: no validation loss is a finite number")
    part.charts.append(curves(caption, "step", "validation loss, nats per token", lines, series=series_of(homes)))
