"""The first table of a report: how often what was learned helps, where it was learned and elsewhere."""

import math
from statistics import median

import pandas as pd

from analysis.report_figures import LOST, by_model, dense_of, won_back
from analysis.report_read import Record
from analysis.report_table import Sheet, Value, number, text
from analysis.runs import AXES

HEAD = ["model and text", "learned", "helps its own model", "loss won back", "helps others", "dense perplexity"]
NOTES = [
    "What was learned through one compression of a model (dense is one too) helps it, or another, where the perplexity "
    "behind it is lower than without, both per scored token.",
    "Loss won back: the median share of what compression costs its own model (log-perplexity above the dense model's). "
    "100 % is as good as dense, below 0 it got worse; where compression costs less than "
    f"{100 * (LOST - 1):.0f} % of perplexity there is no share.",
]


def at_a_glance(record: Record) -> Sheet | None:
    """One row a model, text, and kind and text of learning; None where nothing was learned and evaluated."""
    body: list[list[Value]] = []
    for model, rows in by_model(record.measured("perplexity")):
        for (_, dataset, split, _), own in rows.groupby(AXES):
            without = own[own.source == "none"].groupby("target").ppl.mean()
            learned = own[~own.source.isin(["none", "untrained", "imported"]) & own.target.isin(without.index)]
            for (recovery, on), group in learned.groupby(["recovery", "learned_on"]):
                name = f"{model}, {dataset} {split}"
                body.append(
                    [text(name), text(f"{recovery} on {on}" if on else recovery), *_row(group, without, dense_of(own))]
                )
    return Sheet("Does what was learned help?", HEAD, body, {2, 3, 4, 5}, NOTES) if body else None


def _row(rows: pd.DataFrame, without: "pd.Series[float]", dense: float | None) -> list[Value]:
    base = rows.target.map(without).astype(float)
    helps, at_home = rows.ppl < base, rows.source == rows.target
    pairs = zip(base[at_home], rows.ppl[at_home], strict=True)
    shares = [s for b, p in pairs if (s := won_back(dense, float(b), float(p))) is not None and math.isfinite(s)]
    share = number(median(shares), f"{median(shares):.0f} %") if shares else number(None)
    return [_of(helps[at_home]), share, _of(helps[~at_home]), number(dense)]


def _of(helps: "pd.Series[bool]") -> Value:
    """So many of so many; sorts by the share."""
    n, yes = len(helps), int(helps.sum())
    return Value(f"{yes} of {n}", yes / n, tone="ok" if yes == n else "bad" if not yes else "") if n else number(None)
