"""`python -m analysis.figures GRID`: the paper's figures from our runs, as PNG and PDF, read from MLflow alone.

Perplexities are over scored tokens. Figures 1, 7 and 8 are answers in words: see analysis.tables.
"""

import argparse
import sys
from pathlib import Path

from ctp.common.exit_codes import Exit, fail
from ctp.common.terminal import unread
from ctp.storage.remote import StoreError

from . import attach, command
from .runs import AnalysisError

FIGURES = ("figure2", "figure3", "figure4", "figure5", "figure6", "figure9")


def parser() -> argparse.ArgumentParser:
    p = command.parser("figures", __doc__)
    p.add_argument("--figure", choices=FIGURES, help="this one only")
    p.add_argument("--out", type=Path, default=Path("results/figures"), metavar="DIR", help="default %(default)s")
    attach.add_option(p)
    return p


@unread
def main(argv: list[str] | None = None) -> int:
    """Draw the figures; returns 1 where the runs make none, or none of the chosen one."""
    args = parser().parse_args(argv)
    try:
        from . import plots
    except ImportError as e:
        return fail(Exit.FAILED, f"figures need matplotlib (pip install 'ctp[figures]'): {e}")
    drawn: list[Path] = []
    try:
        results = command.results(args)
        for name in [args.figure] if args.figure else FIGURES:
            figure = plots.draw(name, results)
            if figure is None:
                print(f"{name}: nothing that it shows has run")
                continue
            files = plots.save(figure, args.out / name)
            print("\n".join(map(str, files)))
            drawn += files
        if args.log and drawn:
            attach.log(args.grid, {f"figures/{file.name}": file for file in drawn})
    except (AnalysisError, StoreError) as e:
        return fail(Exit.FAILED, str(e))
    return Exit.OK if drawn else Exit.FAILED


if __name__ == "__main__":
    sys.exit(main())
