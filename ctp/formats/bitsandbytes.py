"""Checkpoints that transformers saves with bitsandbytes, read: nf4 and fp4, with double quantization or without, int8.

A linear of n inputs and m outputs is stored in 4 bits as
    weight              uint8 (m * n / 2, 1)  codes row by row, two a byte, the first in the upper half
    weight.quant_map    float32 (16,)         the number that each code stands for
    weight.absmax       float32 (m * n / blocksize,)  what the numbers of each run of `blocksize` weights are times
    weight.quant_state.bitsandbytes__nf4      uint8, JSON: blocksize, shape, nested_blocksize, nested_offset
and with double quantization absmax is uint8, codes of weight.nested_quant_map (256,) times weight.nested_absmax plus
nested_offset. In 8 bits: weight int8 (m, n) and SCB float32 (m,), the weight is weight * SCB / 127. bitsandbytes rounds
the inputs of 8-bit products to 8 bits too; ctp reads the weights alone.
"""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, FiniteFloat, PositiveInt, ValidationError
from torch import Tensor

from ctp.formats import checks
from ctp.formats.checks import Layers, part
from ctp.formats.layer import Layer

STATE = "weight.quant_state.bitsandbytes__"
FOUR = ("weight", "weight.quant_map", "weight.absmax", "weight.nested_quant_map", "weight.nested_absmax")
EIGHT = ("SCB", "weight", "weight_format")
KINDS = ("nf4", "fp4")


def check(config: Mapping[str, Any]) -> None:
    """Raises ValueError naming what in a quantization config ctp does not read."""
    four, eight = (config.get(n, config.get(f"_{n}", False)) for n in ("load_in_4bit", "load_in_8bit"))
    if (four is True) == (eight is True):
        raise ValueError(f"load_in_4bit = {four!r} and load_in_8bit = {eight!r} of bitsandbytes: one of them is true")
    if four:
        checks.check_setting("bnb_4bit_quant_type", config.get("bnb_4bit_quant_type", "fp4"), KINDS, " of bitsandbytes")
        storage = config.get("bnb_4bit_quant_storage", "uint8")
        checks.check_setting("bnb_4bit_quant_storage", storage, ("uint8",), " of bitsandbytes")


def layers(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Layers:
    """The quantized linears of a checkpoint. Raises ValueError naming the linear and the tensor that does not fit."""
    for kind in KINDS:
        fields = (f"{STATE}{kind}", *FOUR)
        yield from checks.read_layers(tensors, fields, "bitsandbytes", partial(_four, kind))
    yield from checks.read_layers(tensors, EIGHT, "bitsandbytes", _eight)


def _eight(_: str, tensors: Mapping[str, Tensor]) -> Layer:
    rows, columns = part(tensors, "weight", (torch.int8,), (None, None)).shape
    if "weight_format" in tensors and int(tensors["weight_format"].sum()):
        raise ValueError(f"weight_format is {tensors['weight_format'].tolist()}: should be 0, row by row")
    scale = part(tensors, "SCB", (torch.float32,), (rows,)) * (1 / 127)
    return Layer((rows, columns), bits=8, codes=(tensors["weight"].short() + 128).byte(), scale=scale.unsqueeze(1))


class _State(BaseModel):
    """What quant_state says of a linear; other fields are not read."""

    model_config = ConfigDict(strict=True)
    shape: tuple[PositiveInt, PositiveInt]
    blocksize: PositiveInt
    nested_blocksize: PositiveInt | None = None
    nested_offset: FiniteFloat = 0.0


def _four(kind: str, _: str, tensors: Mapping[str, Tensor]) -> Layer:
    stored = part(tensors, f"{STATE}{kind}", (torch.uint8,), (None,))
    try:
        state = _State.model_validate_json(bytes(stored.tolist()))
    except ValidationError as e:
        raise ValueError(f"quant_state: {'.'.join(map(str, e.errors()[0]['loc']))}: {e.errors()[0]['msg']}") from e
    (rows, columns), size = state.shape, state.blocksize
    count = rows * columns
    octets = part(tensors, "weight", (torch.uint8,), (-(-count // 2), 1)).flatten()
    codes = torch.stack((octets >> 4, octets & 15), 1).flatten()[:count].view(rows, columns)
    table = part(tensors, "weight.quant_map", (torch.float32,), (16,))
    absmax = _absmax(tensors, state, -(-count // size))
    run = math.gcd(columns, size)  # inputs in a row that are in one block, whatever the row
    scale = absmax[torch.arange(0, count, run) // size].view(rows, -1)
    return Layer((rows, columns), bits=4, codes=codes.contiguous(), scale=scale, table=table)


def _absmax(tensors: Mapping[str, Tensor], state: _State, blocks: int) -> Tensor:
    """float32 (blocks,)."""
    if (size := state.nested_blocksize) is None:
        return part(tensors, "weight.absmax", (torch.float32,), (blocks,))
    codes = part(tensors, "weight.absmax", (torch.uint8,), (blocks,)).long()
    numbers = part(tensors, "weight.nested_quant_map", (torch.float32,), (256,))
    nested = part(tensors, "weight.nested_absmax", (torch.float32,), (-(-blocks // size),))
    return numbers[codes] * nested[torch.arange(blocks) // size] + state.nested_offset
