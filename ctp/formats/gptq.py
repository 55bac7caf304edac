"""AutoGPTQ's checkpoint format, read and written: what AutoGPTQ, GPTQModel, optimum and vLLM call `gptq`.

A linear of n inputs and m outputs is stored, inputs first, as
    qweight  int32 (n * bits / 32, m)       codes, each column a little-endian bit stream over the inputs
    qzeros   int32 (groups, m * bits / 32)  zero points, each row a little-endian bit stream over the outputs
    scales   float16 (groups, m)
    g_idx    int32 (n,)                     the group of every input
In version 1 ("gptq") the stored zero point is one less than the real one, version 2 ("gptq_v2") stores it as it is.
Weight = scale * (code - zero). Version 1 has no room for a zero point of 0 and is written for symmetric grids only.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ctp.formats import checks
from ctp.formats.checks import FLOATS, Layers, part
from ctp.formats.layer import Layer
from ctp.formats.pack import from_words, stored_codes, to_words

BITS = (2, 3, 4, 8)
V1, V2 = "gptq", "gptq_v2"


def check(config: Mapping[str, Any]) -> None:
    """Raises ValueError naming what in a quantization config ctp does not read."""
    checks.check_setting("checkpoint_format", _version(config), (V1, V2))
    checks.check_setting("bits", config.get("bits"), BITS)


def _version(config: Mapping[str, Any]) -> str:
    return str(config.get("checkpoint_format") or config.get("format") or V1)


def layers(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Layers:
    """The quantized linears of a checkpoint with this quantization config. Raises ValueError naming what is wrong."""

    def read(name: str, tensors: dict[str, Tensor]) -> Layer:
        return _read(tensors, *_settings(name, config), _version(config))

    return checks.read_layers(tensors, ("qweight", "qzeros", "scales", "g_idx"), "GPTQ", read)


def _settings(name: str, config: Mapping[str, Any]) -> tuple[int, int | None]:
    """(bits, group size) of a linear; None for one group. GPTQModel's `dynamic` has others for names that match."""
    bits, size = config["bits"], config.get("group_size", -1)
    for pattern, fields in (config.get("dynamic") or {}).items():
        if re.match(pattern.removeprefix("+:"), name) and isinstance(fields, dict):
            bits, size = fields.get("bits", bits), fields.get("group_size", size)
            break
    checks.check_setting("bits", bits, BITS)
    checks.check_group_size(size)
    return int(bits), None if size == -1 else size


def _read(tensors: Mapping[str, Tensor], bits: int, size: int | None, version: str) -> Layer:
    qweight = part(tensors, "qweight", (torch.int32,), (None, None))
    columns, rows = qweight.shape[0] * 32 // bits, qweight.shape[1]
    if qweight.shape[0] * 32 % bits or ("g_idx" in tensors and len(tensors["g_idx"].flatten()) != columns):
        inputs = f" of {len(tensors['g_idx'].flatten())} inputs" if "g_idx" in tensors else ""
        raise ValueError(f"qweight has {qweight.shape[0]} words a column{inputs}: they are not of {bits} bits")
    size = size or columns
    groups = -(-columns // size)
    scales = part(tensors, "scales", FLOATS, (groups, rows))
    qzeros = part(tensors, "qzeros", (torch.int32,), (groups, -(-rows * bits // 32)))
    if version == V1 and bits != 3:
        # By words, as GPTQModel: undoes the borrows of files whose zero points of 0 were lowered by words.
        qzeros = qzeros + to_words(torch.ones(1, rows), bits)
    zero = from_words(qzeros, bits, rows).T
    if version == V1 and bits == 3:  # its lanes straddle words: lowered and raised one by one
        zero = (zero + 1) % 8
    return Layer(
        (rows, columns),
        bits=bits,
        codes=from_words(qweight.T.contiguous(), bits, columns),
        scale=scales.T.contiguous(),
        zero=checks.unless_centred(zero, bits),
        g_idx=checks.group_numbers("g_idx", tensors, columns, size),
    )


def unaligned(shapes: Mapping[str, Sequence[int]], bits: int) -> str:
    """Why the format has no place for linears of these shapes (outputs, inputs), "" where it has."""
    for name, (rows, columns) in sorted(shapes.items()):
        for what, size in (("inputs", columns), ("outputs", rows)):
            if size * bits % 32:
                return f"{name}: {size} {what} of {bits} bits do not fill whole 32-bit words"
    return ""


def write(name: str, layer: Layer, sym: bool) -> dict[str, Tensor]:
    """The tensors of one quantized linear; version 1 if sym. Raises ValueError where the format cannot hold it."""
    assert layer.bits is not None
    assert layer.scale is not None
    scales = layer.scale.to(torch.float16)
    if not torch.equal(scales.to(layer.scale.dtype), layer.scale):
        raise ValueError(f"{name}: its scales are no float16 numbers, which the GPTQ format stores")
    out = {
        "qweight": to_words(stored_codes(layer), layer.bits).T,
        "qzeros": to_words(layer.zero_points().T - int(sym), layer.bits),
        "scales": scales.T,
        "g_idx": layer.groups().to(torch.int32),
    }
    return {f"{name}.{part}": t.clone(memory_format=torch.contiguous_format) for part, t in out.items()}


def settings(bits: int, group_size: int | None, sym: bool, act_order: bool) -> dict[str, Any]:
    """The quantization config that loaders ask for; group_size None: one scale per output channel."""
    return {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group_size or -1,
        "sym": sym,
        "desc_act": act_order,
        "checkpoint_format": V1 if sym else V2,
        "pack_dtype": "int32",
        "lm_head": False,
    }
