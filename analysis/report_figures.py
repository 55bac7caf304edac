"""The figures of a report: perplexity against compression, transfer, learning, latency, nearest words, answers."""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from analysis import transfer_matrix
from analysis.render import short
from analysis.report_chart import Chart, curves, histogram, levels
from analysis.report_read import Record
from analysis.report_table import Heat, Sheet, Value, heat, number, text
from analysis.runs import AXES, AnalysisError, check_alike
from analysis.tables import readable

SERIES = 3  # kinds of prompts in a panel beside "no prompt"; tables have them all
LINES = 8  # of a panel of curves
ANSWER = 2000  # characters
LOST = 1.05  # times the dense perplexity: below it there is too little to win back for a share to mean something


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


@dataclass(frozen=True)
class Answers:
    """A question and (who, answer) side by side."""

    question: str
    answers: list[tuple[str, str]]


def by_model(rows: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """The models, most cells first."""
    for model in rows.model.value_counts(sort=True).index:
        yield str(model), rows[rows.model == model]


def _texts(rows: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """The texts of one model, as (words, rows)."""
    for (_, dataset, split, seq_len), own in rows.groupby(AXES):
        yield f"{dataset} ({split}, windows of {seq_len} tokens)", own


def called(row: Any) -> str:
    """A recovery's label whatever its seed."""
    return re.sub("-seed[0-9]+$", "", row.recovery_label) or f"{row.recovery} {row.learned_on}".strip()


def dense_of(rows: pd.DataFrame) -> float | None:
    """The perplexity of the model as it was; None where it was not evaluated."""
    own = rows[(rows.target_level == "dense") & (rows.source == "none")]
    return None if own.empty else float(own.ppl.mean())


def severity(name: str, row: Any) -> tuple[Any, ...]:
    """Sorts compressions: dense, pruned, quantized, both; each the milder first."""

    def value(setting: str) -> float:
        found = row.get(f"spec.target.compression.{setting}")
        return 0.0 if found is None or pd.isna(found) else float(found)

    bits, zeros = value("bits"), value("sparsity")
    return (row.get("target_level", name) != "dense", bool(bits) + (bool(bits) and bool(zeros)), zeros, -bits, name)


def by_severity(rows: pd.DataFrame) -> list[Any]:
    """Evaluations, the rows of one model, text or task after the other, from dense on, without a prompt first."""
    told = [(row.model, row.dataset, row.task, severity(row.target, row), row.source != "none", row.source, row.k, row)
            for _, row in rows.iterrows()]  # fmt: skip
    return [row for *_, row in sorted(told, key=lambda t: t[:-1])]


# ------------------------------------------------------- perplexity against compression


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
    return f"own {label}"


def own_prompts(rows: pd.DataFrame) -> dict[str, dict[str, float]]:
    """Recovery -> target -> mean perplexity, of what was learned through the very model that it stands in front of; of
    several lengths the longest, most common kinds first."""
    own = rows[(rows.source == rows.target) & (rows.recovery != "none")]
    own = own.assign(called=[called(row) for _, row in own.iterrows()])
    common = own.groupby("called").agg(n=("target", "nunique"), k=("k", "max"))
    order = common.sort_values(["n", "k"], ascending=False, kind="stable").index
    means = own.groupby(["called", "target"]).ppl.mean()
    return {str(c): {str(t): float(v) for t, v in means[c].items()} for c in order}


def won_back(dense: float | None, without: float | None, behind: float) -> float | None:
    """Share of the lost log-likelihood that comes back, in percent; None where (next to) nothing was lost, or it is not
    known."""
    if not dense or not without or without < LOST * dense:
        return None
    return 100 * math.log(without / behind) / math.log(without / dense)


def _gains(caption: str, targets: list[str], without: dict[str, float], behind: dict[str, dict[str, float]],
           dense: float | None) -> Sheet:  # fmt: skip
    rows = []
    for t in targets:
        base = [text(t), number(without.get(t))]
        found = [(label, own[t]) for label, own in behind.items() if t in own]
        for label, ppl in found:
            share = won_back(dense, without.get(t), ppl)
            cell = number(share, f"{share:.0f} %") if share is not None else number(None)
            better = without.get(t) is not None and ppl < without[t]
            rows.append([*base, text(label), Value(short(ppl), ppl, tone="ok" if better else "bad"), cell])
        if not found:
            rows.append([*base, text("-"), number(None), number(None)])
    head = ["compression", "no prompt", "learned through it", "perplexity behind it", "of the loss won back"]
    return Sheet(caption, head, rows, {1, 3, 4}, long=True)


# ------------------------------------------------------------------------ transfer


def transfer(record: Record) -> list[Part]:
    """For each model, source x target of each text on which a prompt met another model than its own."""
    parts = []
    for model, rows in by_model(record.measured("perplexity")):
        part = Part(model)
        for name, own in _texts(rows):
            if _moved(own).any():
                part.attempt(_matrix, name, own)
        if part.heats or part.troubles:
            parts.append(part)
    return parts


def _moved(rows: pd.DataFrame) -> "pd.Series[bool]":
    """Which rows are of something that was learned through another model than the one behind it."""
    return (rows.source != rows.target) & ~rows.source.isin(["none", "untrained", "imported"])


def _matrix(part: Part, name: str, rows: pd.DataFrame) -> None:
    """What moved, and no prompt; other rows, of one number each, stand with their own model."""
    called = rows.apply(transfer_matrix.label, axis=1)
    rows = rows[called.isin({transfer_matrix.NO_PROMPT, *called[_moved(rows)]})]
    values = transfer_matrix.matrix(rows, "ppl").drop(index=transfer_matrix.REFERENCE, errors="ignore")
    met = rows[rows.source != "none"].target
    values = values[[t for t in values.columns if t in {*met, *rows[rows.target_level == "dense"].target}]].dropna(
        how="all"
    )
    order = dict.fromkeys(row.target for row in by_severity(rows))
    values = values[[t for t in order if t in values.columns]]
    caption = f"Perplexity on {name}: rows say where a prompt was learned, columns the model behind it"
    part.heats.append(heat(caption, "source ↓ target →", values, transfer_matrix.spread(rows, "ppl")))


# ------------------------------------------------------------------------ learning


def learning(record: Record) -> list[Part]:
    """Validation loss by step of everything that was learned: a panel a model, text and kind of recovery."""
    parts = []
    rows = record.measured("learn")
    rows = rows[rows["val_loss"].notna()] if "val_loss" in rows else rows.iloc[:0]
    for model, own in by_model(rows):
        part = Part(model)
        for (method, learned_on), group in own.groupby(["recovery", "learned_on"]):
            group = group.sort_values(["recovery_label", "source"])
            for i in range(0, len(group), LINES):
                more = f" ({i // LINES + 1})" if len(group) > LINES else ""
                caption = f"{method} learned on {learned_on}{more}"
                part.attempt(_losses, record, caption, group.iloc[i : i + LINES])
        parts.append(part)
    return parts


def _losses(part: Part, record: Record, caption: str, rows: pd.DataFrame) -> None:
    alike = rows.recovery_label.nunique() == 1
    lines = []
    for _, row in rows.iterrows():
        points = [(float(s), v) for s, v in record.history(row.run_id, "val_loss") if math.isfinite(v)]
        if points:
            lines.append((str(row.source) if alike else f"{row.source}, {row.recovery_label}", points))
    if not lines:
        raise AnalysisError(f"{caption}: no validation loss is a finite number")
    part.charts.append(curves(caption, "step", "validation loss, nats per token", lines))


# ------------------------------------------------------------------------ latency


def latency(record: Record) -> list[Part]:
    """Prefill and decode against the number of prompt vectors, a line a model and compression."""
    rows = record.measured("latency")
    if rows.empty:
        return []
    part = Part("")
    try:
        check_alike(rows)
    except AnalysisError as e:
        return [Part("", troubles=[str(e)])]
    for metric, what in (("prefill_seconds", "prefill, ms"), ("decode_seconds_per_token", "decode, ms per token")):
        lines, spread = [], []
        for (model, target), own in rows.groupby(["model", "target"]):
            own = own.reindex(columns=["k", metric, f"{metric}_iqr"]).groupby("k").mean().sort_index() * 1000
            lines.append((f"{model} {target}", list(zip(map(float, own.index), map(float, own[metric]), strict=True))))
            spread.append([float(v) for v in own[f"{metric}_iqr"].fillna(0)])
        for i in range(0, len(lines), LINES):
            name = what.partition(",")[0].capitalize()
            part.charts.append(curves(f"{name} behind k prompt vectors", "prompt vectors k", what, lines[i : i + LINES],
                                      zero=True, spread=spread[i : i + LINES]))  # fmt: skip
    part.sheets.append(_timings(rows))
    return [part]


def _timings(rows: pd.DataFrame) -> Sheet:
    body = [
        [text(r.model), text(r.target), number(r.k, str(r.k)), number(r.seq_len, str(r.seq_len)),
         number(1000 * r.prefill_seconds), number(1000 * r.decode_seconds_per_token), text(r.machine or r.device)]
        for _, r in rows.sort_values(["model", "target", "k"]).iterrows()
    ]  # fmt: skip
    head = ["model", "compression", "k", "tokens", "prefill, ms", "decode, ms per token", "machine"]
    return Sheet("Latency: medians over rounds; bars are quartiles apart", head, body, {2, 3, 4, 5}, long=True)


# ------------------------------------------------------------------------ nearest words


def neighbours(record: Record) -> list[Part]:
    """For each prompt, how near the vocabulary comes, and its vectors' nearest words."""
    parts = []
    for _, row in record.measured("neighbours").iterrows():
        part = Part(f"{row.model}, prompt {called(row)} learned through {row.source}")
        part.attempt(_words, record, row)
        parts.append(part)
    return parts


def _words(part: Part, record: Record, row: Any) -> None:
    found = record.json(row.run_id, "neighbours.json")
    counts, edges = found["histogram"]["counts"], found["histogram"]["edges"]
    shares = [100 * c / sum(counts) for c in counts]
    part.charts.append(histogram(
        "Cosines of the prompt's vectors with their nearest vocabulary rows", "cosine", "share of all pairs, %", edges,
        shares, ("nearly all lie below it in the paper", 0.16),
    ))  # fmt: skip
    body = [[number(n["row"], str(n["row"])), text(readable(n)), number(n["cosine"], f"{n['cosine']:.3f}")]
            for n in found["nearest"]]  # fmt: skip
    below = f"{100 * row['fraction_below_0.16']:.1f} % of the cosines lie below 0.16; in the paper nearly all."
    part.sheets.append(Sheet("Each vector's nearest word", ["vector", "word", "cosine"], body, {0, 2}, [below], True))


# ------------------------------------------------------------------------ answers


def answers(record: Record) -> list[tuple[str, list[Answers]]]:
    """For each model, its questions with the answers of every compression and prompt; of several seeds the first."""
    out = []
    for model, rows in by_model(record.measured("generation")):
        asked: dict[str, dict[str, str]] = {}
        for row in by_severity(rows):
            who = _who(row)
            for one in record.json(row.run_id, "answers.json"):
                asked.setdefault(str(one["question"]), {}).setdefault(who, str(one["answer"]).strip()[:ANSWER])
        out.append((model, [Answers(q, list(found.items())) for q, found in asked.items()]))
    return out


def _who(row: Any) -> str:
    if row.source == "none":
        return f"{row.target}, no prompt"
    through = "" if row.source in (row.target, "untrained", "imported") else f" learned through {row.source}"
    return f"{row.target}, {called(row)}{through}"
