"""Streams of whole numbers 1 to 16 bits wide: value i of width b occupies the bits i*b .. i*b + b - 1, least
significant first, so that 8 values fill b bytes and 3 bits waste nothing.

Before packing, each value is in a lane of 8 bits, from 9 bits on of 16, and 64-bit words hold 8 or 4 lanes. Packing
moves neighbours together, then pairs of them, then fours: a few shifts a word instead of one for every value.
"""

import math

import torch
from torch import Tensor

CHUNK = 2**19  # values at a time on a CPU: with fewer the calls cost more than the work, more leave the cache
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by their bytes


def chunk(count: int, device: torch.device) -> int:
    """How many of `count` values to work on at a time, a multiple of 8: what fits a CPU's cache, all on a GPU."""
    return CHUNK if device.type == "cpu" else 8 * math.ceil(count / 8) + 8


def pack_bits(values: Tensor, bits: int) -> Tensor:
    """Whole numbers below 2^bits, any shape -> uint8 (ceil(count * bits / 8),). Raises ValueError above 16 bits.

    16 bits may be those of a negative int16.
    """
    flat = values.reshape(-1)
    lane, dtype = _lane(bits)
    if bits == lane:
        return flat.to(dtype).clone(memory_format=torch.contiguous_format).view(torch.uint8)
    step = chunk(len(flat), flat.device)
    out = torch.empty(math.ceil(len(flat) / 8), bits, dtype=torch.uint8, device=flat.device)
    for piece, octets in zip(flat.split(step), out.split(step // 8), strict=True):
        lanes = torch.zeros(8 * len(octets), dtype=dtype, device=flat.device)
        lanes[: len(piece)] = piece
        words = lanes.view(torch.int64)
        for width, apart in _steps(bits, lane):
            low = _every(width, 2 * apart)
            odd = (words >> (apart - width)).bitwise_and_(low << width)
            words.bitwise_and_(low).bitwise_or_(odd)
        if bits > 8:  # two words of 4 values each -> one run of bits
            first, second = words.view(-1, 2).unbind(1)
            first |= second << 4 * bits
            second >>= 64 - 4 * bits
        _copy_bytes(words, octets, back=False)
    return out.view(-1)[: math.ceil(len(flat) * bits / 8)]


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of pack_bits: uint8 (count,), above 8 bits int16. Raises ValueError where lengths disagree."""
    lane, dtype = _lane(bits)
    if packed.numel() != math.ceil(count * bits / 8):
        raise ValueError(f"{packed.numel()} bytes cannot hold {count} values of {bits} bits")
    if bits == lane:
        return packed.reshape(-1).clone().view(dtype)
    step = chunk(count, packed.device)
    out = torch.empty(8 * math.ceil(count / 8), dtype=dtype, device=packed.device)
    for piece, lanes in zip(packed.reshape(-1).split(step // 8 * bits), out.split(step), strict=True):
        octets = torch.nn.functional.pad(piece, (0, -len(piece) % bits)).view(-1, bits)
        words = lanes.view(torch.int64)
        _copy_bytes(words, octets, back=True)
        if bits > 8:
            first, second = words.view(-1, 2).unbind(1)
            second <<= 64 - 4 * bits
            second |= (first >> 4 * bits) & (2 ** (64 - 4 * bits) - 1)
        for width, apart in reversed(_steps(bits, lane)):
            low = _every(width, 2 * apart)
            odd = (words << (apart - width)).bitwise_and_(low << apart)
            words.bitwise_and_(low).bitwise_or_(odd)
    return out[:count]


def _copy_bytes(words: Tensor, octets: Tensor, *, back: bool) -> None:
    """The first bytes of what each 8 values lie in to octets (n, bits), or back; what comes after them is undefined."""
    n, bits = octets.shape
    pairs = [(words, octets.view(INTEGERS[bits]).view(-1))] if bits in INTEGERS else []
    if not pairs:  # byte by byte of all words: several times as fast as word by word
        lanes = words.view(torch.uint8).view(n, _lane(bits)[0])
        pairs = [(lanes[:, k], octets[:, k]) for k in range(bits)]
    for a, b in pairs:
        a.copy_(b) if back else b.copy_(a)


def _lane(bits: int) -> tuple[int, torch.dtype]:
    if not 1 <= bits <= 16:
        raise ValueError(f"values of {bits} bits; 1 to 16 are possible")
    return (8, torch.uint8) if bits <= 8 else (16, torch.int16)


def _steps(bits: int, lane: int) -> list[tuple[int, int]]:
    """(width, distance) of the fields before each step."""
    return [(bits * k, lane * k) for k in (1, 2, 4) if 2 * lane * k <= 64]


def _every(width: int, apart: int) -> int:
    """A word with the lowest `width` of every `apart` bits set."""
    return sum((2**width - 1) << at for at in range(0, 64, apart))
