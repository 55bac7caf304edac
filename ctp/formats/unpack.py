"""Packed weights to ordinary ones on a GPU, in one Triton launch."""

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

SIZE = 1024  # weights of one program


@triton.jit
def _field(stream, index, WIDTH: tl.constexpr, last, inside):  # type: ignore[no-untyped-def]
    """Value `index` of a stream of WIDTH-bit values (`ctp.formats.bits`). last: index of the last byte."""
    at = index * WIDTH
    byte = at >> 3
    value = tl.load(stream + byte, mask=inside, other=0).to(tl.int32)
    if 8 % WIDTH != 0:
        value |= tl.load(stream + byte + 1, mask=inside & (byte < last), other=0).to(tl.int32) << 8
    if WIDTH > 9:
        value |= tl.load(stream + byte + 2, mask=inside & (byte + 1 < last), other=0).to(tl.int32) << 16
    return (value >> (at & 7).to(tl.int32)) & ((1 << WIDTH) - 1)


@triton.jit
def _dense(  # type: ignore[no-untyped-def]
    out, codes, scale, zero, g_idx, count, columns, groups, last_code, last_scale, last_zero, last_index,
    BITS: tl.constexpr, SCALES: tl.constexpr, ZEROS: tl.constexpr, INDEX: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = at < count
    code = _field(codes, at, BITS, last_code, inside)
    row, column = at // columns, at % columns
    if INDEX > 0:
        group = _field(g_idx, column, INDEX, last_index, inside).to(tl.int64)
    else:
        group = column // (columns // groups)
    place = row * groups + group
    if SCALES == 0:
        step = tl.load(scale + place, mask=inside, other=0.0).to(tl.float32)
    elif SCALES == 1:
        step = _field(scale, place, 15, last_scale, inside).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        step = _field(scale, place, 15, last_scale, inside).to(tl.int16).to(tl.bfloat16, bitcast=True).to(tl.float32)
    if ZEROS:
        code -= _field(zero, place, BITS, last_zero, inside)
    else:
        code -= 1 << (BITS - 1)
    tl.store(out + at, (code.to(tl.float32) * step).to(out.dtype.element_ty), mask=inside)


def dense(
    shape: tuple[int, int], bits: int, groups: int, kind: int, dtype: torch.dtype, *,
    codes: Tensor, scale: Tensor, zero: Tensor | None = None, g_idx: Tensor | None = None, index_bits: int = 0,
) -> Tensor:  # fmt: skip
    """The weight (outputs, inputs) in `dtype` of a quantized layer without a mask, as `Layer.dense` gives it bit for
    bit. The fields are those of `ctp.formats.pack`; kind: how scales are stored there (0: as they are, float16: 1,
    bfloat16: 2); index_bits: of a group's number in g_idx.
    """
    out = torch.empty(shape, dtype=dtype, device=codes.device)

    def last(stream: Tensor | None) -> int:
        return 0 if stream is None else stream.numel() - 1

    grid = (triton.cdiv(out.numel(), SIZE),)
    with torch.cuda.device(codes.device) if codes.is_cuda else nullcontext():  # Triton launches on the current GPU
        _dense[grid](
            out, codes, scale, codes if zero is None else zero, codes if g_idx is None else g_idx, out.numel(),
            shape[1], groups, last(codes), last(scale), last(zero), last(g_idx),
            BITS=bits, SCALES=kind, ZEROS=zero is not None, INDEX=index_bits, SIZE=SIZE,
        )  # fmt: skip
    return out
