"""AutoGPTQ's checkpoint format, read and written: what AutoGPTQ, GPTQModel, optimum and vLLM call `gptq`.

A linear of n inputs and m outputs is stored, inputs first, as
    qweight  int32 (n * bits / 32, m)       codes, each column a little-endian bit stream over the inputs
    qzeros   int32 (groups, m * bits / 32)  zero points, each row a little-endian bit stream over the outputs
    scales   float16 (groups, m)
    g_idx    int32 (n,)                     the group of every input
In version 1 ("gptq") the stored zero point is one less than the real one, version 2 ("gptq_v2") stores it as it is.
Weight = scale * (code - zero). Version 1 has no room for a zero point of 0 and is written for symmetric grids only.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ctp.compression.layer import Layer
from ctp.formats.words import from_words, stored_codes, to_words

BITS = (2, 3, 4, 8)
V1, V2 = "gptq", "gptq_v2"


def check(config: Mapping[str, Any]) -> None:
    """Raises ValueError naming what in a quantization config ctp does not read."""
    if (version := _version(config)) not in (V1, V2):
        raise ValueError(f"checkpoint_format = {version!r}: allowed: {V1}, {V2}")
    if config.get("bits") not in BITS:
        raise ValueError(f"bits = {config.get('bits')!r}: allowed: {', '.join(map(str, BITS))}")


def _version(config: Mapping[str, Any]) -> str:
    return str(config.get("checkpoint_format") or config.get("format") or V1)


def layers(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Iterator[tuple[str, Layer, set[str]]]:
    """Every quantized linear of a checkpoint: its name, its compressed form, and the names of its tensors.

    config: the checkpoint's quantization config. Raises ValueError naming the linear whose tensors do not fit.
    """
    version = _version(config)
    for name in [n.removesuffix(".qweight") for n in tensors if n.endswith(".qweight")]:
        own = {n: tensors[f"{name}.{n}"] for n in ("qweight", "qzeros", "scales", "g_idx") if f"{name}.{n}" in tensors}
        try:
            yield name, _read(own, int(config["bits"]), version), {f"{name}.{n}" for n in own}
        except (ValueError, KeyError, RuntimeError) as e:
            raise ValueError(f"{name}: no GPTQ layer: {e}") from e


def _read(own: Mapping[str, Tensor], bits: int, version: str) -> Layer:
    qweight, qzeros, scales, g_idx = own["qweight"], own["qzeros"], own["scales"], own.get("g_idx")
    if g_idx is not None:  # widths may differ from linear to linear: the shape tells
        bits = qweight.shape[0] * 32 // len(g_idx)
    if bits not in BITS:
        raise ValueError(f"bits = {bits}: allowed: {', '.join(map(str, BITS))}")
    (groups, rows), columns = scales.shape, qweight.shape[0] * 32 // bits
    if version == V1 and bits != 3:
        # By words, as GPTQModel: undoes the borrows of files whose zero points of 0 were lowered by words.
        qzeros = qzeros + to_words(torch.ones(1, rows), bits)
    zero = from_words(qzeros, bits, rows).T.contiguous()
    if version == V1 and bits == 3:  # its lanes straddle words: lowered and raised one by one
        zero = (zero + 1) % 8
    regular = torch.arange(columns) // -(-columns // groups)
    group = regular if g_idx is None else g_idx.long()
    if int(group.max()) >= groups:
        raise ValueError(f"g_idx names group {int(group.max())} of {groups}")
    return Layer(
        (rows, columns),
        bits=bits,
        codes=from_words(qweight.T.contiguous(), bits, columns),
        scale=scales.T.contiguous(),
        zero=None if bool((zero == 2 ** (bits - 1)).all()) else zero,
        g_idx=None if columns % groups == 0 and torch.equal(group, regular) else group.to(torch.int32),
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
