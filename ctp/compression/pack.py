"""Compressed layers as flat tensors at their true bit width, for safetensors, and back bit for bit.

A layer `name` becomes `name.shape` (int32: outputs, inputs, bits; 0 bits: not quantized) and what it has of
`name.codes` (kept weights only), `name.scale`, `name.zero`, `name.g_idx`, `name.mask` (1 bit per weight) and
`name.values`. Packed tensors are uint8 streams: value i of width b occupies the bits i*b .. i*b + b - 1, least
significant first, so that 8 values fill b bytes and 3 bits waste nothing.
"""

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from ctp.compression.layer import Layer

FIELDS = ("shape", "codes", "scale", "zero", "g_idx", "mask", "values")


def pack_bits(values: Tensor, bits: int) -> Tensor:
    """uint8 values below 2^bits, any shape -> uint8 (ceil(count * bits / 8),)."""
    flat = values.reshape(-1).to(torch.uint8)
    if bits == 8:
        return flat.clone()
    size = math.ceil(flat.numel() * bits / 8)
    lanes = torch.nn.functional.pad(flat, (0, -flat.numel() % 8)).view(-1, 8)
    word = torch.zeros(len(lanes), dtype=torch.int64)
    for k in range(8):
        word |= lanes[:, k].long() << (bits * k)
    octets = torch.stack([(word >> (8 * k) & 255).to(torch.uint8) for k in range(bits)], dim=1)
    return octets.reshape(-1)[:size].clone()


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of pack_bits: uint8 (count,)."""
    if bits == 8:
        return packed[:count].clone()
    if packed.numel() != math.ceil(count * bits / 8):
        raise ValueError(f"{packed.numel()} bytes cannot hold {count} values of {bits} bits")
    lanes = torch.nn.functional.pad(packed, (0, -packed.numel() % bits)).view(-1, bits)
    word = torch.zeros(len(lanes), dtype=torch.int64)
    for k in range(bits):
        word |= lanes[:, k].long() << (8 * k)
    top = 2**bits - 1
    values = torch.stack([(word >> (bits * k) & top).to(torch.uint8) for k in range(8)], dim=1)
    return values.reshape(-1)[:count].clone()


def pack(layers: Mapping[str, Layer]) -> dict[str, Tensor]:
    """Compressed layers by module name -> tensors by `module name.field`."""
    return {f"{name}.{field}": t for name, layer in layers.items() for field, t in _pack(layer).items()}


def _pack(layer: Layer) -> dict[str, Tensor]:
    out = {"shape": torch.tensor([*layer.shape, layer.bits or 0], dtype=torch.int32)}
    if layer.mask is not None:
        out["mask"] = pack_bits(layer.mask, 1)
    if layer.values is not None:
        out["values"] = layer.values.clone()
    if layer.codes is not None:
        assert layer.bits is not None
        assert layer.scale is not None
        out["codes"] = pack_bits(layer.codes if layer.mask is None else layer.codes[layer.mask], layer.bits)
        out["scale"] = layer.scale.clone()
        if layer.zero is not None:
            out["zero"] = pack_bits(layer.zero, layer.bits)
        if layer.g_idx is not None:
            small = layer.scale.shape[1] <= 256
            out["g_idx"] = layer.g_idx.to(torch.uint8) if small else layer.g_idx.clone()
    return out


def unpack(tensors: Mapping[str, Tensor]) -> dict[str, Layer]:
    """What `pack` made, back into layers. Raises ValueError on tensors that it did not make."""
    return dict(unpack_layers(tensors))


def unpack_layers(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Layer]]:
    """What `pack` made, layer by layer: a large model need not be unpacked whole. Raises ValueError as `unpack`."""
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, field = key.rpartition(".")
        if field not in FIELDS:
            raise ValueError(f"{key!r} is no part of a packed layer; parts are {', '.join(FIELDS)}")
        parts.setdefault(name, {})[field] = tensor
    for name, part in parts.items():
        yield name, _unpack(name, part)


def _unpack(name: str, part: Mapping[str, Tensor]) -> Layer:
    if "shape" not in part or ("codes" in part) == ("values" in part):
        raise ValueError(f"packed layer {name!r} needs a shape and either codes or values; it has {sorted(part)}")
    rows, columns, bits = (int(v) for v in part["shape"])
    mask = unpack_bits(part["mask"], 1, rows * columns).bool().view(rows, columns) if "mask" in part else None
    if "values" in part:
        return Layer((rows, columns), mask=mask, values=part["values"].clone())
    count = rows * columns if mask is None else int(mask.sum())
    codes = unpack_bits(part["codes"], bits, count)
    if mask is not None:
        codes = torch.zeros(rows, columns, dtype=torch.uint8).masked_scatter_(mask, codes)
    scale = part["scale"].clone()
    return Layer(
        (rows, columns),
        bits=bits,
        codes=codes.view(rows, columns),
        scale=scale,
        zero=unpack_bits(part["zero"], bits, scale.numel()).view_as(scale) if "zero" in part else None,
        g_idx=part["g_idx"].to(torch.int32) if "g_idx" in part else None,
        mask=mask,
    )


def stats(layers: Mapping[str, Layer], model: nn.Module) -> dict[str, float]:
    """Size of the compressed linears and of the model with them.

    linears, weights: counts. sparsity: share of the weights pruned. bits_per_weight: packed bits, scales, zero points
    and masks included, per weight, pruned ones counted. packed_bytes: the compressed linears; dense_bytes: the same
    in the model's dtype; model_bytes: packed_bytes and every other parameter in its own dtype, tied ones once.
    """
    weights = sum(layer.shape[0] * layer.shape[1] for layer in layers.values())
    kept = sum(layer.kept for layer in layers.values())
    packed = sum(t.numel() * t.element_size() for t in pack(layers).values())
    linear = {f"{name}.weight" for name in layers}
    sizes = {n: p.numel() * p.element_size() for n, p in model.named_parameters()}
    return {
        "linears": len(layers),
        "weights": weights,
        "sparsity": 1 - kept / weights,
        "bits_per_weight": 8 * packed / weights,
        "packed_bytes": packed,
        "dense_bytes": sum(v for n, v in sizes.items() if n in linear),
        "model_bytes": packed + sum(v for n, v in sizes.items() if n not in linear),
    }
