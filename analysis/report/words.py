"""More figures of a report: latency, nearest words, and answers side by side."""

from typing import Any

import pandas as pd

from ..runs import check_alike, json_artifact, timings
from ..tables import readable
from .chart import curves, histogram
from .figures import LINES, Part, by_model, by_severity, called
from .read import Record
from .table import Sheet, Show, listing, number, text

ANSWER = 2000  # characters


def latency(record: Record) -> list[Part]:
    """Prefill and decode against the number of prompt vectors, a line a model and compression."""
    rows, part = record.measured("latency"), Part("")
    if rows.empty:
        return []
    part.attempt(_latencies, rows)
    return [part]


def _latencies(part: Part, rows: pd.DataFrame) -> None:
    check_alike(rows)
    for metric, what in (("prefill_seconds", "prefill, ms"), ("decode_seconds_per_token", "decode, ms per token")):
        lines, spread = [], []
        for (model, target), own in rows.groupby(["model", "target"]):
            found = timings(own, metric)
            lines.append((f"{model} {target}", list(zip(map(float, found.index), found["mean"], strict=True))))
            spread.append(list(found.spread))
        for i in range(0, len(lines), LINES):
            name = what.partition(",")[0].capitalize()
            part.charts.append(curves(f"{name} behind k prompt vectors", "prompt vectors k", what, lines[i : i + LINES],
                                      zero=True, spread=spread[i : i + LINES]))  # fmt: skip
    part.sheets.append(_timings(rows))


def _timings(rows: pd.DataFrame) -> Sheet:
    columns: dict[str, Show] = {
        "model": "model", "compression": "target", "k": ("k", "{}"), "tokens": ("seq_len", "{:,}"),
        "prefill, ms": lambda r: number(1000 * r.prefill_seconds),
        "decode, ms per token": lambda r: number(1000 * r.decode_seconds_per_token),
        "machine": lambda r: text(r.machine or r.device),
    }  # fmt: skip
    caption = "Latency: medians over rounds; bars are quartiles apart"
    return listing(caption, rows.sort_values(["model", "target", "k"]), columns, long=True)


def neighbours(record: Record) -> list[Part]:
    """For each prompt, how near the vocabulary comes, and its vectors' nearest words."""
    parts = []
    for _, row in record.measured("neighbours").iterrows():
        part = Part(f"{row.model}, prompt {called(row)} learned through {row.source}")
        part.attempt(_nearest, row)
        parts.append(part)
    return parts


def _nearest(part: Part, row: Any) -> None:
    found = json_artifact(row.run_id, "neighbours.json")
    counts, edges = found["histogram"]["counts"], found["histogram"]["edges"]
    shares = [100 * c / sum(counts) for c in counts]
    part.charts.append(histogram(
        "Cosines of the prompt's vectors with their nearest vocabulary rows", "cosine", "share of all pairs, %", edges,
        shares, ("nearly all lie below it in the paper", 0.16),
    ))  # fmt: skip
    body = [[number(n["row"], "{}"), text(readable(n)), number(n["cosine"], "{:.3f}")] for n in found["nearest"]]
    below = f"{100 * row['fraction_below_0.16']:.1f} % of the cosines lie below 0.16; in the paper nearly all."
    part.sheets.append(Sheet("Each vector's nearest word", ["vector", "word", "cosine"], body, [below], True))


def answers(record: Record) -> dict[str, dict[str, dict[str, str]]]:
    """Model -> question -> compression and prompt -> answer; of several seeds the first."""
    found: dict[str, dict[str, dict[str, str]]] = {}
    for model, rows in by_model(record.measured("generation")):
        questions = found.setdefault(model, {})
        for _, row in by_severity(rows).iterrows():
            for one in json_artifact(row.run_id, "answers.json"):
                questions.setdefault(str(one["question"]), {}).setdefault(
                    _who(row), str(one["answer"]).strip()[:ANSWER]
                )
    return found


def _who(row: Any) -> str:
    if row.source == "none":
        return f"{row.target}, no prompt"
    through = "" if row.source in (row.target, "untrained", "imported") else f" learned through {row.source}"
    return f"{row.target}, {called(row)}{through}"
