"""In which number type a device computes what is asked of it in half precision, and how fast this machine's CPU is.

Where matrix products in bfloat16 or float16 are no faster than in float32, what asks for them is computed in float32
with weights rounded as asked: see docs/precision.md. Nothing here imports torch before it has to.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from ctp.cache import cache_dir, write_json
from ctp.machine.record import cpu_facts, cpu_model

if TYPE_CHECKING:  # torch takes seconds to import, and planning needs none of it
    import torch
    from torch import nn

AUTOCAST = {"bf16": "bfloat16", "fp16": "float16"}  # by the name of a precision; "fp32" leaves all as it is
HALF = tuple(AUTOCAST.values())
GAIN = 1.25  # how many times as fast as float32 bfloat16 must be: for less it is not worth its rounding
# What of a processor, and which environment variables, decide which instructions torch's libraries use.
PROCESSOR = ("model name", "flags", "Features", "CPU implementer", "CPU part")
VARIABLES = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")
# Rows and width of the products that are timed, and the share of float32's rate below which small ones are enough:
# without instructions for it, bfloat16 is 100 times slower than float32.
SMALL, LARGE, HOPELESS = (32, 512), (256, 1024), 0.2
ROUNDS, PATIENCE = 7, 0.003  # products at most, and seconds after which no further one is begun


def computed_in(dtype: str, device: str) -> str:
    """The number type in which `device` ("cpu" or "cuda") computes what is asked for in `dtype`.

    float32 in place of a half precision that the device has no fast arithmetic for, else `dtype` itself. On a CPU that
    is so for float16 always: learning in it needs a loss scale, which accelerate has for GPUs only.
    """
    if dtype not in HALF:
        return dtype
    if device == "cpu":
        fast = dtype == "bfloat16" and cpu_rates()["bfloat16"] >= GAIN * cpu_rates()["float32"]
    else:
        import torch

        fast = dtype == "float16" or torch.cuda.is_bf16_supported(including_emulation=False)
    return dtype if fast else "float32"


def dtype_name(dtype: "torch.dtype") -> str:
    """torch.bfloat16 -> "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def notice(dtype: str, device: str) -> str:
    """One line for people where `device` computes `dtype` in float32, empty where it does not."""
    if computed_in(dtype, device) == dtype:
        return ""
    name = "CPU" if device == "cpu" else "GPU"
    return f"This {name} has no fast {dtype}: computing in float32 with weights rounded to {dtype} (docs/precision.md)."


# ------------------------------------------------------------------------- models


def widen(model: "nn.Module") -> str:
    """Hold the half-precision tensors of a model as float32 where their device computes in that: the values stay.

    Returns the `notice` of it, empty where nothing changes. A module whose numbers must keep their type, as packed
    weights must, sees to that in its `_apply`.
    """
    there = {(p.dtype, p.device.type) for p in model.parameters()}
    slow = {dtype: said for dtype, device in there if (said := notice(dtype_name(dtype), device))}
    if slow:
        model._apply(lambda t: t.float() if t.dtype in slow else t)
    return " ".join(slow.values())


@contextmanager
def widened(model: "nn.Module") -> Iterator[None]:
    """`widen` for a while; on the way out every tensor is rounded to the type that it had."""
    before = [(m, n, t.dtype) for m in model.modules()
              for n, t in (*m.named_parameters(recurse=False), *m.named_buffers(recurse=False))]  # fmt: skip
    widen(model)
    try:
        yield
    finally:
        for module, name, dtype in before:
            tensor = getattr(module, name)
            if tensor.dtype != dtype:
                tensor.data = tensor.data.to(dtype)


# -------------------------------------------------------------------------- speed


@lru_cache
def cpu_rates() -> Mapping[str, float]:
    """float32 and bfloat16 -> operations a second of matrix products on one core, measured once per machine.

    Takes milliseconds. A processor, its instructions and torch's version make a machine.
    """
    memo = _memo()
    with suppress(OSError, ValueError, KeyError, TypeError):
        remembered = json.loads(memo.read_text())
        return {name: float(remembered[name]) for name in ("float32", "bfloat16")}
    found = _measured()
    with suppress(OSError):  # a cache that cannot be written is no reason to stop
        write_json(memo, found)
    return found


def _memo() -> Path:
    processor = [f for f in cpu_facts() if f[0] in PROCESSOR] or cpu_model()
    about = [processor, [os.environ.get(n) for n in VARIABLES], version("torch")]
    return cache_dir() / "rates" / f"{hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]}.json"


def _measured() -> dict[str, float]:
    """As `cpu_rates`. Where bfloat16 is very slow, products of usual size would take a second: small ones tell."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        share = _rate(torch.bfloat16, *SMALL) / _rate(torch.float32, *SMALL)
        single = _rate(torch.float32, *LARGE)
        half = share * single if share < HOPELESS else _rate(torch.bfloat16, *LARGE)
    finally:
        torch.set_num_threads(threads)
    return {"float32": single, "bfloat16": half}


def _rate(dtype: "torch.dtype", rows: int, width: int) -> float:
    """Operations a second of the slower of two products with a weight: of a forward and of a backward pass."""
    import torch

    x, weight = torch.ones(rows, width, dtype=dtype), torch.ones(width, width, dtype=dtype)
    with torch.no_grad():
        seconds = max(_least(lambda: x @ weight.T), _least(lambda: x @ weight))
    return 2 * rows * width * width / seconds


def _least(work: Callable[[], object]) -> float:
    """Seconds of the fastest round; the first one, which prepares the product, does not count."""
    work()
    least, end = float("inf"), time.perf_counter() + PATIENCE
    for _ in range(ROUNDS):
        begun = time.perf_counter()
        work()
        least = min(least, time.perf_counter() - begun)
        if time.perf_counter() > end:
            break
    return least
