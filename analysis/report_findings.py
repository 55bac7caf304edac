"""The first table of a report: how often what was learned helps, where it was learned and elsewhere."""

import math
from statistics import median

import pandas as pd

from analysis.report_figures import LOST, by_model, won_back
from analysis.report_read import Record
from analysis.report_table import Sheet, Value, number, text
from analysis.runs import AXES

HEAD = ["model", "text", "learned", "dense", "helps the model it was learned through", "of its loss won back, median",
        "helps other compressions"]  # fmt: skip
NOTES = [
    "It helps where the perplexity behind it is lower than that of the same model alone, both per scored token. Of the "
    "loss that compression costs (log-perplexity above the dense model's), 100 % won back is as good as dense, below 0 "
    f"it got worse; a compression that costs less than {100 * (LOST - 1):.0f} % of perplexity has no share."
]


def at_a_glance(record: Record) -> Sheet | None:
    """One row a model, text, and kind and text of learning; None where nothing was learned and evaluated."""
    body: list[list[Value]] = []
    for model, rows in by_model(record.measured("perplexity")):
        for (_, dataset, split, _), own in rows.groupby(AXES):
            without = own[own.source == "none"].groupby("target").ppl.mean()
            learned = own[~own.source.isin(["none", "untrained", "imported"]) & own.target.isin(without.index)]
            for (recovery, on), group in learned.groupby(["recovery", "learned_on"]):
                name = f"{dataset} {split}"
                body.append([text(model), text(name), text(f"{recovery} on {on}" if on else recovery),
                             *_row(group, without)])  # fmt: skip
    return Sheet("Does what was learned help?", HEAD, body, {3, 4, 5, 6}, NOTES) if body else None


def _row(rows: pd.DataFrame, without: "pd.Series[float]") -> list[Value]:
    base = rows.target.map(without).astype(float)
    helps, at_home = rows.ppl < base, rows.source == rows.target
    dense = float(without["dense"]) if "dense" in without.index else None
    pairs = zip(base[at_home], rows.ppl[at_home], strict=True)
    shares = [s for b, p in pairs if (s := won_back(dense, float(b), float(p))) is not None and math.isfinite(s)]
    share = number(median(shares), f"{median(shares):.0f} %") if shares else number(None)
    return [number(dense), _of(helps[at_home]), share, _of(helps[~at_home])]


def _of(helps: "pd.Series[bool]") -> Value:
    """So many of so many; sorts by the share."""
    n, yes = len(helps), int(helps.sum())
    return Value(f"{yes} of {n}", yes / n, tone="ok" if yes == n else "bad" if not yes else "") if n else number(None)
