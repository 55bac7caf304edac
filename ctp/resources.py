"""What one trial takes of a machine."""

import math
import sys
from dataclasses import dataclass
from pathlib import Path

GIB = 2**30
DRIVERS = ("nvidiactl", "dxg", "kfd")  # of NVIDIA, Windows' Linux, AMD


@dataclass(frozen=True)
class Resources:
    """What one trial takes. cpus: cores. gpu_memory: bytes of one GPU, to tell what fraction a model needs."""

    cpus: int = 1
    gpu_memory: int = 24 * GIB

    def of(self, memory: float, gpus: bool, alone: float = 0) -> dict[str, float]:
        """Bundle for a cell of so many bytes at its peak: GPUs in quarters up to one, then whole ones, as Tune takes
        nothing between. alone: all CPUs of a machine, for a cell that nothing may run beside: no other trial finds one.
        """
        if not gpus:
            return {"CPU": alone or self.cpus}
        need = (1.25 * memory + GIB) / self.gpu_memory  # the model of it is an estimate, and CUDA itself takes some
        share = math.ceil(4 * need) / 4 if need <= 1 and not alone else math.ceil(need)
        return {"CPU": alone or self.cpus, "GPU": float(share)}


def gpu_memory(gib: int | None) -> int:
    """Bytes of one GPU: as given in GiB, else as found on this machine, else 24 GiB."""
    if gib is not None:
        return gib * GIB
    if sys.platform == "linux" and not any(Path("/dev", n).exists() for n in DRIVERS):
        return 24 * GIB  # without asking torch, which takes seconds to import
    import torch

    return int(torch.cuda.get_device_properties(0).total_memory) if torch.cuda.is_available() else 24 * GIB
