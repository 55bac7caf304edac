"""`python -m analysis.report GRID`: all of a grid's results as one HTML file that needs nothing else and asks nobody.

What ran, the paper's tables with ours beside them, figures, answers, failures, cost and versions; read from MLflow, and
the packages from the store. Opens in any browser, light or dark, wide or narrow; tables sort where scripts may run.
"""

import argparse
import base64
import hashlib
import re
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ctp.common.exit_codes import Exit, fail
from ctp.common.terminal import duration, unread
from ctp.storage.remote import StoreError
from ctp.storage.store import Store

from .. import attach, command
from ..runs import AnalysisError
from . import facts, figures, words
from .findings import GLOSSARY, at_a_glance, headline, outcomes
from .read import Record, versions
from .table import STEPS, WHITE

LARGEST = 5_000_000  # bytes of a report
ROWS = (2000, 300, 50)  # of a table at most; the next where a report would be too large
SERIES = {"light": ["#c2410c", "#0b63b0", "#7b3fa8", "#8a5a00", "#0e6f83", "#b0175a", "#4b5563", "#7a4a3a"],
          "dark": ["#ff9a66", "#6cb6ff", "#d2a8ff", "#e3b341", "#5ed3e6", "#ff8fc0", "#aeb6c0", "#d8a894"]}  # fmt: skip
PALETTE = {
    "light": {"bg": "#ffffff", "soft": "#f4f6f8", "ink": "#1b1f24", "muted": "#55606b", "edge": "#d3d9e0",
              "accent": "#0a58ad", "ok": "#116329", "bad": "#a40e26", "rule": "#00704f", "shade": "#c3cad2"},
    "dark": {"bg": "#10151b", "soft": "#19212a", "ink": "#e7ebef", "muted": "#a3aeb9", "edge": "#36414d",
             "accent": "#7dbbff", "ok": "#7ee2a0", "bad": "#ff9f9b", "rule": "#5fd6a6", "shade": "#000000"},
}  # fmt: skip
CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")  # what HTML cannot say


def render(record: Record, found: list[dict[str, str]] | None = None) -> str:
    """The page; `found`: packages, as `versions` gives them. Long tables are cut where it would pass LARGEST.

    Runs that lack numbers, or do not belong in one table, are told in the place of what cannot be shown.
    """
    content = _content(record, found or [])
    page = ""
    for rows in ROWS:
        page = _page(content | {"most": rows})
        if len(page.encode()) <= LARGEST:
            return page
    raise AnalysisError(f"the report of {record.grid} would take {len(page.encode()):,} bytes; at most {LARGEST:,}")


def _page(content: dict[str, Any]) -> str:
    loader = PackageLoader(__package__, "templates")
    # autoescape for all there is: names, labels, answers and errors come from models and from strangers
    jinja = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    script, style = (jinja.loader.get_source(jinja, name)[0] for name in ("report.js", "report.css"))  # type: ignore[union-attr]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    own = {"script": Markup(script), "style": Markup(style + colours()), "digest": digest}
    return CONTROL.sub("\N{REPLACEMENT CHARACTER}", jinja.get_template("report.html").render(content | own))


def colours() -> str:
    """The palettes as style sheet: light, dark where the system is dark, either where it was chosen; light on paper."""
    named = {theme: ";".join(f"--{n}:{v}" for n, v in _named(theme).items()) for theme in PALETTE}
    light, dark = (f"color-scheme:{theme};{named[theme]}" for theme in ("light", "dark"))
    steps = "".join(f".heat td.h{i},.scale .h{i}{{background:var(--h{i});color:var(--i{i})}}\n"
                    for i in range(len(STEPS["light"])))  # fmt: skip
    return (f":root{{{light}}}\n@media (prefers-color-scheme:dark){{:root:not([data-theme=light]){{{dark}}}}}\n"
            f":root[data-theme=dark]{{{dark}}}\n@media print{{:root:root{{{light}}}}}\n{steps}")  # fmt: skip


def _named(theme: str) -> dict[str, str]:
    """Its colours by name; s0…: of series, h0…: of heat maps, i0…: of words on these."""
    named = PALETTE[theme] | {f"s{i}": c for i, c in enumerate(SERIES[theme])}
    for i, colour in enumerate(STEPS[theme]):
        named |= {f"h{i}": colour, f"i{i}": "#ffffff" if i in WHITE[theme] else "#000000"}
    return named


def _content(record: Record, found: list[dict[str, str]]) -> dict[str, Any]:
    finished, failed, learned = record.finished, facts.failures(record), outcomes(record)
    return {
        "grid": record.grid, "description": record.description, "text": record.text,
        "troubles": record.troubles,
        "written": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC", "finished": len(finished), "cells": len(record.cells),
        "failed": failed, "other": len(record.cells) - len(finished) - len(failed),
        "took": duration(finished.seconds.sum()),
        "last": facts.when(int(record.cells.end.max()) if len(record.cells) else 0),
        "commits": sorted({c[:12] for c in record.cells.commit if c}),
        "glance": at_a_glance(learned), "headline": headline(learned), "glossary": GLOSSARY,
        "ran": facts.what_ran(record),
        "compressions": figures.compressions(record), "transfer": figures.transfer(record),
        "perplexities": facts.perplexities(record), "paper": facts.against_paper(record),
        "denominators": facts.DENOMINATORS, "tasks": facts.tasks(record),
        "learning": figures.learning(record), "latency": words.latency(record),
        "neighbours": words.neighbours(record), "answers": _or_trouble(lambda: words.answers(record)),
        "cost": facts.cost(record), "provenance": facts.provenance(record, found),
    }  # fmt: skip


def _or_trouble(make: Callable[[], Any]) -> Any:
    """What it makes, or the sentence that says why it cannot."""
    try:
        return make()
    except AnalysisError as e:
        return str(e)


def parser() -> argparse.ArgumentParser:
    p = command.parser("report", __doc__)
    p.add_argument("--out", type=Path, metavar="FILE", help="default results/report_GRID.html")
    attach.add_option(p)
    return p


@unread
def main(argv: list[str] | None = None) -> int:
    """Write the report; returns 1 where MLflow has nothing to tell."""
    args = parser().parse_args(argv)
    try:
        command.connect(args)
        record = Record(args.grid)
        file = args.out or Path(f"results/report_{args.grid}.html")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(render(record, versions(record.cells, Store(args.store))), encoding="utf-8")
        print(file)
        if args.log:
            attach.log(args.grid, {"report.html": file})
    except (AnalysisError, StoreError) as e:
        return fail(Exit.FAILED, str(e))
    return Exit.OK
