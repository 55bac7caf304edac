"""What one trial takes of a machine."""

import math
from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Resources:
    """What one trial takes. cpus: cores. gpu_memory: bytes of one GPU, to tell what fraction a model needs."""

    cpus: int = 1
    gpu_memory: int = 24 * GIB

    def of(self, parameters: int, dtype: str, gpus: bool) -> dict[str, float]:
        """Bundle for a model of this size: GPUs in quarters up to one, then whole ones (Tune takes nothing between).

        One and a half times the weights and 4 GiB: activations, logits, the Hessians of the block being compressed.
        """
        if not gpus:
            return {"CPU": self.cpus}
        need = (1.5 * parameters * (4 if dtype == "float32" else 2) + 4 * GIB) / self.gpu_memory
        share = math.ceil(4 * need) / 4 if need <= 1 else math.ceil(need)
        return {"CPU": self.cpus, "GPU": float(share)}


def gpu_memory(gib: int | None) -> int:
    """Bytes of one GPU: as given in GiB, else as found on this machine, else 24 GiB."""
    import torch

    if gib is None and torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(0).total_memory)
    return (gib or 24) * GIB
