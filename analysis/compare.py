"""`python -m analysis.compare GRID`: every number of the paper beside ours, with a verdict.

Perplexities behind a prompt are compared by `ppl_paper`, which divides the summed loss by all positions, the prompt's
too, as the code behind the paper's tables does. `ppl` divides by the scored tokens alone: it is the one to draw
conclusions from, and without a prompt both are the same.
"""

import argparse
import csv
import math
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ctp.common.terminal import aligned, unread
from ctp.storage.remote import StoreError

from . import command, coverage, paper
from .comparable import incomparable
from .paper import HIGHER_IS_BETTER, PaperNumber
from .results import Measured, Results
from .runs import AnalysisError

OK, BETTER, WORSE, OTHER, MISSING = "ok", "better", "worse", "not comparable", "not run"
STANDARD_ERRORS = 2  # accuracies this many combined standard errors apart, or less, agree


@dataclass(frozen=True)
class Line:
    """A number of the paper and ours. ours: None where not run. ppl_paper: perplexities only."""

    number: PaperNumber
    verdict: str
    reason: str = ""
    ours: float | None = None
    ppl_paper: float | None = None
    std: float = 0.0
    n: int = 0

    @property
    def compared(self) -> float | None:
        """Which of our numbers stands against the paper's."""
        return self.ppl_paper if self.number.metric == "ppl" and self.number.has_prompt else self.ours

    @property
    def percent(self) -> float | None:
        """How far ours is from the paper's."""
        if self.compared is None or not self.number.value:
            return None
        return 100 * (self.compared / self.number.value - 1)


def compare(results: Results, tolerance: float) -> list[Line]:
    """A line for each number of the paper. Raises AnalysisError where runs do not belong in one table."""
    out = []
    for table in paper.tables():
        numbers = [e for e in paper.entries(table) if e.value is not None]
        out += [judge(number, measured, tolerance) for number, measured in results.table(numbers).items()]
    return out


def judge(number: PaperNumber, measured: Measured | None, tolerance: float) -> Line:
    """Verdict on one number. tolerance: relative, for perplexities; half a unit of the last printed digit is added."""
    if measured is None:
        return Line(number, MISSING)
    metric = number.metric
    facts: dict[str, Any] = {"ours": measured.mean(metric), "std": measured.std(metric), "n": measured.n}
    if metric == "ppl":
        facts["ppl_paper"] = measured.mean("ppl_paper")
    if reason := incomparable(number, measured.first):
        return Line(number, OTHER, reason, **facts)
    assert number.value is not None
    line = Line(number, OK, **facts)
    assert line.compared is not None
    gap = line.compared - number.value
    if number.exact:
        allowed = 0.0
    elif metric == "score":
        assert number.stderr is not None
        allowed = STANDARD_ERRORS * math.hypot(number.stderr, measured.mean("score_stderr"))
    else:
        allowed = tolerance * number.value + number.rounding
    if abs(gap) <= allowed:
        return line
    good = not number.exact and (gap > 0) == (metric in HIGHER_IS_BETTER)
    return Line(number, BETTER if good else WORSE, **facts)


def _number(value: float | None, number: PaperNumber) -> str:
    if value is None:
        return "-"
    if number.exact:
        return f"{value:,.0f}"
    return f"{value:.3f}" if number.metric == "score" else f"{value:.2f}" if value < 100_000 else f"{value:.3g}"


def shown(line: Line) -> list[str]:
    """Name, ours, ours by the paper's denominator, the paper's, difference and verdict, as text."""
    number = line.number
    spread = f" ± {line.std:.2g}" if line.n > 1 else ""
    percent = "-" if line.percent is None else f"{line.percent:+.1f} %"
    reason = f": {line.reason}" if line.reason else ""
    ours = [_number(line.ours, number) + spread, _number(line.ppl_paper, number)]
    return [number.name, *ours, _number(number.value, number), percent, line.verdict + reason]


def show(lines: list[Line]) -> None:
    """Print them as a table, then how often each verdict fell."""
    head = ["number", "ours", "ppl_paper", "paper", "difference", "verdict"]
    rows = [shown(line) for line in lines]
    print("\n".join(aligned([head, *rows], left=(0, 5))))
    counts = Counter(line.verdict for line in lines)
    print("\n" + ", ".join(f"{counts[v]} {v}" for v in (OK, BETTER, WORSE, OTHER, MISSING)))


def write_csv(lines: list[Line], file: Path) -> None:
    """One line per number of the paper, every digit kept."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(["table", "row", "column", "metric", "ours", "ppl_paper", "std", "runs", "paper",
                         "paper_stderr", "difference_percent", "verdict", "reason"])  # fmt: skip
        for line in lines:
            n = line.number
            writer.writerow([n.table, ", ".join(n.row), n.column, n.metric, line.ours, line.ppl_paper, line.std, line.n,
                             n.value, n.stderr, line.percent, line.verdict, line.reason])  # fmt: skip


def _tolerance(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text}: a fraction from 0 to 1, for example 0.05")
    return value


@unread
def main(argv: list[str] | None = None) -> int:
    """Print the comparison; returns 1 where a comparable number is worse, 2 where nothing can be read, else 0."""
    p = command.parser("compare", __doc__, default="full_paper")
    p.add_argument("--tolerance", type=_tolerance, default=0.05, help="relative, of perplexities (default %(default)s)")
    p.add_argument("--csv", metavar="FILE", type=Path, help="write the lines there too")
    p.add_argument("--coverage", action="store_true", help="only check that the grid file has a cell for every number; "
                   "needs no run")  # fmt: skip
    p.add_argument("--data", metavar="DIR", help="with --coverage, as in ctp.grid")
    args = p.parse_args(argv)
    if args.coverage:
        return coverage.main(args.grid, args.data)
    try:
        lines = compare(command.results(args), args.tolerance)
    except (AnalysisError, StoreError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    show(lines)
    if args.csv:
        write_csv(lines, args.csv)
    return 1 if any(line.verdict == WORSE for line in lines) else 0


if __name__ == "__main__":
    sys.exit(main())
