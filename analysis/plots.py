"""The paper's figures as PNG and PDF, for papers; a report draws its own, see `analysis.report.chart`.

Colours are Okabe and Ito's, which colour-blind people tell apart.
"""

import textwrap
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")  # no display
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from . import paper
from .render import SPREAD, short
from .results import Found, Measured, Results, stand_ins
from .runs import check_alike, json_artifact, timings

GREEN, BLUE, RED = "#009E73", "#0072B2", "#D55E00"
SERIES = [(BLUE, "o"), (RED, "s"), (GREEN, "^"), ("#CC79A7", "D")]
WITHOUT, WITH, BASELINE = "without prompt", "with prompt", "baseline (not compressed)"
STYLE = {WITHOUT: (RED, "o"), WITH: (BLUE, "s")}
SPARSITY = {"sparsegpt-50": "50", "sparsegpt-62.5": "62.5", "sparsegpt-75": "75"}
BITS = {"gptq-4bit": "4", "gptq-3bit": "3", "gptq-2bit": "2"}
PERPLEXITY = "Perplexity (per scored token)"


def draw(name: str, results: Results) -> Figure | None:
    """One figure of the paper, None where nothing in it has run. Raises AnalysisError as `Results.table` does."""
    if name == "figure6":
        return _latency(results)
    found = results.table(paper.entries(name))
    if not any(found.values()):
        return None
    return {"figure5": _matrices, "figure9": _cosines}.get(name, _levels)(name, found)


def save(figure: Figure, stem: Path) -> list[Path]:
    """Write PNG and PDF and close the figure; returns the files."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    files = [stem.parent / f"{stem.name}{ending}" for ending in (".png", ".pdf")]
    figure.savefig(files[0], dpi=150)
    figure.savefig(files[1], metadata={"CreationDate": None})
    plt.close(figure)
    return files


# ------------------------------------------------------- perplexity against level


def _levels(name: str, found: Found) -> Figure:
    """One column of panels a model; for each text two rows, against sparsity and against bits."""
    models = list(dict.fromkeys(e.where["model"] for e in found))
    texts = list(dict.fromkeys(e.where["dataset"] for e in found))
    kinds = [(text, levels) for text in texts for levels in (SPARSITY, BITS)]
    down, across = (1, len(kinds)) if len(models) == 1 else (len(kinds), len(models))
    figure, axes = plt.subplots(
        down, across, squeeze=False, figsize=(2.2 + 2.9 * across, 1.2 + 2.5 * down), layout="constrained"
    )
    places = axes.flat if len(models) == 1 else axes.T.flat
    for ax, (model, (text, levels)) in zip(places, [(m, kind) for m in models for kind in kinds], strict=True):
        own = {e: m for e, m in found.items() if (e.where["model"], e.where["dataset"]) == (model, text)}
        _panel(ax, own, levels)
        ax.set_title(f"{paper.title(model)}, {paper.title(text)}", fontsize=10)
    handles = {label: h for ax in axes.flat for h, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, frameon=False)
    figure.supylabel(PERPLEXITY, fontsize=10)
    figure.suptitle(_wrapped(name, found, across), fontsize=11)
    return figure


def _panel(ax: Axes, found: Found, levels: dict[str, str]) -> None:
    """Perplexity over the levels of one kind, without and with a prompt, and the model as it was."""
    values: list[float] = []
    for label, prompted in ((WITHOUT, False), (WITH, True)):
        by_level = {e.where["target"]: m for e, m in found.items() if e.has_prompt == prompted and m is not None}
        there = [(i, by_level[t]) for i, t in enumerate(levels) if t in by_level]
        if there:
            ys = [m.mean("ppl") for _, m in there]
            colour, marker = STYLE[label]
            ax.errorbar([i for i, _ in there], ys, [m.std("ppl") for _, m in there], label=label, color=colour,
                        marker=marker, capsize=3)  # fmt: skip
            values += ys
    dense = next((m for e, m in found.items() if e.where["target"] == "dense" and m is not None), None)
    if dense is not None:
        values.append(dense.mean("ppl"))
        ax.axhline(values[-1], color=GREEN, linestyle="--", label=BASELINE)
    ax.set_xticks(range(len(levels)), list(levels.values()))
    ax.set_xlim(-0.3, len(levels) - 0.7)
    ax.set_xlabel("Sparsity (%)" if levels is SPARSITY else "Bits per weight", fontsize=9)
    if not values:
        ax.set_yticks([])
        ax.text(0.5, 0.5, "not run", transform=ax.transAxes, ha="center", color="gray")
    elif max(values) > SPREAD * min(values):
        _log(ax)
    ax.tick_params(labelsize=8)
    ax.grid(alpha=0.3)


def _log(ax: Axes) -> None:
    """A logarithmic axis with plain numbers on it."""
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 3.0), numticks=12))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: short(v)))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_minor_formatter(NullFormatter())


def _wrapped(name: str, found: Found, across: int) -> str:
    """The title, and who plays the paper's parts, broken where the figure is narrow."""
    lines = [str(paper.spec(name)["title"]).replace(" %", "\N{NO-BREAK SPACE}%"), stand_ins(found)]
    return "\n".join(part for line in lines for part in textwrap.wrap(line, 34 * across))


