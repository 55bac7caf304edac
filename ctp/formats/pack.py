"""Compressed layers as flat tensors at their true bit width, for safetensors, and back bit for bit.

A layer `name` becomes `name.shape` (int32: outputs, inputs, bits; 0 bits: not quantized) and what it has of
`name.codes` (kept weights only), `name.scale`, `name.zero`, `name.g_idx`, `name.mask` (1 bit per weight) and
`name.values`, `name.table`, `name.shift`; all but shape and the last three are streams of `bits.py`.

The shape of a quantized layer goes on with the number of groups and the type of the scales: 1 (float16), 2 (bfloat16)
take 15 bits, without the sign, which is 0; 0 stands for any other scales, stored as they are. g_idx takes the bits
of the largest group number; above 2^16 groups it is stored as it is. Without the two numbers, both are.
"""

import math
from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from ctp.formats.bits import pack_bits, unpack_bits
from ctp.formats.layer import Layer, gather_kept, scatter_kept

FIELDS = ("shape", "codes", "scale", "zero", "g_idx", "mask", "values", "table", "shift")
UNSIGNED = (None, torch.float16, torch.bfloat16)  # the types in `shape`


def pack(layers: Mapping[str, Layer]) -> dict[str, Tensor]:
    """Compressed layers by module name -> tensors by `module name.field`, on the layers' devices; shapes on the CPU."""
    return {f"{name}.{field}": t for name, layer in layers.items() for field, t in _pack(layer).items()}


def _pack(layer: Layer) -> dict[str, Tensor]:
    out = {"shape": torch.tensor([*layer.shape, layer.bits or 0], dtype=torch.int32)}
    if layer.mask is not None:
        out["mask"] = pack_bits(layer.mask, 1)
    for field in ("values", "table", "shift"):
        if (tensor := getattr(layer, field)) is not None:
            out[field] = _copy(tensor)
    if layer.codes is not None:
        assert layer.bits is not None
        assert layer.scale is not None
        codes = layer.codes if layer.mask is None else gather_kept(layer.codes, layer.mask)
        out["codes"] = pack_bits(codes, layer.bits)
        groups, kind = layer.scale.shape[1], _scale_type(layer.scale)
        out["shape"] = torch.tensor([*layer.shape, layer.bits, groups, kind], dtype=torch.int32)
        out["scale"] = pack_bits(layer.scale.view(torch.int16), 15) if kind else _copy(layer.scale)
        if layer.zero is not None:
            out["zero"] = pack_bits(layer.zero, layer.bits)
        if layer.g_idx is not None:
            width = group_bits(groups)
            out["g_idx"] = _copy(layer.g_idx) if width > 16 else pack_bits(layer.g_idx, width)
    return out


def _copy(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)


def _scale_type(scale: Tensor) -> int:
    """What `shape` calls scales of 15 bits; 0 for scales that need more."""
    if scale.dtype not in UNSIGNED or bool((scale.view(torch.int16) < 0).any()):
        return 0
    return UNSIGNED.index(scale.dtype)


def group_bits(groups: int, stored: bool = True) -> int:
    """Bits of a group's number in a stored g_idx; 0 without one."""
    return max(1, (groups - 1).bit_length()) if stored else 0


def unpack(tensors: Mapping[str, Tensor]) -> dict[str, Layer]:
    """What `pack` made, back into layers, on the tensors' devices. Raises ValueError on what it did not make.

    What is stored as it is, values and some scales, shares the tensors' memory.
    """
    return dict(unpack_each(tensors))


def unpack_each(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Layer]]:
    """The same layer by layer, for models that unpacked do not fit into memory beside what is made of them."""
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, field = key.rpartition(".")
        if field not in FIELDS:
            raise ValueError(f"{key!r} is no part of a packed layer; parts are {', '.join(FIELDS)}")
        parts.setdefault(name, {})[field] = tensor
    for name, part in parts.items():
        if "shape" not in part or ("codes" in part) == ("values" in part):
            raise ValueError(f"packed layer {name!r} needs a shape and either codes or values; it has {sorted(part)}")
        try:
            layer = _unpack(part)
        except ValueError as error:
            raise ValueError(f"packed layer {name!r}: {error}") from error
        yield name, layer


