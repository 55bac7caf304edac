"""The simulation behind benchmarks.predict against a run that happened: a finished store, on CPU slots.

    python -m benchmarks.backtest STORE [--slots N] [--threads N]

Prints the seconds from the first cell's start to the last one's end, as the store's manifests tell; what the simulation
makes of the same cells with the seconds that each one took: the error of the simulation; and with the times fitted to
them (benchmarks/celltimes.py): the error of that in addition. Only a store that one run filled tells anything.
"""

import argparse
import sys
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

from benchmarks.celltimes import facts_of, kind, matmul_speed, measured, model_of, number_format
from benchmarks.simulate import Machines, simulate
from ctp.cells.cell import from_json
from ctp.planning import cost
from ctp.planning.graph import Node, Plan
from ctp.planning.gridfile import Grid
from ctp.planning.resources import alone
from ctp.storage.catalog import entries
from ctp.storage.remote import StoreError
from ctp.storage.store import Store


def plan_of(store: Store) -> tuple[Plan, dict[str, float], float]:
    """The graph of what is in a store; the seconds of every cell; from the first one's start to the last one's end."""
    found = {e.key: e.manifest for e in entries(store)}
    facts = facts_of(entries(store))
    nodes: dict[str, Node] = {}

    def add(k: str) -> None:
        if k in nodes:
            return
        for i in found[k]["inputs"]:
            add(i)
        cell = from_json(found[k])
        nodes[k] = Node(cell, k, tuple(found[k]["inputs"]), (), facts[model_of(cell)])

    for k in found:
        add(k)
    if not nodes:
        raise ValueError(f"{store.uri}: nothing is done there")
    ends = [m["created"] for m in found.values()]
    span = max(ends) - min(m["created"] - m["seconds"] for m in found.values())
    plan = Plan("store", Grid("store", Path("store.yaml"), "", (), {}), nodes)
    return plan, {k: m["seconds"] for k, m in found.items()}, span


def wall(plan: Plan, seconds: Mapping[str, float], slots: int) -> float:
    """Seconds of the plan on one machine of so many cores, a core a cell, all for what runs alone."""
    bundles = {k: {"CPU": float(slots if alone(n.cell) else 1)} for k, n in plan.nodes.items()}
    machine = Machines(1, 0, slots)
    return simulate(plan, bundles, machine, slots, lambda cells, _: [(seconds[k], 0.0) for k in cells]).wall


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("store", metavar="STORE")
    p.add_argument("--slots", type=int, default=2, metavar="N", help="trials at once that the run had (default 2)")
    p.add_argument("--threads", type=int, default=1, metavar="N", help="threads a cell had (default 1)")
    args = p.parse_args(argv)
    try:
        store = Store(args.store)
        plan, seconds, span = plan_of(store)
        speed = lru_cache(lambda dtype: matmul_speed(dtype, args.threads))
        paces = measured(store, speed)
    except (StoreError, ValueError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    fitted = {
        k: sum(paces[kind(n.cell)].seconds(cost.of(n.cell, n.facts).flops, speed(number_format(n.cell))))
        for k, n in plan.nodes.items()
    }
    print(f"{len(plan.nodes)} cells, {sum(seconds.values()):.0f} s in all, on {args.slots} slots\n")
    print(f"| | seconds | against the run |\n|---|---|---|\n| the run | {span:.0f} | |")
    for name, times in (("simulated, each cell as long as it was", seconds), ("simulated, fitted times", fitted)):
        took = wall(plan, times, args.slots)
        print(f"| {name} | {took:.0f} | {took / span - 1:+.1%} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
