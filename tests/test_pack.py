"""Packed layers: bit-exact round trips at the true width, on everything a layer can be."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from ctp.compression import Layer, pack, stats, unpack
from ctp.compression.pack import pack_bits, unpack_bits


@st.composite
def layers(draw: st.DrawFn) -> Layer:
    """Any layer: sparse, quantized or both; empty, all zero and all kept included."""
    groups, size = draw(st.integers(1, 5)), draw(st.integers(1, 9))
    rows, columns = draw(st.integers(0, 7)), groups * size
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    bits = draw(st.sampled_from([None, 2, 3, 4, 8]))
    share = draw(st.sampled_from([0.0, 0.3, 0.5, 1.0] if bits is None else [None, 0.0, 0.3, 0.5, 1.0]))
    mask = None if share is None else torch.rand(rows, columns, generator=generator) < share
    if bits is None:
        assert mask is not None
        dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
        return Layer((rows, columns), mask=mask, values=torch.randn(int(mask.sum()), generator=generator).to(dtype))
    codes = torch.randint(2**bits, (rows, columns), generator=generator, dtype=torch.uint8)
    zero = torch.randint(2**bits, (rows, groups), generator=generator, dtype=torch.uint8)
    order = torch.randperm(columns, generator=generator)
    return Layer(
        (rows, columns),
        bits=bits,
        codes=codes if mask is None else codes.masked_fill(~mask, 0),
        scale=torch.rand(rows, groups, generator=generator).half(),
        zero=None if draw(st.booleans()) else zero,
        g_idx=(order // size).int() if draw(st.booleans()) else None,
        mask=mask,
    )


def assert_same(a: Layer, b: Layer) -> None:
    assert (a.shape, a.bits) == (b.shape, b.bits)
    for field in ("codes", "scale", "zero", "g_idx", "mask", "values"):
        x, y = getattr(a, field), getattr(b, field)
        assert (x is None) == (y is None), field
        if x is not None:
            assert x.dtype == y.dtype, field
            assert torch.equal(x, y), field


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.sampled_from(["a", "model.layers.0.q", "codes", "x.scale"]), layers(), min_size=1))
def test_round_trip_through_a_file_is_exact(some: dict[str, Layer]) -> None:
    back = unpack(load(save(pack(some))))
    assert set(back) == set(some)
    for name, layer in some.items():
        assert_same(back[name], layer)
        for dtype in (torch.float32, torch.bfloat16):
            assert torch.equal(back[name].dense(dtype), layer.dense(dtype))


@settings(max_examples=100, deadline=None)
@given(st.sampled_from([1, 2, 3, 4, 8]), st.integers(0, 70), st.integers(0, 2**31))
def test_bits_waste_less_than_a_byte(bits: int, count: int, seed: int) -> None:
    values = torch.randint(2**bits, (count,), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    packed = pack_bits(values, bits)
    assert packed.dtype == torch.uint8
    assert packed.numel() == math.ceil(count * bits / 8)
    assert torch.equal(unpack_bits(packed, bits, count), values)


def test_the_stream_starts_with_the_least_significant_bit() -> None:
    # 3 bits: 1, 2, 3 -> 001 010 011 from the right: 0b11_010_001, then the highest bit of 3
    assert pack_bits(torch.tensor([1, 2, 3], dtype=torch.uint8), 3).tolist() == [0b11010001, 0]
    assert pack_bits(torch.tensor([True, False, True]), 1).tolist() == [0b101]


def test_only_kept_codes_are_stored() -> None:
    mask = torch.zeros(8, 32, dtype=torch.bool)
    mask[:, ::2] = True
    layer = Layer((8, 32), bits=3, codes=mask.byte() * 5, scale=torch.ones(8, 1).half(), mask=mask)
    tensors = pack({"w": layer})
    assert tensors["w.codes"].numel() == 8 * 16 * 3 // 8
    assert tensors["w.mask"].numel() == 8 * 32 // 8


def test_a_stranger_is_refused() -> None:
    good = pack({"w": Layer((1, 8), mask=torch.ones(1, 8, dtype=torch.bool), values=torch.ones(8))})
    with pytest.raises(ValueError, match="no part of a packed layer"):
        unpack({**good, "w.weight": torch.ones(1)})
    with pytest.raises(ValueError, match="needs a shape"):
        unpack({"w.mask": good["w.mask"]})
    with pytest.raises(ValueError, match="cannot hold"):
        unpack({**good, "w.mask": torch.zeros(2, dtype=torch.uint8)})


def test_sizes() -> None:
    model = torch.nn.ModuleDict({"w": torch.nn.Linear(64, 8, bias=False), "norm": torch.nn.Linear(1, 10, bias=False)})
    layer = Layer((8, 64), bits=4, codes=torch.zeros(8, 64, dtype=torch.uint8), scale=torch.ones(8, 2).half())
    got = stats({"w": layer}, model)
    packed = 8 * 64 // 2 + 8 * 2 * 2 + 3 * 4  # codes, scales, shape
    assert got["packed_bytes"] == packed
    assert got["bits_per_weight"] == 8 * packed / 512
    assert got["dense_bytes"] == 4 * 512
    assert got["model_bytes"] == packed + 40
    assert got["sparsity"] == 0
