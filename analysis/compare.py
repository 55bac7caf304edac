"""`python -m analysis.compare GRID`: every number of the paper beside ours, with a verdict.

Perplexities behind a prompt are compared by `ppl_paper`, which divides the summed loss by all positions, the prompt's
too, as the code behind the paper's tables does. `ppl` divides by the scored tokens alone: it is the one to draw
conclusions from, and without a prompt both are the same.
"""

import argparse
import math
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from ctp.common.exit_codes import Exit, fail
from ctp.common.terminal import aligned, unread
from ctp.storage.remote import StoreError

from . import command, coverage, paper
from .comparable import incomparable
from .paper import HIGHER_IS_BETTER, PaperNumber
from .results import Measured, Results
from .runs import AnalysisError

VERDICTS = OK, BETTER, WORSE, OTHER, MISSING = "ok", "better", "worse", "not comparable", "not run"
TOLERANCE = 0.05  # relative, of perplexities
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
    return [line for table in paper.tables() for line in judged(results, table, tolerance)]


def judged(results: Results, table: str, tolerance: float) -> list[Line]:
    """The same for one table or figure."""
    numbers = [e for e in paper.entries(table) if e.value is not None]
    return [judge(number, measured, tolerance) for number, measured in results.table(numbers).items()]


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


def shown(line: Line) -> list[str]:
    """Name, ours, ours by the paper's denominator, the paper's, difference and verdict, as text."""
    number = line.number
    spread = f" ± {line.std:.2g}" if line.n > 1 else ""
    percent = "-" if line.percent is None else f"{line.percent:+.1f} %"
    reason = f": {line.reason}" if line.reason else ""
    ours = [number.digits(line.ours) + spread, number.digits(line.ppl_paper)]
    return [number.name, *ours, number.digits(number.value), percent, line.verdict + reason]


def show(lines: list[Line]) -> None:
    """Print them as a table, then how often each verdict fell."""
    head = ["number", "ours", "ppl_paper", "paper", "difference", "verdict"]
    rows = [shown(line) for line in lines]
    print("\n".join(aligned([head, *rows], left=(0, 5))))
    counts = Counter(line.verdict for line in lines)
    print("\n" + ", ".join(f"{counts[v]} {v}" for v in VERDICTS))


def write_csv(lines: list[Line], file: Path) -> None:
    """One line per number of the paper, every digit kept."""
    rows = [
        {"table": line.number.table, "row": ", ".join(line.number.row), "column": line.number.column,
         "metric": line.number.metric, "ours": line.ours, "ppl_paper": line.ppl_paper, "std": line.std, "runs": line.n,
         "paper": line.number.value, "paper_stderr": line.number.stderr, "difference_percent": line.percent,
         "verdict": line.verdict, "reason": line.reason}
        for line in lines
    ]  # fmt: skip
    file.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_csv(file, index=False)


def _tolerance(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text}: a fraction from 0 to 1, for example 0.05")
    return value


def parser() -> argparse.ArgumentParser:
    p = command.parser("compare", __doc__, default="full_paper")
    p.add_argument(
        "--tolerance", type=_tolerance, default=TOLERANCE, help="relative, of perplexities (default %(default)s)"
    )
    p.add_argument("--csv", metavar="FILE", type=Path, help="write the lines there too")
    p.add_argument("--coverage", action="store_true", help="only check that the grid file has a cell for every number; "
                   "needs no run")  # fmt: skip
    p.add_argument("--data", metavar="DIR", help="with --coverage, as in ctp.grid")
    return p


@unread
def main(argv: list[str] | None = None) -> int:
    """Print the comparison; returns 1 where a comparable number is worse, 2 where nothing can be read, else 0."""
    args = parser().parse_args(argv)
    if args.coverage:
        return coverage.main(args.grid, args.data)
    try:
        lines = compare(command.results(args), args.tolerance)
    except (AnalysisError, StoreError) as e:
        return fail(Exit.USAGE, str(e))
    show(lines)
    if args.csv:
        write_csv(lines, args.csv)
    return Exit.FAILED if any(line.verdict == WORSE for line in lines) else Exit.OK


if __name__ == "__main__":
    sys.exit(main())
