"""The device that work runs on, and whether this machine has a GPU."""

import sys
from pathlib import Path

DRIVERS = ("nvidiactl", "dxg", "kfd")  # of NVIDIA, Windows' Linux, AMD


def pick(device: str) -> str:
    """ "cpu" or "cuda" for "cpu", "cuda" or "auto", which takes the GPU where this process sees one.

    Raises ValueError where the GPU that is asked for is not there.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device = {device!r}: allowed: auto, cpu, cuda")
    if device == "cpu":
        return device
    import torch

    if not torch.cuda.is_available() and device == "cuda":
        raise ValueError("device = 'cuda': no GPU is visible")
    return "cuda" if torch.cuda.is_available() else "cpu"


def has_gpu() -> bool:
    """Has this machine a GPU that torch can use? Without a driver torch is not imported: that takes seconds."""
    if sys.platform == "linux" and not any(Path("/dev", n).exists() for n in DRIVERS):
        return False
    import torch

    return torch.cuda.is_available()


def gpu_bytes() -> int | None:
    """Memory of this machine's first GPU in bytes; None without one."""
    if not has_gpu():
        return None
    import torch

    return int(torch.cuda.get_device_properties(0).total_memory)
