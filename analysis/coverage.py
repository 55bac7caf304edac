"""Does a grid file have a cell for every number of the paper? Needs no run, no MLflow and no network."""

import sys

import pandas as pd

from ctp.cells.labels import params
from ctp.common.exit_codes import Exit
from ctp.planning import gridfile
from ctp.planning.graph import Plan
from ctp.planning.gridtext import GridError
from ctp.planning.pins import Pins
from ctp.planning.plan import make

from . import paper
from .comparable import incomparable
from .paper import PaperNumber
from .results import Results
from .roles import of_grid
from .runs import AnalysisError, typed


def planned(plan: Plan) -> Results:
    """The cells of a plan as if they were finished runs; they have no numbers."""
    rows = [
        {n: str(v) for n, v in params(node.cell).items()} | {"run_id": node.key[:12], "studies": node.studies}
        for node in plan.nodes.values()
    ]
    return Results(typed(pd.DataFrame(rows)), *of_grid(plan.grid.text))


def covered(plan: Plan) -> dict[PaperNumber, str]:
    """Every entry of the paper -> "" where the plan has its cell, by the paper's settings; else what is wrong."""
    results = planned(plan)
    out = {}
    for table in paper.tables():
        for entry in paper.entries(table):
            try:
                measured = results.of(entry)
                out[entry] = "no cell" if measured is None else incomparable(entry, measured.first)
            except AnalysisError as e:
                out[entry] = str(e)
    return out


def main(grid: str, data: str | None) -> int:
    """Print how many entries of each table have their cell, and which have none; returns 1 where one has none."""
    pins = Pins(data, provisional=True)
    try:
        plan = make(gridfile.load(grid, [], pins), pins)
    except GridError as e:
        print(f"error: {e}", file=sys.stderr)
        return Exit.USAGE
    found = covered(plan)
    print(f"{plan.name}: {len(plan.nodes)} cells\n\n{'':9} numbers  drawn  cells")
    for table in paper.tables():
        own = [e for e in found if e.table == table]
        printed = sum(e.value is not None for e in own)
        print(f"{table:9} {printed:7}  {len(own) - printed:5}  {sum(not found[e] for e in own):5}")
    missing = {e: why for e, why in found.items() if why}
    for entry, why in missing.items():
        print(f"missing: {entry.name}: {why}")
    numbers = sum(e.value is not None for e in found)
    print(f"\n{len(found)} entries ({numbers} printed numbers), {len(found) - len(missing)} with their cell")
    return Exit.FAILED if missing else Exit.OK
