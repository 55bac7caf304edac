"""`python -m analysis.tables GRID`: the paper's tables, ours beside the paper's, read from MLflow alone.

`ppl` is over scored tokens and is the one to compare; `ppl_paper` counts the prompt's positions too, as the paper's
numbers do. Figure 5's matrices, the case studies (figures 1, 7, 8) and the nearest words (figure 9) are tables too.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from ctp.common.exit_codes import Exit, fail
from ctp.common.terminal import unread
from ctp.storage.remote import StoreError

from . import attach, command, paper
from .paper import PaperNumber
from .render import FORMATS, Table, markdown
from .results import Found, Measured, Results, stand_ins
from .runs import AnalysisError, json_artifact

TABLES = ("table1", "table2", "table3", "table5", "table6", "table7", "table8", "figure5")
CASES = ("figure1", "figure7", "figure8")
WORDS = "figure9"
ALL = (*TABLES, *CASES, WORDS)
SHOWN = {"ppl": ("ppl", "ppl_paper", "paper"), "score": ("ours", "paper"), "trainable_parameters": ("ours", "paper")}
DATA_HEAD: list[object] = ["table", "row", "column", "metric", "ours", "ppl_paper", "std", "runs", "stderr", "paper",
                           "paper_stderr", "run_ids"]  # fmt: skip


def build(name: str, results: Results) -> Table:
    """One table of the paper. Raises AnalysisError where runs do not belong in one table."""
    if name in TABLES:
        found = results.table(paper.entries(name))
        return _stacked(name, found) if name == "figure5" else _side_by_side(name, found)
    return nearest_words(name, results) if name == WORDS else case_study(name, results)


# ------------------------------------------------------------------------ numbers


def _side_by_side(name: str, found: Found) -> Table:
    """In the paper's layout, each of its columns as ours and the paper's."""
    metrics = {e.column: e.metric for e in found}
    columns = [(c, what) for c in _columns(name) if c in metrics for what in SHOWN[metrics[c]]]
    rows = _rows(name)
    labels = max(map(len, rows))
    by_place = {(e.row, e.column): e for e in found}
    body = []
    for row in rows:
        entries = [(by_place.get((row, c)), what) for c, what in columns]
        cells = ["NA" if e is None else _cell(e, found[e], what) for e, what in entries]
        body.append([*row, *[""] * (labels - len(row)), *cells])
    head = [""] * labels + [f"{c} {what}" for c, what in columns]
    return _table(name, found, head, body, labels=labels, data=_data(found))


def _stacked(name: str, found: Found) -> Table:
    """Matrices: each row of the paper's as three, ppl, ppl_paper and the paper's; the first one names the row."""
    columns = _columns(name)
    by_place = {(e.row, e.column): e for e in found}
    body = []
    for row in _rows(name):
        entries = [by_place[row, c] for c in columns]
        label = list(row)
        for what in SHOWN["ppl"]:
            body.append([*label, what, *(_cell(e, found[e], what) for e in entries)])
            label = [""] * len(row)
    head = ["text", "source", "", *columns]
    return _table(name, found, head, body, labels=3, data=_data(found))


def _table(name: str, found: Found, head: list[str], body: list[list[str]], *, labels: int, wide: bool = False,
           data: list[list[object]] | None = None) -> Table:  # fmt: skip
    """A table with the paper's title, and what has to be said of what was found."""
    title = paper.spec(name)["title"]
    return Table(name, title, head, body, labels, wide, stand_ins(found), _notes(found), data or [])


def _columns(name: str) -> list[str]:
    columns = paper.spec(name)["columns"]
    return [c.get("label") or paper.title(next(iter(c.values()))) for c in columns]


def _rows(name: str) -> list[tuple[str, ...]]:
    """The labels of its rows, each once."""
    return list(dict.fromkeys(tuple(row["label"]) for row in paper.spec(name)["rows"]))


def _cell(entry: PaperNumber, measured: Measured | None, what: str) -> str:
    if what == "paper":
        return entry.printed
    if measured is None:
        return "-"
    metric = "ppl_paper" if what == "ppl_paper" else entry.metric
    spread = ""
    if measured.n > 1 and not entry.exact:
        spread = f" ± {measured.std(metric):.2g} ({measured.n})"
    elif metric == "score" and "score_stderr" in measured.rows:
        spread = f" ± {measured.mean('score_stderr'):.3f}"
    return entry.digits(measured.mean(metric)) + spread


