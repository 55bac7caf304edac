"""One grid of sleeping cells on 1, 2, 4 and 8 simulated nodes: how much of the ideal speed-up the scheduler leaves.

    python -m benchmarks.scaling [--nodes 1 2 4 8] [--compressions N] [--seconds COMPRESS LEARN MEASURE]

The nodes are Ray's own (`ray.cluster_utils.Cluster`: a head that runs no trials, and n nodes of one core), all on
this machine; the grid runs through `ctp.scheduling.tune.run` with a store in a local folder. A cell sleeps and
publishes a small artifact. `seconds` begins when every slot has a process that waits for its first cell, and ends
with the last cell. Not in it: starting the nodes (`nodes up`), and from the call of `run` until that moment (`workers
up`: Ray's processes, each of which imports ctp and Ray), since all of them start on this machine's cores and not on
n machines'. Processes that start later, because Tune lets idle ones go, are in it; `processes` counts all.

ideal: seconds of all cells / nodes, above the longest path of the default grid. efficiency: ideal / seconds. speed-up:
against the first row's number of nodes.
"""

import argparse
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

from benchmarks.report import head, row
from benchmarks.sleeping import WORKER, seconds, transfer_grid
from ctp.cells.events import Done, Event
from ctp.cells.runtime import Runtime
from ctp.planning.graph import Plan
from ctp.planning.resources import Resources
from ctp.scheduling import tune
from ctp.scheduling.options import Options
from ctp.storage.store import Store

OBJECTS = 80 * 2**20  # bytes of each node's object store: nothing goes through it
HEAD = ("nodes", "cells", "seconds", "ideal", "speed-up", "efficiency", "nodes up", "workers up", "processes")


@dataclass(frozen=True)
class Ran:
    """One run. Seconds: nodes_up, workers_up, took, ideal. processes: that ran cells."""

    cells: int
    nodes_up: float
    workers_up: float
    took: float
    ideal: float
    processes: int


def run(nodes: int, compressions: int, lengths: tuple[float, float, float]) -> Ran:
    """The grid on a fresh cluster and store. Raises RuntimeError where a cell fails."""
    with tempfile.TemporaryDirectory(prefix="ctp-scaling-") as folder:
        gate, place = Path(folder, "gate"), Store(f"{folder}/store")
        gate.mkdir()
        plan = transfer_grid(compressions, lengths, nodes, gate)
        begun = time.monotonic()
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": OBJECTS})
        try:
            for _ in range(nodes):
                cluster.add_node(wait=False, num_cpus=1, object_store_memory=OBJECTS)
            cluster.wait_for_nodes()
            up = time.monotonic()
            warm, end = _timed(plan, place, cluster.address)
        finally:
            ray.shutdown()
            cluster.shutdown()
        ideal = sum(seconds(n.cell) for n in plan.nodes.values()) / nodes
        processes = {place.manifest(r)["metrics"]["process"] for r in plan.refs()}
        return Ran(len(plan.nodes) - nodes, up - begun, warm - up, end - warm, ideal, len(processes))


def _timed(plan: Plan, store: Store, address: str) -> tuple[float, float]:
    """When the first gate opened and when the last cell was done."""
    done: list[float] = []

    def on_event(event: Event) -> None:
        if isinstance(event, Done):
            done.append(time.monotonic())

    outcome = tune.run(plan, set(plan.nodes), set(), store=store.uri, runtime=Runtime(device="cpu", plugins=WORKER),
                           options=Options(Resources(1), address, insecure=True, fail_fast=True),
                           on_event=on_event)  # fmt: skip
    if outcome.done != set(plan.nodes):
        raise RuntimeError(f"{len(outcome.done)} of {len(plan.nodes)} cells are done: {outcome.failed}")
    return done[0], done[-1]


def line(nodes: int, ran: Ran, first: tuple[int, Ran]) -> str:
    """A row of the table."""
    speed = first[0] * first[1].took / ran.took
    cells = (nodes, ran.cells, f"{ran.took:.1f}", f"{ran.ideal:.1f}", f"{speed:.2f}", f"{ran.ideal / ran.took:.0%}",
             f"{ran.nodes_up:.1f} s", f"{ran.workers_up:.1f} s", ran.processes)  # fmt: skip
    return row(cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 2, 4, 8], metavar="N")
    parser.add_argument("--compressions", type=int, default=8, metavar="N", help="and as many prompts (default 8)")
    parser.add_argument("--seconds", type=float, nargs=3, default=[1, 2, 0.75], metavar="S", help="default 1 2 0.75")
    args = parser.parse_args()
    lengths = (args.seconds[0], args.seconds[1], args.seconds[2])
    print(f"{os.cpu_count()} cores for all nodes; Ray {ray.__version__}\n")
    print(head(HEAD), flush=True)
    first: tuple[int, Ran] | None = None
    for nodes in args.nodes:
        ran = run(nodes, args.compressions, lengths)
        first = first or (nodes, ran)
        print(line(nodes, ran, first), flush=True)


if __name__ == "__main__":
    main()
