"""The compressed-tensors formats (llm-compressor, vLLM): `pack-quantized` read and written, `int-quantized` read.

A linear of n inputs and m outputs is stored in pack-quantized as
    weight_packed      int32 (m, ceil(n * bits / 32))       codes, each row a little-endian bit stream
    weight_scale       (m, groups)
    weight_zero_point  int32 (ceil(m * bits / 32), groups)  each column a little-endian bit stream; asymmetric only
    weight_shape       int64 (2,)                           m, n
    weight_g_idx       int32 (n,)                           the group of every input; in older checkpoints only
and in int-quantized as `weight` (int8, code - 2^(bits - 1)), weight_scale and an int8 weight_zero_point.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ctp.compression.layer import Layer
from ctp.formats.words import from_words, stored_codes, to_words

PACK, INT = "pack-quantized", "int-quantized"
BITS = (2, 3, 4, 8)
STRATEGIES = ("group", "channel", "tensor")
PARTS = ("weight_packed", "weight", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")


def layers(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Iterator[tuple[str, Layer, set[str]]]:
    """Every quantized linear of a checkpoint: its name, its compressed form, and the names of its tensors.

    config: the checkpoint's quantization config. Raises ValueError naming what is not supported, or the linear whose
    tensors do not fit.
    """
    widths = sorted({int(g["weights"]["num_bits"]) for g in config["config_groups"].values()})
    for name in [n.removesuffix(".weight_scale") for n in tensors if n.endswith(".weight_scale")]:
        own = {n: tensors[f"{name}.{n}"] for n in PARTS if f"{name}.{n}" in tensors}
        try:
            yield name, _read(own, widths), {f"{name}.{n}" for n in own}
        except (ValueError, KeyError, RuntimeError) as e:
            raise ValueError(f"{name}: no layer of compressed-tensors: {e}") from e


def check(config: Mapping[str, Any]) -> None:
    """Raises ValueError naming what in a quantization config ctp does not read."""
    groups = list((config.get("config_groups") or {}).values())
    formats = {str(g.get("format") or config.get("format")) for g in groups}
    if not formats or not formats <= {PACK, INT}:
        raise ValueError(f"format = {', '.join(sorted(formats)) or None} of compressed-tensors: allowed: {PACK}, {INT}")
    if (config.get("transform_config") or {}).get("config_groups"):
        raise ValueError("transform_config of compressed-tensors: ctp reads weights that are not transformed only")
    for group in groups:
        weights = group.get("weights") or {}
        if group.get("input_activations") or weights.get("type", "int") != "int":
            raise ValueError("input_activations or float weights of compressed-tensors: ctp reads integer weights only")
        for field, allowed in (("num_bits", BITS), ("strategy", STRATEGIES)):
            if weights.get(field) not in allowed:
                choice = ", ".join(map(str, allowed))
                raise ValueError(f"{field} = {weights.get(field)!r} of compressed-tensors: allowed: {choice}")


def _read(own: Mapping[str, Tensor], widths: Sequence[int]) -> Layer:
    scale, zero = own["weight_scale"], own.get("weight_zero_point")
    packed = own.get("weight_packed")
    rows, columns = map(int, own["weight"].shape if packed is None else own["weight_shape"])
    if packed is None:
        (bits,) = [b for b in widths if b >= 8] or widths[-1:]
        codes = (own["weight"].to(torch.int16) + 2 ** (bits - 1)).to(torch.uint8)
    else:
        (bits,) = [b for b in widths if -(-columns * b // 32) == packed.shape[1]][:1] or [0]
        if bits not in BITS:
            raise ValueError(f"{packed.shape[1]} words a row are none of {widths} bits; allowed: {BITS}")
        codes = from_words(packed, bits, columns)
    if zero is not None:
        words = zero.dtype == torch.int32
        zero = from_words(zero.T.contiguous(), bits, rows).T if words else (zero.short() + 2 ** (bits - 1)).byte()
        zero = None if bool((zero == 2 ** (bits - 1)).all()) else zero.contiguous()
    g_idx = own.get("weight_g_idx")
    scale = scale.reshape(-1, 1).expand(rows, 1) if scale.numel() == 1 else scale.reshape(rows, -1)
    return Layer(
        (rows, columns),
        bits=bits,
        codes=codes,
        scale=scale.contiguous(),
        zero=zero,
        g_idx=None if g_idx is None or bool((g_idx < 0).all()) else g_idx.to(torch.int32),
    )


def write(name: str, layer: Layer, sym: bool) -> dict[str, Tensor]:
    """The pack-quantized tensors of one quantized linear. Raises ValueError where the format cannot hold it."""
    assert layer.bits is not None
    assert layer.scale is not None
    if layer.g_idx is not None:
        raise ValueError(
            f"{name}: compressed-tensors gave up groups in another order than the inputs' (g_idx): compress with "
            "static_groups: true, or export to gptq"
        )
    out = {
        "weight_packed": to_words(stored_codes(layer), layer.bits),
        "weight_scale": layer.scale,
        "weight_shape": torch.tensor(layer.shape),
    }
    if not sym:
        out["weight_zero_point"] = to_words(layer.zero_points().T, layer.bits).T
    return {f"{name}.{part}": t.clone(memory_format=torch.contiguous_format) for part, t in out.items()}


def settings(bits: int, group_size: int | None, sym: bool, ignore: Sequence[str]) -> dict[str, Any]:
    """The quantization config that loaders ask for. ignore: linears that stay as they are."""
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": sym,
        "strategy": "group" if group_size else "channel",
        "group_size": group_size,
        "dynamic": False,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": PACK,
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "format": PACK}},
        "ignore": list(ignore),
    }
