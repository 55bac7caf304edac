"""Rows of small whole numbers as rows of 32-bit words: the bit streams that checkpoint formats are made of."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ctp.compression.layer import Layer
from ctp.compression.pack import pack_bits, unpack_bits


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