def _unpack(part: Mapping[str, Tensor]) -> Layer:
    rows, columns, bits, *more = part["shape"].tolist()
    mask = None
    if "mask" in part:
        mask = unpack_bits(part["mask"], 1, rows * columns).view(torch.bool).view(rows, columns)
    count = rows * columns if mask is None else int(mask.count_nonzero())
    if "values" in part:
        if part["values"].numel() != count:
            raise ValueError(f"{part['values'].numel()} values for {count} weights that are kept")
        return Layer((rows, columns), mask=mask, values=part["values"])
    if "scale" not in part:
        raise ValueError("codes need scales")
    codes = unpack_bits(part["codes"], bits, count)
    scale, g_idx = _unpack_groups(part, rows, columns, *more)
    return Layer(
        (rows, columns),
        bits=bits,
        codes=codes.view(rows, columns) if mask is None else scatter_kept(codes, mask),
        scale=scale,
        zero=unpack_bits(part["zero"], bits, scale.numel()).view(scale.shape) if "zero" in part else None,
        g_idx=g_idx,
        mask=mask,
        table=part.get("table"),
        shift=part.get("shift"),
    )


def _unpack_groups(
    part: Mapping[str, Tensor], rows: int, columns: int, groups: int = 0, kind: int = 0
) -> tuple[Tensor, Tensor | None]:
    """(scales, g_idx)."""
    if not 0 <= kind < len(UNSIGNED):
        raise ValueError(f"type {kind} of scales is unknown")
    scale, g_idx, dtype = part["scale"], part.get("g_idx"), UNSIGNED[kind]
    if dtype is not None:
        scale = unpack_bits(scale, 15, rows * groups).view(dtype).view(rows, groups)
    if g_idx is not None:
        packed = 0 < groups <= 2**16  # int16 holds the upper half of 16 bits as negative numbers
        g_idx = unpack_bits(g_idx, group_bits(groups), columns).int() & 0xFFFF if packed else g_idx.to(torch.int32)
    return scale, g_idx


def stats(packed: Mapping[str, Tensor], rest: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, float]:
    """Size of the compressed linears `packed` and of the model with its other weights `rest`, tied ones once.

    linears, weights: counts. sparsity: share of the weights pruned. bits_per_weight: packed bits, scales, zero points
    and masks included, per weight, pruned ones counted. packed_bytes: the compressed linears; dense_bytes: the same
    in `dtype`; model_bytes: packed_bytes and the rest. linear_ratio: 2 bytes (float16) per weight of the linears over
    packed_bytes; model_ratio: 2 bytes per weight of the model over model_bytes.
    """
    sizes = {n.removesuffix(".shape"): t.tolist() for n, t in packed.items() if n.endswith(".shape")}
    weights = sum(rows * columns for rows, columns, *_ in sizes.values())
    masks = (unpack_bits(packed[f"{n}.mask"], 1, s[0] * s[1]) for n, s in sizes.items() if f"{n}.mask" in packed)
    pruned = sum(len(mask) - int(mask.count_nonzero()) for mask in masks)
    packed_bytes = sum(t.nbytes for t in packed.values())
    model_bytes = packed_bytes + sum(t.nbytes for t in rest.values())
    return {
        "linears": len(sizes),
        "weights": weights,
        "sparsity": pruned / weights,
        "bits_per_weight": 8 * packed_bytes / weights,
        "packed_bytes": packed_bytes,
        "dense_bytes": weights * dtype.itemsize,
        "model_bytes": model_bytes,
        "linear_ratio": 2 * weights / packed_bytes,
        "model_ratio": 2 * (weights + sum(t.numel() for t in rest.values())) / model_bytes,
    }


def to_words(values: Tensor, bits: int) -> Tensor:
    """uint8 (rows, n) below 2^bits -> int32 (rows, ceil(n * bits / 32)): each row a little-endian bit stream."""
    rows, n = values.shape
    whole = math.ceil(n / 32) * bits  # words of a row filled up to a multiple of 32 values
    octets = pack_bits(F.pad(values.to(torch.uint8), (0, -n % 32)), bits)
    return octets.view(torch.int32).view(rows, whole)[:, : math.ceil(n * bits / 32)].contiguous()


def from_words(words: Tensor, bits: int, n: int) -> Tensor:
    """The inverse of `to_words`: uint8 (rows, n). Raises ValueError where the words cannot hold n values."""
    rows, have = words.shape
    if have != math.ceil(n * bits / 32):
        raise ValueError(f"{have} words a row cannot be {n} values of {bits} bits")
    padded = F.pad(words, (0, -have % bits)).contiguous()
    count = padded.shape[1] * 32 // bits
    return unpack_bits(padded.view(torch.uint8).flatten(), bits, rows * count).view(rows, count)[:, :n].contiguous()


def stored_codes(layer: Layer) -> Tensor:
    """Codes (outputs, inputs) for formats without masks: a pruned weight gets its zero point, which is exactly 0."""
    assert layer.codes is not None
    if layer.mask is None:
        return layer.codes
    return torch.where(layer.mask, layer.codes, layer.zero_points().index_select(1, layer.groups()))
