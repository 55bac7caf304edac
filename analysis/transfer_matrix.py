"""`python -m analysis.transfer_matrix GRID`: source x target perplexity for each data set, read from MLflow alone.

A row says where the prompt was learned, a column what it stands in front of. `ppl` is over scored tokens and is the one
to compare; `ppl_paper` counts the prompt's positions too, as the paper's tables do, and is for those tables only.
"""

import argparse
import re
import sys
from pathlib import Path

import pandas as pd

from ctp.common.exit_codes import Exit, fail
from ctp.common.messages import plain
from ctp.common.terminal import unread
from ctp.storage.remote import StoreError

from . import command
from .runs import AXES, NUMBERS, SOURCE, AnalysisError, check_alike, evaluations

NO_PROMPT, REFERENCE = "no prompt", "dense, no prompt"


def label(row: pd.Series) -> str:
    """How a row of the matrix is called."""
    if row.source == "none":
        return NO_PROMPT
    if row.adapter:
        return f"{row.source} {row.recovery}-{row.adapter}" + (f", k={row.k}" if row.k else "")
    if row.recovery != "soft_prompt":  # LoRA and what is not trained: their own names, whatever the seed
        return f"{row.source} {without_seed(row.recovery_label)}"
    return f"{row.source} prompt, k={row.k}" + (f", {row.learned_on}" if row.learned_on else "")


def without_seed(label: str) -> str:
    """A recovery's label whatever its seed."""
    return re.sub("-seed[0-9]+$", "", label)


def matrix(table: pd.DataFrame, number: str) -> pd.DataFrame:
    """Sources x targets of one model and data set; mean over seeds. A pair that was not evaluated stays empty.

    Raises AnalysisError where two runs that differ in more than the seed claim one entry, or do not belong together.
    """
    check_alike(table)
    table = table.assign(row=table.apply(label, axis=1))
    entry = ["row", "target"]
    twice = table[table.duplicated([*entry, "seed"], keep=False)]
    if len(twice):
        first = twice[(twice[entry] == twice.iloc[0][entry]).all(axis=1)].drop(columns=[*NUMBERS, "run_id"])
        differ = [c for c in first.columns if first[c].nunique(dropna=False) > 1]
        raise AnalysisError(
            f"{len(first)} runs claim the entry {label(twice.iloc[0])} -> {twice.iloc[0].target}; they differ in "
            f"{', '.join(differ) or 'nothing'}: pick one with --where \"params.NAME = 'VALUE'\""
        )
    pivot = table.pivot_table(index="row", columns="target", values=number)
    prompts = [r for r in pivot.index if r != NO_PROMPT]
    targets = sorted(pivot.columns, key=lambda t: (t != "dense", t))
    out = pivot.reindex(index=[NO_PROMPT, *prompts], columns=targets)
    if "dense" in out.columns and bool(out["dense"].notna()[NO_PROMPT]):
        reference = pd.DataFrame([[out["dense"][NO_PROMPT]] * len(targets)], index=[REFERENCE], columns=targets)
        out = pd.concat([reference, out])
    return out.rename_axis(index="source", columns="target")


def spread(table: pd.DataFrame, number: str) -> pd.DataFrame:
    """`matrix` as text: the mean and, of several seeds, ± their standard deviation (n - 1) and how many they are."""
    out = matrix(table, number).map(lambda v: "-" if pd.isna(v) else _short(v))
    seeds = table.assign(row=table.apply(label, axis=1)).groupby(["row", "target"])[number].agg(["mean", "std", "size"])
    for row, target in seeds.index[seeds["size"] > 1]:
        mean, std, n = seeds.loc[(row, target)]
        out.at[row, target] = f"{_short(mean)} ± {_short(std)} ({n:.0f})"
    return out


def show(grid: str, table: pd.DataFrame) -> None:
    """Print every matrix of the table, both perplexities."""
    for group, rows in table.groupby(AXES):
        model, dataset, split, seq_len = group
        tokens = int(rows.scored_tokens.iloc[0])
        print(f"\n{grid}: {model} on {dataset} ({split}, windows of {seq_len}, {tokens:,} scored tokens)")
        for number, note in (("ppl", "over scored tokens"), ("ppl_paper", "the paper's denominator, for its tables")):
            print(f"\n{number} ({note})")
            print(plain(spread(rows, number).to_string(na_rep="-")))


def _short(value: float) -> str:
    return f"{value:.2f}" if value < 10_000 else f"{value:.3g}"


def parser() -> argparse.ArgumentParser:
    p = command.parser("transfer_matrix", __doc__)
    p.add_argument("--dataset", help="this data set only")
    p.add_argument("--where", default="", metavar="FILTER", help="one more MLflow filter: \"params.k = '16'\"")
    p.add_argument("--csv", metavar="FILE", help="default: results/transfer_matrix_GRID.csv")
    return p


@unread
def main(argv: list[str] | None = None) -> int:
    """Print the matrices and write the CSV; returns the exit code (0, or 1 where the runs make no table)."""
    args = parser().parse_args(argv)
    try:
        command.connect(args)
        table = evaluations(args.grid, args.where, dataset=args.dataset or "")
        show(args.grid, table)
    except (AnalysisError, StoreError) as e:
        return fail(Exit.FAILED, str(e))
    path = Path(args.csv or f"results/transfer_matrix_{args.grid}.csv")
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = [*AXES, *SOURCE, "seed", "target", *NUMBERS, "run_id"]
    table.sort_values(columns[:-1])[columns].to_csv(path, index=False)
    print(f"\nWritten to {path}")
    return Exit.OK


if __name__ == "__main__":
    sys.exit(main())
