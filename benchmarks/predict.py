"""A grid's run on N GPUs, predicted: wall time, longest path, idle share, bytes moved, and what limits it.

    python -m benchmarks.predict [GRID] [--gpus 8 64] [--tflops N] [--gpu-memory GIB] ...

Nothing runs and no GPU is measured: ctp's own search hands the grid's cells to simulated machines
(benchmarks/simulate.py states the assumptions). A cell takes its operations by the cost model (ctp/planning/cost.py) at
--tflops, plus 10 s, plus the time to read its model at --read GB/s, once per task.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.report import head, row
from benchmarks.simulate import Machines, Run, simulate
from ctp.cells import Dense
from ctp.cells.cell import Evaluate, key
from ctp.cells.labels import slug
from ctp.common.terminal import duration
from ctp.planning import cost, gridfile
from ctp.planning.cost import BYTES
from ctp.planning.graph import Node, Plan, longest_path
from ctp.planning.gridtext import GridError
from ctp.planning.pins import Pins
from ctp.planning.plan import make
from ctp.planning.resources import GIB, Resources, bundles

CLOSE = 1.1  # a run within 10 % of a bound is limited by that bound
SET_UP = 10.0  # seconds a cell takes besides reading and computing: an assumption


@dataclass(frozen=True)
class Loads:
    """What a cell reads, in bytes. model: of its target or source; learned: of a prompt or adapter.

    source: the key of the artifact that the model comes from; its name where it is the model itself, downloaded.
    """

    model: float
    source: str
    learned: float
    downloaded: bool


@dataclass(frozen=True)
class Predicted:
    """One number of GPUs. Seconds, bytes and bytes a second; busy is a share of all GPU-seconds."""

    gpus: int
    run: Run
    work: float
    path: float
    written: float
    read: float
    read_cached: float
    peak: float
    downloaded: float

    @property
    def busy(self) -> float:
        return self.run.busy / (self.run.wall * self.gpus)

    @property
    def limit(self) -> str:
        """What one would have to change for a shorter run."""
        if self.run.wall <= CLOSE * self.path:
            return "the longest path: more GPUs change nothing"
        if self.run.wall <= CLOSE * self.work / self.gpus:
            return "the GPUs: more of them make it shorter"
        return "how the cells fit together: GPUs idle while the last ones end"


class Forecast:
    """A plan with the seconds and bytes of its cells. read: bytes a second. memory: bytes of a GPU."""

    def __init__(self, plan: Plan, tflops: float, read: float, memory: int) -> None:
        self.plan, self.read, self.memory = plan, read, memory
        self.costs = {k: cost.of(n.cell, n.facts) for k, n in plan.nodes.items()}
        self.loads = {k: self._loads(n) for k, n in plan.nodes.items()}
        self.computing = {k: c.flops / (tflops * 1e12) for k, c in self.costs.items()}

    def _loads(self, node: Node) -> Loads:
        cell = node.cell
        base = cell.base
        learned = self.costs[key(cell.recovery)].stored if isinstance(cell, Evaluate) and cell.recovery else 0.0
        if base is not cell and not isinstance(base.compression, Dense):
            return Loads(self.costs[key(base)].stored, key(base), learned, downloaded=False)
        only_named = base is cell and isinstance(base.compression, Dense)  # only its location is stored
        size = 0.0 if only_named else node.facts.parameters * BYTES[base.model.dtype]
        return Loads(size, base.model.name, learned, downloaded=True)

    def segments(self, cells: list[str], machine: int = 0) -> list[tuple[float, float]]:
        """(hold, compute) of the cells of a task: the first one loads the model."""
        moved = [self.loads[k].learned + (self.loads[k].model if i == 0 else 0.0) for i, k in enumerate(cells)]
        return [(SET_UP + m / self.read, self.computing[k]) for k, m in zip(cells, moved, strict=True)]

    def alone(self) -> dict[str, float]:
        """Seconds of every cell by itself on a GPU."""
        return {k: sum(self.segments([k])[0]) for k in self.plan.nodes}

    def on(self, gpus: int, per_machine: int, cores: int) -> Predicted:
        """Simulate so many GPUs. Raises ValueError where the machines are not all full."""
        if gpus < 1 or per_machine < 1 or cores < 1:
            raise ValueError(f"--gpus {gpus}, --machine {per_machine}, --cores {cores}: at least 1 of each")
        if gpus % min(gpus, per_machine):
            raise ValueError(f"--gpus {gpus}: not a multiple of --machine {per_machine}")
        machines = Machines(-(-gpus // per_machine), min(gpus, per_machine), cores)
        taken = bundles(self.plan, Resources(1, self.memory), True, 4, cores)
        whole = {k: max(1.0, b["GPU"]) for k, b in taken.items()}
        slots = max(1, min(machines.number * cores, int(gpus / max(b["GPU"] for b in taken.values()))))
        run = simulate(self.plan, taken, machines, slots, self.segments)
        work = sum(self.computing[k] * whole[k] for k in self.plan.nodes)
        return Predicted(gpus, run, work, longest_path(self.plan, self.alone())[0],
                         sum(c.stored for c in self.costs.values()), *self._traffic(run))  # fmt: skip

    def _traffic(self, run: Run) -> tuple[float, float, float, float]:
        """Bytes read from the store, the same with a cache on every machine, the peak a second, bytes downloaded."""
        read = 0.0
        cached: dict[tuple[int, str], float] = {}  # machine and artifact
        downloads: dict[tuple[int, str], float] = {}
        changes: list[tuple[float, int]] = []
        for task in run.tasks:
            first = self.loads[task.cells[0]]
            kept = downloads if first.downloaded else cached
            kept[task.machine, first.source] = max(first.model, kept.get((task.machine, first.source), 0.0))
            if not first.downloaded:
                read += first.model
                changes += [(task.begun, 1), (task.begun + first.model / self.read, -1)]
            for k in task.cells:
                if learned := self.loads[k].learned:
                    read += learned
                    cached[task.machine, self.plan.nodes[k].inputs[1]] = learned
        at_once = most = 0
        for _, change in sorted(changes):
            at_once += change
            most = max(most, at_once)
        return read, sum(cached.values()), most * self.read, sum(downloads.values())


# ---------------------------------------------------------------------- printing


def table(found: Sequence[Predicted]) -> list[str]:
    """A markdown table: a column for every number of GPUs."""
    rows = {
        "wall time": [_hours(p.run.wall) for p in found],
        "longest path": [_hours(p.path) for p in found],
        "computing, over all GPUs": [_hours(p.work / p.gpus) for p in found],
        "GPU-hours of computing": [f"{p.work / 3600:,.0f}" for p in found],
        "GPU-hours taken (wall time x GPUs)": [f"{p.run.wall * p.gpus / 3600:,.0f}" for p in found],
        "idle share": [f"{1 - p.busy:.1%}" for p in found],
        "written to the store": [_gb(p.written) for p in found],
        "read from it, every task anew": [_gb(p.read) for p in found],
        "read from it, once a machine": [_gb(p.read_cached) for p in found],
        "throughput: mean, written and read": [f"{(p.written + p.read) / p.run.wall / 1e6:.1f} MB/s" for p in found],
        "throughput: peak of reading": [f"{p.peak / 1e9:.1f} GB/s" for p in found],
        "models downloaded, once a machine": [_gb(p.downloaded) for p in found],
        "limited by": [p.limit for p in found],
    }
    return [head(["", *(f"{p.gpus} GPU{'s' * (p.gpus > 1)}" for p in found)]), *(row([n, *v]) for n, v in rows.items())]


def report(forecast: Forecast, found: Sequence[Predicted]) -> list[str]:
    """What the table leaves out: the longest path's cells, from how many GPUs it limits, and cells on several GPUs."""
    alone = forecast.alone()
    path, cells = longest_path(forecast.plan, alone)
    out = [f"Longest path, {_hours(path)}:"]
    out += [f"  {_hours(alone[k]):>12}  {slug(forecast.plan.nodes[k].cell)}" for k in cells]
    out.append(f"Computing over longest path: {found[0].work / path:.1f} GPUs; beyond them the path is the longer.")
    several = [k for k, b in bundles(forecast.plan, Resources(1, forecast.memory), True, 4, 1).items() if b["GPU"] > 1]
    most = max(forecast.costs.values(), key=lambda c: c.memory).memory
    out.append(f"Cells that need several GPUs of {forecast.memory / GIB:.0f} GiB: {len(several)}; the largest takes "
               f"{most / GIB:.1f} GiB.")  # fmt: skip
    return out


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.2f} h" if seconds >= 3600 else duration(seconds)


