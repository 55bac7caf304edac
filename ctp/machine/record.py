"""What a timing depends on besides the model: the processor, its threads, the GPUs and their driver."""

import platform
import resource
import shutil
import subprocess
from pathlib import Path
from typing import Any

import psutil


def machine() -> dict[str, Any]:
    """A record of this machine and process, as JSON values; None for what the system does not report. Sizes in bytes.

    cpus: logical processors, cpus_allowed: those that this process may use, threads: those that torch computes with.
    load: runnable processes, the mean of the minute before (others' work makes timings longer).
    """
    import torch

    process = psutil.Process()
    return {
        "system": platform.platform(),
        "cpu": cpu_model(),
        "cpus": psutil.cpu_count(),
        "cpus_allowed": len(process.cpu_affinity()) if hasattr(process, "cpu_affinity") else None,
        "threads": torch.get_num_threads(),
        "ram_bytes": psutil.virtual_memory().total,
        "load": psutil.getloadavg()[0],
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "gpus": [_gpu(i) for i in range(torch.cuda.device_count())],
        "gpu_driver": _driver() if torch.cuda.is_available() else None,
    }


def cpu_model() -> str | None:
    """The name in /proc/cpuinfo, where there is one, else what Python's `platform` says."""
    return next((v for n, v in cpu_facts() if n == "model name"), platform.processor() or None)


def cpu_facts() -> list[tuple[str, str]]:
    """What /proc/cpuinfo says of the first processor, name by name; empty elsewhere than on Linux."""
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return []
    return [(name.strip(), value.strip()) for name, _, value in (line.partition(":") for line in first.splitlines())]


def process_peak() -> int:
    """Peak resident bytes of this process since it began."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024  # macOS counts in bytes, Linux in KiB


def _gpu(index: int) -> dict[str, Any]:
    import torch

    known = torch.cuda.get_device_properties(index)
    capability = f"{known.major}.{known.minor}"
    return {"name": known.name, "memory_bytes": known.total_memory, "compute_capability": capability}


def _driver() -> str | None:
    """The version of NVIDIA's driver."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    return done.stdout.split("\n")[0].strip() or None if done.returncode == 0 else None
