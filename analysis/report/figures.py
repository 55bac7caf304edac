"""The figures of a report: perplexity against compression, transfer, learning."""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from ctp.evaluation.recovered import won_back
from ctp.tracking.entries import CURVES

from .. import transfer_matrix
from ..runs import AXES, AnalysisError, check_alike
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
        """Add something: make(self, *given). Runs that do not belong in one table are told in its place."""
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
    return re.sub("-seed[0-9]+$", "", row.recovery_label) or f"{row.recovery} {row.learned_on}".strip()


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


def by_severity(rows: pd.DataFrame) -> list[Any]:
    """Evaluations, the rows of one model, text or task after the other, from dense on, without a prompt first."""
    told = [(row.model, row.dataset, row.task, severity(row.target, row), row.source != "none", row.source, row.k, row)
            for _, row in rows.iterrows()]  # fmt: skip
    return [row for *_, row in sorted(told, key=lambda t: t[:-1])]


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
    targets = sorted(rows.target.unique(), key=lambda t: severity(t, rows[rows.target == t].iloc[0]))
    without = {str(t): float(v) for t, v in rows[rows.source == "none"].groupby("target").ppl.mean().items()}
    behind = own_prompts(rows)
    series = ["no prompt", *list(behind)[:SERIES]]
    every: list[dict[str, float]] = [without, *(behind[s] for s in series[1:])]
    dense, whole = dense_of(rows), set(rows[rows.target_level == "dense"].target)
    lines = [(t, [s.get(t) for s in every]) for t in targets if t not in whole or any(t in s for s in every[1:])]
    lines = [(t, own) for t, own in lines if any(v is not None and math.isfinite(v) and v > 0 for v in own)]
    if lines:
        reference = ("dense, no prompt", dense) if dense else None
        part.charts.append(levels(name, "perplexity per scored token", lines, [series[0], *map(_behind, series[1:])],
                                  reference))  # fmt: skip
    part.sheets.append(_gains(f"{part.title} on {name}", targets, without, behind, dense))


def _behind(label: str) -> str:
    return f"with its own {label}"


def own_prompts(rows: pd.DataFrame) -> dict[str, dict[str, float]]:
    """Recovery -> target -> mean perplexity, of what was learned through the very model that it stands in front of; of
    several lengths the longest, most common kinds first."""
    own = rows[(rows.source == rows.target) & (rows.recovery != "none")]
    own = own.assign(called=[called(row) for _, row in own.iterrows()])
    common = own.groupby("called").agg(n=("target", "nunique"), k=("k", "max"))
    order = common.sort_values(["n", "k"], ascending=False, kind="stable").index
    means = own.groupby(["called", "target"]).ppl.mean()
    return {str(c): {str(t): float(v) for t, v in means[c].items()} for c in order}


def _gains(caption: str, targets: list[str], without: dict[str, float], behind: dict[str, dict[str, float]],
           dense: float | None) -> Sheet:  # fmt: skip
    rows = []
    for t in targets:
        base = [text(t), number(without.get(t))]
        found = [(label, own[t]) for label, own in behind.items() if t in own]
        for label, ppl in found:
            share = won_back(dense, without.get(t), ppl)
            cell = number(share, percent(share)) if share is not None else number(None)
            better = without.get(t) is not None and ppl < without[t]
            rows.append([*base, text(label), Value(steady(ppl), ppl, tone="ok" if better else "bad"), cell])
        if not found:
            rows.append([*base, text("-"), number(None), number(None)])
    head = ["compression", "no prompt", "learned through it", "perplexity behind it", "of the loss won back"]
    return Sheet(caption, head, rows, {1, 3, 4}, long=len(rows) > FEW)


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
    return (rows.source != rows.target) & ~rows.source.isin(["none", "untrained", "imported"])


def _matrix(_: Part, found: list[Matrix], name: str, rows: pd.DataFrame) -> None:
    """What moved, and no prompt; other rows, of one number each, stand with their own model."""
    called = rows.apply(transfer_matrix.label, axis=1)
    rows = rows[called.isin({transfer_matrix.NO_PROMPT, *called[_moved(rows)]})]
    values = transfer_matrix.matrix(rows, "ppl").drop(index=transfer_matrix.REFERENCE, errors="ignore")
    met = rows[rows.source != "none"].target
    values = values[[t for t in values.columns if t in {*met, *rows[rows.target_level == "dense"].target}]].dropna(
        how="all"
    )
    order = list(dict.fromkeys(row.target for row in by_severity(rows)))
    values = values[[t for t in order if t in values.columns]]
    source = {transfer_matrix.label(row): row.source for _, row in rows.iterrows()}
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
        homes = _homes(own)
        for (method, learned_on), group in own.groupby(["recovery", "learned_on"]):
            group = group.assign(home=group.source.map(homes)).sort_values(["home", "recovery_label"])
            for i in range(0, len(group), LINES):
                more = f" ({i // LINES + 1})" if len(group) > LINES else ""
                caption = f"{method} learned on {learned_on}{more}"
                part.attempt(_losses, record, caption, group.iloc[i : i + LINES])
        parts.append(part)
    return parts


def _homes(rows: pd.DataFrame) -> dict[str, int]:
    """Which series a source is in every panel of its model."""
    strength = {row.source: severity(row.source, row, "source") for _, row in rows.iterrows()}
    return {source: i for i, source in enumerate(sorted(strength, key=lambda s: strength[s]))}


def series_of(homes: list[int]) -> list[int]:
    """A series for each line: its home where that is free, else one that no line of the panel calls its home."""
    taken = set(homes)
    free = iter(i for i in range(len(homes) + max(homes) + 1) if i not in taken)
    seen: set[int] = set()
    out = []
    for home in homes:
        out.append(home if home not in seen else next(free))
        seen.add(home)
    return out


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
