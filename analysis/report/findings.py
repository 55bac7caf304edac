"""The beginning of a report: how often what was learned helps, where it was learned and elsewhere; and its words."""

import math

import pandas as pd

from ctp.evaluation.recovered import LOST, won_back

from ..runs import AXES, NOT_LEARNED
from .figures import by_model, dense_of
from .read import Record
from .table import Sheet, Value, number, percent, text

HEAD = ["model and text", "what was learned", "helps its own model", "loss won back, median", "helps other models",
        "dense model's perplexity"]  # fmt: skip
NOTES = [
    "It helps where perplexity per scored token is lower with it than without. Its own model is the compressed (or "
    "dense) model that it was learned through; the others are other compressions of the same model.",
    "Loss won back: the share of what compression adds to the log-perplexity that comes back on its own model. 100 % "
    "is as good as the dense model without a prompt, below 0 is worse than no prompt. More than 100 % happens: what "
    "was learned also fits the model to the kind of text. Where compression costs less than "
    f"{100 * (LOST - 1):.0f} % of perplexity, no share is given (-).",
]
NAMED = 3  # models in the headline
GLOSSARY = [
    ("cell", "One unit of work: a compression, the learning of one prompt, or one evaluation."),
    ("dense", "The model before any compression."),
    ("gptq-3bit, sparsegpt-50, …", "Compressions: weights of 3 bits (GPTQ); half of the weights zero (SparseGPT). "
     "sparsegpt-50-4bit is both at once; further words are settings that differ from the default."),
    ("soft prompt, k", "k learned vectors in front of the input's embeddings. The model's weights do not change."),
    ("source, learned through", "The compressed model, frozen, that a prompt was learned through."),
    ("target, behind", "The model that a prompt is placed in front of: its own source, or another compression."),
    ("perplexity, ppl", "exp of the mean negative log-likelihood of a token. Lower is better; guessing gives the size "
     "of the vocabulary."),
    ("loss, nats", "The mean negative log-likelihood itself, the natural logarithm of perplexity."),
    ("seed", "Where random choices start; ± is the standard deviation over seeds, with their number in brackets."),
]  # fmt: skip


def outcomes(record: Record) -> pd.DataFrame:
    """Every evaluation of something learned, where its model was also evaluated without it; models with most cells
    first. Beside the columns of the rows: helps, home (its own model), share (of the loss won back, percent), dense."""
    found = []
    for _, rows in by_model(record.measured("perplexity")):
        for _, own in rows.groupby(AXES):
            without, dense = own[own.source == "none"].groupby("target").ppl.mean(), dense_of(own)
            learned = own[~own.source.isin(NOT_LEARNED) & own.target.isin(without.index)]
            base = learned.target.map(without).astype(float)
            shares = [won_back(dense, b, p) for b, p in zip(base, learned.ppl, strict=True)]
            found.append(learned.assign(helps=learned.ppl < base, home=learned.source == learned.target,
                                        share=pd.Series(shares, learned.index, dtype=float), dense=dense))  # fmt: skip
    return pd.concat(found) if found else pd.DataFrame(columns=["model"])


def headline(found: pd.DataFrame) -> list[str]:
    """The result in a sentence a model, of the models with most cells. found: as `outcomes` gives it."""
    groups = list(found.groupby("model", sort=False))
    return [f"{model}: {_sentence(rows)}" for model, rows in groups[:NAMED]]


def _sentence(rows: pd.DataFrame) -> str:
    begin = "what was learned lowers the perplexity of"
    parts = []
    same = rows.learned_on == rows.dataset
    for own, where in ((rows[same], "on the text that it was learned on"), (rows[~same], "on other texts")):
        home, away = own[own.home].helps, own[~own.home].helps
        counts = [f"its own model in {home.sum()} of {len(home)} evaluations"] if len(home) else []
        counts += [f"other compressions of it in {away.sum()} of {len(away)}"] if len(away) else []
        if counts:
            parts.append(f"{where}, {begin} {' and of '.join(counts)}")
            begin = "that of"
    return "; ".join(parts) + "."


def at_a_glance(found: pd.DataFrame) -> Sheet | None:
    """One row a model, text, and kind and text of learning; None where nothing was learned and evaluated."""
    if found.empty:
        return None
    body = []
    for model, own in found.groupby("model", sort=False):
        for (dataset, split, _, recovery, on), rows in own.groupby([*AXES[1:], "recovery", "learned_on"]):
            share = rows.share[rows.home].replace([math.inf, -math.inf], math.nan).median()
            body.append([text(f"{model}, {dataset} {split}"), text(f"{recovery} on {on}" if on else recovery),
                         _of(rows.helps[rows.home]), percent(share), _of(rows.helps[~rows.home]),
                         number(rows.dense.iloc[0])])  # fmt: skip
    return Sheet("Does what was learned help?", HEAD, body, NOTES, long=False)


def _of(helps: "pd.Series[bool]") -> Value:
    """So many of so many; sorts by the share."""
    n, yes = len(helps), int(helps.sum())
    return Value(f"{yes} of {n}", yes / n, tone="ok" if yes == n else "bad" if not yes else "") if n else number(None)
