"""The beginning of a report: how often what was learned helps, where it was learned and elsewhere; and its words."""

import math
from collections import Counter
from collections.abc import Iterator
from statistics import median

import pandas as pd

from ctp.evaluation.recovered import LOST, won_back

from ..runs import AXES
from .figures import by_model, dense_of
from .read import Record
from .table import Sheet, Value, number, percent, text

HEAD = ["model and text", "what was learned", "helps its own model", "loss won back, median", "helps other models",
        "dense model's perplexity"]  # fmt: skip
NOTES = [
    "It helps where the perplexity behind it is lower than without, both per scored token: its own model is the "
    "compression (or dense model) that it was learned through, the others are other compressions of the same model.",
    "Loss won back: of what compression adds to the log-perplexity, the share that comes back on its own model. 100 % "
    "is as good as the dense model without a prompt, below 0 it got worse. More than 100 % happens: what was learned "
    "also fits the model to the kind of text, and of a small loss a little is a large share; where compression costs "
    f"less than {100 * (LOST - 1):.0f} % of perplexity, no share is given (-).",
]
NAMED = 3  # models in the headline
GLOSSARY = [
    ("cell", "One unit of work: a compression, the learning of one prompt, or one evaluation."),
    ("dense", "The model as it was, before any compression."),
    ("gptq-3bit, sparsegpt-50, …", "Compressions: weights of 3 bits (GPTQ); half of the weights zero (SparseGPT). "
     "sparsegpt-50-4bit is both at once; further words are settings that differ from the default."),
    ("soft prompt, k", "k learned vectors in front of the input's embeddings. The model's weights do not change."),
    ("source, learned through", "The compressed model through whose frozen weights a prompt was learned."),
    ("target, behind", "The model that reads a prompt when it is evaluated: its own source, or another compression."),
    ("perplexity, ppl", "exp of the mean negative log-likelihood of a token: lower is better, and the size of the "
     "vocabulary is what guessing comes to."),
    ("loss, nats", "The mean negative log-likelihood itself, with natural logarithms: the logarithm of perplexity."),
    ("seed", "What random choices start from; ± is the standard deviation over seeds, with their number in brackets."),
]  # fmt: skip


def headline(record: Record) -> list[str]:
    """The result in a sentence a model, of the models with most cells; none where nothing was learned."""
    found: dict[str, dict[bool, Counter[str]]] = {}
    for model, _, dataset, group, without, _ in _groups(record):
        helps, at_home = _helped(group, without)
        for same in (True, False):
            of = (group.learned_on == dataset) == same
            own = found.setdefault(model, {True: Counter(), False: Counter()})[same]
            own += Counter(home=int((at_home & of).sum()), home_helped=int((helps & at_home & of).sum()),
                           away=int((~at_home & of).sum()), away_helped=int((helps & ~at_home & of).sum()))  # fmt: skip
    return [f"{model}: {_sentence(found[model])}" for model in list(found)[:NAMED]]


def _sentence(found: dict[bool, Counter[str]]) -> str:
    begin = "what was learned lowers the perplexity of"
    parts = []
    for same, where in ((True, "on the text that it was learned on"), (False, "on other texts")):
        n = found[same]
        said = [f"its own model in {n['home_helped']} of {n['home']} evaluations"] if n["home"] else []
        said += [f"other compressions of it in {n['away_helped']} of {n['away']}"] if n["away"] else []
        if said:
            parts.append(f"{where}, {begin} {' and of '.join(said)}")
            begin = "that of"
    return "; ".join(parts) + "."


def at_a_glance(record: Record) -> Sheet | None:
    """One row a model, text, and kind and text of learning; None where nothing was learned and evaluated."""
    body: list[list[Value]] = []
    for _, name, _, group, without, dense in _groups(record):
        recovery, on = group.recovery.iloc[0], group.learned_on.iloc[0]
        body.append([text(name), text(f"{recovery} on {on}" if on else recovery), *_row(group, without, dense)])
    return Sheet("Does what was learned help?", HEAD, body, {2, 3, 4, 5}, NOTES) if body else None


Group = tuple[str, str, str, pd.DataFrame, "pd.Series[float]", float | None]


def _groups(record: Record) -> Iterator[Group]:
    """(model, model and text, text, rows of one recovery learned on one text, perplexity by target without, dense)."""
    for model, rows in by_model(record.measured("perplexity")):
        for (_, dataset, split, _), own in rows.groupby(AXES):
            without = own[own.source == "none"].groupby("target").ppl.mean()
            learned = own[~own.source.isin(["none", "untrained", "imported"]) & own.target.isin(without.index)]
            for _, group in learned.groupby(["recovery", "learned_on"]):
                yield model, f"{model}, {dataset} {split}", str(dataset), group, without, dense_of(own)


def _helped(rows: pd.DataFrame, without: "pd.Series[float]") -> tuple["pd.Series[bool]", "pd.Series[bool]"]:
    """Where the perplexity is lower than without, and where it is of the very model that was learned through."""
    return rows.ppl < rows.target.map(without).astype(float), rows.source == rows.target


def _row(rows: pd.DataFrame, without: "pd.Series[float]", dense: float | None) -> list[Value]:
    base = rows.target.map(without).astype(float)
    helps, at_home = _helped(rows, without)
    pairs = zip(base[at_home], rows.ppl[at_home], strict=True)
    shares = [s for b, p in pairs if (s := won_back(dense, float(b), float(p))) is not None and math.isfinite(s)]
    share = number(median(shares), percent(median(shares))) if shares else number(None)
    return [_of(helps[at_home]), share, _of(helps[~at_home]), number(dense)]


def _of(helps: "pd.Series[bool]") -> Value:
    """So many of so many; sorts by the share."""
    n, yes = len(helps), int(helps.sum())
    return Value(f"{yes} of {n}", yes / n, tone="ok" if yes == n else "bad" if not yes else "") if n else number(None)
