"""What one trial takes of a machine."""

import math
import sys
from dataclasses import dataclass
from pathlib import Path

from ctp import cost
from ctp.plan import Plan
from ctp.spec import Cell, Evaluate, Learn

GIB = 2**30
DRIVERS = ("nvidiactl", "dxg", "kfd")  # of NVIDIA, Windows' Linux, AMD
BUSY = 3.6e17  # operations of a cell that is long enough, an hour at 100 TFLOP/s, to leave nothing of a GPU's speed


@dataclass(frozen=True)
class Resources:
    """What one trial takes. cpus: cores. gpu_memory: bytes of one GPU, to tell what fraction a model needs."""

    cpus: int = 1
    gpu_memory: int = 24 * GIB

    def of(self, memory: float, gpus: bool, alone: float = 0, whole: bool = False) -> dict[str, float]:
        """Bundle for a cell of so many bytes at its peak: GPUs in quarters up to one, then whole ones, as Tune takes
        nothing between. alone: all CPUs of a machine, for a cell that nothing may run beside: no other trial finds one.
        whole: at least a GPU, for a cell that keeps one busy by itself: Ray would put a second one beside it while
        other GPUs idle.
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
    if sys.platform == "linux" and not any(Path("/dev", n).exists() for n in DRIVERS):
        return 24 * GIB  # without asking torch, which takes seconds to import
    import torch

    return int(torch.cuda.get_device_properties(0).total_memory) if torch.cuda.is_available() else 24 * GIB
