"""The compressed-tensors formats (llm-compressor, vLLM): `pack-quantized` read and written, `int-quantized` read.

A linear of n inputs and m outputs is stored in pack-quantized as
    weight_packed      int32 (m, ceil(n * bits / 32))       codes, each row a little-endian bit stream
    weight_scale       (m, groups)
    weight_zero_point  int32 (ceil(m * bits / 32), groups)  each column a little-endian bit stream; asymmetric only
    weight_shape       int64 (2,)                           m, n
    weight_g_idx       int32 (n,)                           the group of every input; in older checkpoints only
and in int-quantized as `weight` (int8, code - 2^(bits - 1)), weight_scale and an int8 weight_zero_point.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ctp.formats import checks
from ctp.formats.checks import FLOATS, INTS, Layers, below, part
from ctp.formats.layer import Layer
from ctp.formats.pack import from_words, stored_codes, to_words

PACK, INT = "pack-quantized", "int-quantized"
BITS = (2, 3, 4, 8)
STRATEGIES = ("group", "channel", "tensor")
PARTS = ("weight_scale", "weight_packed", "weight", "weight_zero_point", "weight_shape", "weight_g_idx")


def layers(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Layers:
    """The quantized linears of a checkpoint with this quantization config. Raises ValueError naming what is wrong."""
    grids = {_grid(g["weights"]) for g in config["config_groups"].values()}
    return checks.read_layers(tensors, PARTS, "compressed-tensors", lambda _, linear: _read(linear, grids))


def _grid(weights: Mapping[str, Any]) -> tuple[int, int | None]:
    """(bits, group size) of a group of linears; None for one scale per output channel or tensor."""
    size = weights.get("group_size")
    if weights["strategy"] != "group":
        return int(weights["num_bits"]), None
    checks.check_group_size(size, " of compressed-tensors", whole="")
    return int(weights["num_bits"]), size


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
        checks.check_setting("num_bits", weights.get("num_bits"), BITS, " of compressed-tensors")
        checks.check_setting("strategy", weights.get("strategy"), STRATEGIES, " of compressed-tensors")


def _read(tensors: Mapping[str, Tensor], grids: Collection[tuple[int, int | None]]) -> Layer:
    widths = sorted({bits for bits, _ in grids})
    if "weight_packed" in tensors:
        rows, columns = below("weight_shape", part(tensors, "weight_shape", INTS, (2,)), 2**31).tolist()
        packed = part(tensors, "weight_packed", (torch.int32,), (rows, None))
        (bits,) = [b for b in widths if -(-columns * b // 32) == packed.shape[1]][:1] or [0]
        if not bits or not rows or not columns:
            raise ValueError(f"weight_packed has {packed.shape[1]} words a row for weight_shape {rows} x {columns}: "
                             f"none of {widths} bits")  # fmt: skip
        codes = from_words(packed, bits, columns)
    else:
        rows, columns = part(tensors, "weight", (torch.int8,), (None, None)).shape
        (bits,) = [b for b in widths if b >= 8] or widths[-1:]
        codes = below("weight", tensors["weight"].to(torch.int16) + 2 ** (bits - 1), 2**bits).to(torch.uint8)
    scale = _per_output(tensors, "weight_scale", FLOATS, rows, None)
    sizes = [columns if size is None else size for b, size in grids if b == bits]
    if (size := next((s for s in sizes if -(-columns // s) == scale.shape[1]), None)) is None:
        raise ValueError(f"weight_scale has {scale.shape[1]} groups of {columns} inputs: group_size is {sizes}")
    g_idx = tensors.get("weight_g_idx")
    if g_idx is not None and g_idx.numel() == columns and bool((g_idx == -1).all()):  # how "none" is written
        tensors = {n: t for n, t in tensors.items() if n != "weight_g_idx"}
    return Layer(
        (rows, columns),
        bits=bits,
        codes=codes,
        scale=scale.contiguous(),
        zero=_zero(tensors, bits, rows, scale.shape[1]),
        g_idx=checks.group_numbers("weight_g_idx", tensors, columns, size),
    )


def _per_output(
    tensors: Mapping[str, Tensor], field: str, dtypes: Sequence[torch.dtype], rows: int, groups: int | None
) -> Tensor:
    """A tensor as (rows, groups), which may be stored as one number for all, or as one for each row."""
    found = tensors[field]
    if found.numel() == 1:
        found = found.reshape(1, 1).expand(rows, groups or 1)
    elif found.dim() == 1:
        found = found.unsqueeze(1)
    return part({field: found}, field, dtypes, (rows, groups))


def _zero(tensors: Mapping[str, Tensor], bits: int, rows: int, groups: int) -> Tensor | None:
    """Zero points (rows, groups); None where all are the middle of the grid."""
    field = "weight_zero_point"
    if field not in tensors:
        return None
    if tensors[field].dtype == torch.int32:
        words = part(tensors, field, (torch.int32,), (-(-rows * bits // 32), groups))
        zero = from_words(words.T.contiguous(), bits, rows).T
    else:
        stored = _per_output(tensors, field, (torch.int8,), rows, groups)
        zero = below(field, stored.short() + 2 ** (bits - 1), 2**bits).byte()
    return checks.unless_centred(zero, bits)


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
