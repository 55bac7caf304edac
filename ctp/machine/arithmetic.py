"""In which number type a device computes half precision, and how fast this machine's CPU is.

Where matrix products in bfloat16 or float16 are no faster than in float32, they are computed in float32 with weights
rounded to the half precision: see docs/precision.md. Nothing here imports torch before it has to.
"""

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from ctp.common.files import cache_dir, write_json
from ctp.machine.record import cpu_facts, cpu_model

if TYPE_CHECKING:  # torch takes seconds to import, and planning needs none of it
    import torch
    from torch import nn

AUTOCAST = {"bf16": "bfloat16", "fp16": "float16"}  # by the name of a precision; "fp32" leaves all as it is
HALF = tuple(AUTOCAST.values())
STORED = "_stored_types"  # a model's attribute: the types of its tensors before they were widened
GAIN = 1.25  # how many times as fast as float32 bfloat16 must be: for less it is not worth its rounding
# What of a processor, and which environment variables, decide which instructions torch's libraries use.
PROCESSOR = ("model name", "flags", "Features", "CPU implementer", "CPU part")
VARIABLES = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")
# Rows and width of the products that are timed, and the share of float32's rate below which small ones are enough:
# without instructions for it, bfloat16 is 100 times slower than float32.
SMALL, LARGE, HOPELESS = (32, 512), (256, 1024), 0.2
ROUNDS, PATIENCE = 7, 0.003  # products at most, and seconds after which no further one is begun


def computed_in(dtype: str, device: str) -> str:
    """The number type in which a device ("cpu" or "cuda") computes where `dtype` is requested.

    float32 instead of a half precision that the device has no fast arithmetic for, else `dtype` itself. On a CPU
    float16 is always replaced: learning in it needs a loss scale, which accelerate has for GPUs only.
    """
    if dtype not in HALF or device not in ("cpu", "cuda"):
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


def widen(model: "nn.Module", everything: bool = False) -> str:
    """Hold the half-precision tensors of a model as float32 where their device computes in that: the values stay.

    everything: all of them, whatever their device computes fast. Returns the `notice` of it, empty where there is none.
    A module whose tensors must keep their type, as packed weights must, overrides `_apply`. The former types are kept
    for `as_stored`.
    """
    types = _types(model)
    there = {(p.dtype, p.device.type) for p in model.parameters()}
    slow = {dtype: text for dtype, device in there if (text := notice(dtype_name(dtype), device))}
    if everything:
        slow = {dtype: slow.get(dtype, "") for dtype, _ in there if dtype_name(dtype) in HALF}
    if slow:
        vars(model)[STORED] = types
        model._apply(lambda t: t.float() if t.dtype in slow else t)
    return " ".join(filter(None, slow.values()))


@contextmanager
def widened(model: "nn.Module", everything: bool = False) -> Iterator[None]:
    """`widen` for a while; on the way out every tensor is rounded to the type that it had."""
    types, stored = _types(model), vars(model).get(STORED)
    try:
        widen(model, everything)
        yield
    finally:
        _narrow(types)
        vars(model).pop(STORED, None)
        if stored is not None:
            vars(model)[STORED] = stored


@contextmanager
def as_stored(model: "nn.Module") -> Iterator[None]:
    """A model that `widen` holds in float32 has the types it was stored in for a while, with its values rounded."""
    stored = vars(model).pop(STORED, None)
    _narrow(stored or [])
    try:
        yield
    finally:
        if stored is not None:
            widen(model)


def _types(model: "nn.Module") -> "list[tuple[nn.Module, str, torch.dtype]]":
    """Every parameter and buffer: its module, its name there, its type."""
    return [(m, n, t.dtype) for m in model.modules()
            for n, t in (*m.named_parameters(recurse=False), *m.named_buffers(recurse=False))]  # fmt: skip


def _narrow(types: "list[tuple[nn.Module, str, torch.dtype]]") -> None:
    for module, name, dtype in types:
        tensor = getattr(module, name)
        if tensor.dtype != dtype:
            tensor.data = tensor.data.to(dtype)
        if tensor.grad is not None and tensor.grad.dtype != dtype:
            tensor.grad.data = tensor.grad.data.to(dtype)


@lru_cache
def cpu_rates() -> Mapping[str, float]:
    """float32 and bfloat16 -> operations a second of matrix products on one core, measured once per machine.

    Takes milliseconds. A processor, its instructions and torch's version make a machine.
    """
    if (known := _remembered()) is not None:
        return known
    found = _measured()
    with suppress(OSError, RuntimeError):  # a cache that cannot be written, or no home for it, is no reason to stop
        write_json(_memo(), found)
    return _remembered() or found  # of processes that measure at once, all use the last one


def _remembered() -> dict[str, float] | None:
    """The rates in the cache; None without valid ones."""
    with suppress(OSError, ValueError, KeyError, TypeError, ArithmeticError, RuntimeError):
        held = json.loads(_memo().read_text())
        rates = {name: float(held[name]) for name in ("float32", "bfloat16")}
        if all(0 < rate < math.inf for rate in rates.values()):
            return rates
    return None


def _memo() -> Path:
    processor = [f for f in cpu_facts() if f[0] in PROCESSOR] or cpu_model()
    about = [processor, [os.environ.get(n) for n in VARIABLES], version("torch")]
    return cache_dir() / "rates" / f"{hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]}.json"


def _measured() -> dict[str, float]:
    """As `cpu_rates`. Where bfloat16 is very slow, products of usual size would take a second, so small ones do."""
    import torch

    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("highest")
    try:
        share = _rate(torch.bfloat16, *SMALL) / _rate(torch.float32, *SMALL)
        single = _rate(torch.float32, *LARGE)
        half = share * single if share < HOPELESS else _rate(torch.bfloat16, *LARGE)
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)
    return {"float32": single, "bfloat16": half}


def _rate(dtype: "torch.dtype", rows: int, width: int) -> float:
    """Operations a second of the slower of two products with a weight: of a forward and of a backward pass."""
    import torch

    x, weight = (torch.ones(n, width, dtype=dtype, device="cpu") for n in (rows, width))
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        seconds = max(_least(lambda: x @ weight.T), _least(lambda: x @ weight))
    return 2 * rows * width * width / seconds


def _least(work: Callable[[], object]) -> float:
    """Seconds of the fastest round; the first one, which prepares the product, does not count."""
    work()
    times: list[float] = []
    while len(times) < ROUNDS and sum(times) <= PATIENCE:
        begun = time.perf_counter()
        work()
        times.append(time.perf_counter() - begun)
    return min(times)