def _gb(n: float) -> str:
    return f"{n / 1e9:,.1f} GB"


# ------------------------------------------------------------------ command line


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        predict(args)
    except GridError as e:
        print(*(f"error: {p}" for p in e.problems), sep="\n", file=sys.stderr)
    except ValueError as e:
        print(f"error: {e}", file=sys.stderr)
    else:
        return 0
    return 2


def predict(args: argparse.Namespace) -> None:
    """Print the prediction. Raises ValueError or GridError for wrong arguments."""
    pins = Pins(None, provisional=True)
    plan = make(gridfile.load(args.grid, args.settings, pins), pins)
    print(f"{plan.name}: {len(plan.nodes)} cells. No GPU was measured: this is a simulation.")
    print(
        f"Cell times: the cost model at {args.tflops:g} TFLOP/s sustained, assumed, and {SET_UP:g} s a cell, assumed."
    )
    print(f"Machines of {args.machine} GPUs of {args.gpu_memory} GiB and {args.cores} cores; models are read at "
          f"{args.read:g} GB/s a task: assumed.\n")  # fmt: skip
    forecast = Forecast(plan, args.tflops, args.read * 1e9, args.gpu_memory * GIB)
    found = [forecast.on(n, args.machine, args.cores) for n in args.gpus]
    print(*table(found), "", *report(forecast, found), sep="\n")


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("grid", nargs="?", default="full_paper", metavar="GRID", help="default full_paper")
    p.add_argument("--set", action="append", default=[], metavar="PATH=VALUE", dest="settings")
    p.add_argument("--gpus", type=int, nargs="+", default=[8, 64], metavar="N", help="default 8 64")
    p.add_argument(
        "--tflops", type=float, default=100.0, metavar="N", help="10^12 operations a second of a GPU (default 100)"
    )
    p.add_argument("--gpu-memory", type=int, default=80, metavar="GIB", help="of a GPU (default 80)")
    p.add_argument("--machine", type=int, default=8, metavar="N", help="GPUs of a machine (default 8)")
    p.add_argument("--cores", type=int, default=64, metavar="N", help="cores of a machine (default 64)")
    p.add_argument("--read", type=float, default=0.5, metavar="GB/S",
                   help="reading a model, checked and unpacked (default 0.5)")  # fmt: skip
    return p


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # planning needs no network
    sys.exit(main())
