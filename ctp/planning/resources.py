"""What one trial takes of a machine, and what machines there are."""

import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ctp.cells.cell import Cell, Evaluate, Learn
from ctp.planning import cost
from ctp.planning.graph import Plan

GIB = 2**30
DRIVERS = ("nvidiactl", "dxg", "kfd")  # of NVIDIA, Windows' Linux, AMD
BUSY = 3.6e17  # operations of a cell that is long enough, an hour at 100 TFLOP/s, to leave nothing of a GPU's speed


@dataclass(frozen=True)
class Resources:
    """What one trial takes. cpus: cores. gpu_memory: bytes of one GPU, to tell what fraction a model needs."""

    cpus: int = 1
    gpu_memory: int = 24 * GIB

    def of(self, memory: float, gpus: bool, alone: float = 0, whole: bool = False) -> dict[str, float]:
        """Bundle for a cell of so many bytes at its peak: GPUs in quarters up to one, then whole ones.

        alone: all CPUs of a machine, so that nothing runs beside the cell. whole: at least one GPU, for a cell that
        keeps it busy by itself: Ray would put a second cell beside it while other GPUs idle.
        """
        if not gpus:
            return {"CPU": alone or self.cpus}
        need = (1.25 * memory + GIB) / self.gpu_memory  # the model of it is an estimate, and CUDA itself takes some
        share = math.ceil(4 * need) / 4 if need <= 1 and not alone and not whole else math.ceil(need)
        return {"CPU": alone or self.cpus, "GPU": float(share)}


def alone(cell: Cell) -> bool:
    """May nothing run beside it on its machine?"""
    return isinstance(cell, Evaluate) and cell.measure.alone


def bundles(plan: Plan, each: Resources, gpus: bool, batch: int, cores: float) -> dict[str, dict[str, float]]:
    """key -> what the cell's trial takes, on machines of so many cores; learning for hours takes at least a GPU."""
    out = {}
    for k, n in plan.nodes.items():
        c = cost.of(n.cell, n.facts, batch)
        whole = isinstance(n.cell, Learn) and c.flops >= BUSY
        out[k] = each.of(c.memory, gpus, cores if alone(n.cell) else 0, whole)
    return out


def gpu_memory(gib: int | None) -> int:
    """Bytes of one GPU: as given in GiB, else as found on this machine, else 24 GiB."""
    if gib is not None:
        return gib * GIB
    if not has_gpu():
        return 24 * GIB
    import torch

    return int(torch.cuda.get_device_properties(0).total_memory)


def has_gpu() -> bool:
    """Has this machine a GPU that torch can use? Where there is no driver, torch, which takes seconds, is not asked."""
    if sys.platform == "linux" and not any(Path("/dev", n).exists() for n in DRIVERS):
        return False
    import torch

    return torch.cuda.is_available()


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Machine:
    """A machine, or a sort of machine and how many of it there may be at most. has: resource -> how much."""

    has: Mapping[str, float]
    count: int = 1

    def room(self, want: Mapping[str, float]) -> int:
        """How many bundles of this size one such machine holds."""
        return min((int(self.has.get(name, 0) / each) for name, each in want.items() if each), default=0)


@dataclass(frozen=True)
class Fleet:
    """The machines of a cluster: those that are there, and the sorts that its autoscaler starts when there is work.

    Those that it has started are among both: numbers are the larger of the two, never the sum.
    """

    there: Sequence[Machine]
    may_come: Sequence[Machine] = ()

    @property
    def machines(self) -> list[Machine]:
        return [*self.there, *self.may_come]

    @property
    def gpus(self) -> bool:
        """Has any machine a GPU?"""
        return any(m.has.get("GPU", 0) > 0 for m in self.machines)

    def fits(self, bundle: Mapping[str, float]) -> bool:
        """Is there, or may there be, a machine that holds the bundle?"""
        return any(m.room(bundle) for m in self.machines)

    def slots(self, bundle: Mapping[str, float]) -> int:
        """How many such bundles run at once when all machines are there; at least 1."""
        counts = (sum(m.count * m.room(bundle) for m in machines) for machines in (self.there, self.may_come))
        return max(1, *counts)

    def cores(self, at_least: float) -> float:
        """Of the smallest machine with so many: a head may run no trials."""
        cores = (m.has.get("CPU", 0) for m in self.machines)
        return min((n for n in cores if n >= at_least), default=at_least)


def fleet(there: Sequence[Mapping[str, float]], config: Mapping[str, Any] | None = None) -> Fleet:
    """Of the resources of each machine that is there, and the configuration that `ray up` leaves on the head.

    A sort of machine without stated resources (as on premises) counts as the smallest worker that is there.
    """
    config = config or {}
    most, sorts = int(config.get("max_workers", 0)), config.get("available_node_types", {})
    workers = sorted((dict(has) for has in there if has.get("CPU", 0) > 0), key=lambda has: has["CPU"])
    come = []
    for sort in sorts.values():
        has, count = sort.get("resources") or (workers or [{}])[0], min(sort.get("max_workers", most), most)
        if has and count > 0:
            come.append(Machine(has, count))
    return Fleet([Machine(has) for has in there], come)