# -------------------------------------------------------------- source x target


def _matrices(name: str, found: Found) -> Figure:
    """A heat map a text: rows say where the prompt was learned, columns what it stands in front of."""
    texts = list(dict.fromkeys(e.where["dataset"] for e in found))
    columns = list(dict.fromkeys(e.column for e in found))
    values = np.array([[_ppl(m) for e, m in found.items() if e.where["dataset"] == text] for text in texts])
    values = values.reshape(len(texts), -1, len(columns))
    norm = LogNorm(np.nanmin(values), np.nanmax(values))
    figure, axes = plt.subplots(1, len(texts), figsize=(4.2 * len(texts) + 0.8, 4.9), layout="constrained")
    for ax, text, matrix in zip(axes, texts, values, strict=True):
        ax.imshow(matrix, norm=norm, cmap="cividis_r")
        ax.set_title(paper.title(text), fontsize=11)
        ax.set_xticks(range(len(columns)), columns, fontsize=9)
        ax.set_yticks(range(len(columns)), columns, fontsize=9)
        ax.set_xlabel("Target")
        for (i, j), value in np.ndenumerate(matrix):
            dark = not np.isnan(value) and norm(value) > 0.5
            ax.text(j, i, "-" if np.isnan(value) else short(value), ha="center", va="center", fontsize=9,
                    color="white" if dark else "black")  # fmt: skip
    axes[0].set_ylabel("Source")
    bar = figure.colorbar(axes[0].images[0], ax=axes, shrink=0.8, pad=0.01)
    bar.set_label(PERPLEXITY)
    figure.suptitle(_wrapped(name, found, 4), fontsize=11)
    return figure


def _ppl(measured: Measured | None) -> float:
    return float("nan") if measured is None else measured.mean("ppl")


# ------------------------------------------------------------------------ latency


def _latency(results: Results) -> Figure | None:
    """Prefill and decode against k; every k that was measured, not the paper's alone."""
    rows = results.study("figure6", "latency")
    rows = rows[(rows.target_level == "dense") & ((rows.recovery == "none") | (rows.k > 0))]
    roles = list(dict.fromkeys(e.where["model"] for e in paper.entries("figure6")))
    own = {role: rows[rows.model.isin(results.roles.names(role))] for role in roles}
    own = {role: r.sort_values("k") for role, r in own.items() if len(r)}
    if not own:
        return None
    check_alike(rows)
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    for ax, metric, what in zip(axes, ("prefill_seconds", "decode_seconds_per_token"),
                                ("Prefill (ms)", "Decode (ms per token)"), strict=True):  # fmt: skip
        for i, (role, r) in enumerate(own.items()):
            numbers = timings(r, metric)
            colour, marker = SERIES[i % len(SERIES)]
            ax.errorbar(numbers.index + 0.7 * (i - 1.5), numbers["mean"], numbers.spread / 2, color=colour,
                        marker=marker, capsize=3, label=paper.title(role))  # fmt: skip
        ax.set_xlabel("Prompt vectors k")
        ax.set_ylabel(what)
        medians = [v for r in own.values() for v in r[metric]]
        if max(medians) > SPREAD * min(medians):
            _log(ax)
        else:
            ax.set_ylim(0, 1.1 * ax.get_ylim()[1])
        ax.grid(alpha=0.3)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    first = next(iter(own.values())).iloc[0]
    title = f"Latency behind k prompt vectors, {first.seq_len} tokens, {first.device}; median and quartiles"
    note = stand_ins(results.table(paper.entries("figure6")))
    figure.suptitle("\n".join([title, *textwrap.wrap(note, 125)]), fontsize=11)
    return figure


# ------------------------------------------------------------------------ cosines


def _cosines(name: str, found: Found) -> Figure:
    """How near the vocabulary comes to the vectors of a learned prompt."""
    [measured] = [m for m in found.values() if m is not None]
    bars: dict[str, Any] = json_artifact(measured.first.run_id, "neighbours.json")["histogram"]
    edges, counts = np.array(bars["edges"]), np.array(bars["counts"])
    there = np.flatnonzero(counts)
    line = float(paper.spec(name)["below"])
    figure, ax = plt.subplots(figsize=(6.4, 4), layout="constrained")
    ax.bar(edges[:-1], counts / counts.sum() * 100, width=np.diff(edges), align="edge", color=BLUE, edgecolor="white")
    ax.axvline(line, color=RED, linestyle="--", label=f"{line}: nearly all lie below it in the paper")
    low, high = min(edges[there[0]], line), max(edges[there[-1] + 1], line)
    ax.set_xlim(low - 0.05, high + 0.05)
    ax.set_xlabel("Cosine with the 100 nearest vocabulary rows")
    ax.set_ylabel("Share of all pairs (%)")
    figure.legend(loc="outside lower center", frameon=False)
    ax.grid(alpha=0.3)
    figure.suptitle(_wrapped(name, found, 2), fontsize=11)
    return figure