def _notes(found: Found) -> list[str]:
    there = [m for m in found.values() if m is not None]
    notes = []
    if any(e.metric == "ppl" for e in found):
        notes.append(
            "ppl: over scored tokens. ppl_paper: over all positions, the prompt's too, as the paper's numbers."
        )
    if any(m.n > 1 for m in there):
        notes.append("Means ± standard deviations over seeds, their number in brackets.")
    other = sorted({m.first.task for m in there if m.first.metric not in ("", "acc_norm")})
    if any(e.metric == "score" for e in found) and other:
        notes.append(f"Accuracy, not normalised, of which the harness has none there: {', '.join(other)}.")
    missing = [e.name.removeprefix(f"{e.table}: ") for e, m in found.items() if m is None]
    return notes + ([f"Not run ({len(missing)} of {len(found)}): {'; '.join(missing)}."] if missing else [])


def _data(found: Found) -> list[list[object]]:
    """A line for each entry, every digit kept."""
    rows: list[list[object]] = [DATA_HEAD]
    for e, m in found.items():
        ours: list[object] = [""] * 5
        if m is not None:
            paper_ppl = m.mean("ppl_paper") if e.metric == "ppl" else ""
            stderr = m.mean("score_stderr") if e.metric == "score" and "score_stderr" in m.rows else ""
            ours = [m.mean(e.metric), paper_ppl, m.std(e.metric), m.n, stderr]
        ids = "" if m is None else " ".join(m.rows.run_id)
        rows.append([e.table, ", ".join(e.row), e.column, e.metric, *ours, e.value, e.stderr, ids])
    return rows


# -------------------------------------------------------------------------- words


def case_study(name: str, results: Results) -> Table:
    """Questions down, models across; the answers of the first seed. The paper's questions for it, else all."""
    found = results.table(paper.entries(name))
    answers: dict[str, dict[str, str]] = {}
    for entry, measured in found.items():
        if measured is not None:
            for one in json_artifact(measured.first.run_id, "answers.json"):
                answers.setdefault(one["question"], {})[entry.column] = one["answer"].strip()
    chosen = [q for word in paper.spec(name)["questions"] for q in answers if word in q] or list(answers)
    columns = [e.column for e in found]
    body = [[q, *(answers[q].get(c, "-") for c in columns)] for q in chosen]
    return _table(name, found, ["Question", *columns], body, labels=0, wide=True)


def nearest_words(name: str, results: Results) -> Table:
    """Each prompt vector's nearest word, and how near the vocabulary comes at all."""
    found = results.table(paper.entries(name))
    [(_, measured)] = found.items()
    body = []
    if measured is not None:
        words = [readable(row) for row in json_artifact(measured.first.run_id, "neighbours.json")["nearest"]]
        below = paper.spec(name)["below"]
        body = [
            ["nearest words", ", ".join(f'"{w}"' for w in words)],
            ["different words", f"{len(set(words))} of {len(words)}"],
            ["largest cosine", f"{measured.mean('max_cosine'):.3f}"],
            [f"cosines below {below}", f"{100 * measured.mean('fraction_below_0.16'):.1f} %; in the paper nearly all"],
        ]
    return _table(name, found, ["", ""], body, labels=1, wide=True)


def readable(row: dict[str, Any]) -> str:
    """A word as text; as the tokenizer writes it where it is a part of a character, or nothing that can be seen."""
    word = str(row["word"])
    return word if word.strip() and word.isprintable() and "\ufffd" not in word else str(row["token"])


# ------------------------------------------------------------------------ command


def formats(text: str) -> list[str]:
    """`md,tex` -> names of formats."""
    chosen = text.split(",")
    if unknown := [f for f in chosen if f not in FORMATS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r}: allowed: {', '.join(FORMATS)}")
    return chosen


def parser() -> argparse.ArgumentParser:
    p = command.parser("tables", __doc__)
    p.add_argument("--table", choices=ALL, help="this one only")
    p.add_argument("--out", type=Path, default=Path("results/tables"), metavar="DIR", help="default %(default)s")
    p.add_argument("--format", type=formats, default=list(FORMATS), help=f"default {','.join(FORMATS)}")
    attach.add_option(p)
    return p


@unread
def main(argv: list[str] | None = None) -> int:
    """Print the tables and write the files; returns 1 where the runs make no table."""
    args = parser().parse_args(argv)
    try:
        results = command.results(args)
        tables = [build(name, results) for name in ([args.table] if args.table else ALL)]
        files = _write(tables, args.format, args.out)
        if args.log:
            attach.log(args.grid, files)
    except (AnalysisError, StoreError) as e:
        return fail(Exit.FAILED, str(e))
    return Exit.OK


def _write(tables: list[Table], kinds: list[str], folder: Path) -> dict[str, Path]:
    """Print the tables and write the files; returns these by the paths under which --log attaches them."""
    folder.mkdir(parents=True, exist_ok=True)
    files: dict[str, Path] = {}
    for table in tables:
        print(markdown(table))
        for kind in kinds:
            file = files[f"tables/{table.name}.{kind}"] = folder / f"{table.name}.{kind}"
            file.write_text(FORMATS[kind](table))
    print(f"Written to {folder}")
    return files


if __name__ == "__main__":
    sys.exit(main())
