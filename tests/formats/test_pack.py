"""Packed layers: bit-exact round trips at the true width, on everything a layer can be."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from ctp.formats import bits
from ctp.formats.bits import pack_bits, unpack_bits
from ctp.formats.layer import Layer
from ctp.formats.pack import pack, stats, unpack, unpack_each

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(params=[2**19, 16], ids=["one_chunk", "small_chunks"])
def chunks(request, monkeypatch):
    """Everything with the chunks that are used, and with so small ones that tiny tensors have many."""
    monkeypatch.setattr(bits, "CHUNK", request.param)


@st.composite
def layers(draw: st.DrawFn) -> Layer:
    """Any layer: sparse, quantized, both or neither; empty, all zero and all kept; scales of any type and sign."""
    groups, size = draw(st.integers(1, 5)), draw(st.integers(1, 9))
    rows, columns = draw(st.integers(0, 7)), groups * size
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    width = draw(st.sampled_from([None, *range(1, 9)]))
    share = draw(st.sampled_from([None, 0.0, 0.3, 0.5, 1.0]))
    mask = None if share is None else torch.rand(columns, rows, generator=generator).lt(share).T
    if width is None:
        kept = rows * columns if mask is None else int(mask.sum())
        values = torch.randn(2 * kept, generator=generator).to(draw(st.sampled_from(DTYPES)))[::2]
        return Layer((rows, columns), mask=mask, values=values)
    codes = torch.randint(2**width, (columns, rows), generator=generator, dtype=torch.uint8).T
    zero = torch.randint(2**width, (groups, rows), generator=generator, dtype=torch.uint8).T
    scale = torch.rand(groups, rows, generator=generator).T - (0.5 if draw(st.booleans()) else 0)
    order = torch.randperm(columns, generator=generator)
    return Layer(
        (rows, columns),
        bits=width,
        codes=codes if mask is None else codes.masked_fill(~mask, 0),
        scale=scale.to(draw(st.sampled_from(DTYPES))),
        zero=None if draw(st.booleans()) else zero,
        g_idx=(order // size).int() if draw(st.booleans()) else None,
        mask=mask,
    )


def dense(layer: Layer, dtype: torch.dtype) -> torch.Tensor:
    """One weight after the other."""
    lists = {f: None if getattr(layer, f) is None else getattr(layer, f).tolist() for f in ("codes", "zero", "mask")}
    codes, zero, mask = lists.values()
    values, weight = iter([] if layer.values is None else layer.values.tolist()), np.zeros(layer.shape, np.float32)
    scale = None if layer.scale is None else layer.scale.float().numpy()
    for i, j in np.ndindex(*layer.shape):
        if mask and not mask[i][j]:
            continue
        if scale is None:
            weight[i, j] = next(values)
            continue
        g = j // (layer.shape[1] // scale.shape[1]) if layer.g_idx is None else int(layer.g_idx[j])
        weight[i, j] = np.float32(codes[i][j] - (zero[i][g] if zero else 2 ** (layer.bits - 1))) * scale[i, g]
    return torch.from_numpy(weight).to(dtype)


def stream(values: list[int], width: int) -> bytes:
    """One bit after the other."""
    every = [value >> k & 1 for value in values for k in range(width)]
    return np.packbits(np.array(every, dtype=np.uint8), bitorder="little").tobytes()


def equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """To the bit: -0 is not 0."""
    return a.dtype == b.dtype and torch.equal(*(x.view(bits.INTEGERS[x.dtype.itemsize]) for x in (a, b)))


def assert_same(a: Layer, b: Layer) -> None:
    assert (a.shape, a.bits) == (b.shape, b.bits)
    for field in ("codes", "scale", "zero", "g_idx", "mask", "values"):
        x, y = getattr(a, field), getattr(b, field)
        assert (x is None) == (y is None), field
        assert x is None or equal(x, y), field


@pytest.mark.usefixtures("chunks")
@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.sampled_from(["a", "model.layers.0.q", "codes", "x.scale"]), layers(), min_size=1))
def test_round_trip_through_a_file_is_exact(some: dict[str, Layer]) -> None:
    tensors = load(save(pack(some)))
    back = unpack(tensors)
    assert set(back) == set(some)
    for name, layer in unpack_each(tensors):
        assert_same(layer, some[name])
        assert_same(layer, back[name])


@pytest.mark.usefixtures("chunks")
@settings(max_examples=100, deadline=None)
@given(layers(), st.sampled_from(DTYPES))
def test_the_dense_form_is_code_minus_zero_times_scale(layer: Layer, dtype: torch.dtype) -> None:
    assert equal(layer.dense(dtype), dense(layer, dtype))
    assert equal(unpack(pack({"w": layer}))["w"].dense(dtype), dense(layer, dtype))


@pytest.mark.usefixtures("chunks")
@settings(max_examples=150, deadline=None)
@given(st.integers(1, 16), st.integers(0, 70), st.integers(1, 3), st.integers(0, 2**31))
def test_a_stream_is_that_of_the_bits_one_by_one(width: int, count: int, stride: int, seed: int) -> None:
    dtype = torch.uint8 if width <= 8 else torch.int32
    values = torch.randint(2**width, (stride * count,), generator=torch.Generator().manual_seed(seed), dtype=dtype)
    values = values[::stride]
    packed = pack_bits(values, width)
    assert packed.dtype == torch.uint8
    assert packed.numel() == math.ceil(count * width / 8)
    assert packed.numpy().tobytes() == stream(values.tolist(), width)
    back = unpack_bits(packed, width, count)
    assert back.dtype == (torch.uint8 if width <= 8 else torch.int16)
    assert torch.equal(back.int() & 0xFFFF, values.int())


def test_impossible_streams_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot hold"):
        unpack_bits(torch.zeros(4, dtype=torch.uint8), 8, 3)
    for width in (0, 17):
        with pytest.raises(ValueError, match="1 to 16 are possible"):
            pack_bits(torch.zeros(4, dtype=torch.uint8), width)


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


@pytest.mark.parametrize("groups", [1, 2, 3, 200, 256, 257, 5000, 2**16, 2**16 + 1])
def test_group_numbers_take_the_bits_they_need(groups: int) -> None:
    codes = torch.zeros(1, groups, dtype=torch.uint8)
    layer = Layer((1, groups), bits=2, codes=codes, scale=torch.ones(1, groups).half(),
                  g_idx=torch.arange(groups).flip(0).int())  # fmt: skip
    tensors = pack({"w": layer})
    width = max(1, (groups - 1).bit_length())
    assert tensors["w.g_idx"].nbytes == (math.ceil(groups * width / 8) if width <= 16 else 4 * groups)
    assert_same(unpack(tensors)["w"], layer)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scales_lose_their_sign_where_none_has_one(dtype: torch.dtype) -> None:
    codes = torch.zeros(8, 64, dtype=torch.uint8)
    scale = torch.rand(8, 16).to(dtype)
    scale[0, :3] = torch.tensor([0.0, torch.inf, torch.nan], dtype=dtype)
    packed = pack({"w": Layer((8, 64), bits=4, codes=codes, scale=scale)})
    assert packed["w.scale"].nbytes == (8 * 16 * 4 if dtype == torch.float32 else 8 * 16 * 15 // 8)
    assert equal(unpack(packed)["w"].scale, scale)
    scale[0, 0] = -0.0
    packed = pack({"w": Layer((8, 64), bits=4, codes=codes, scale=scale)})
    assert packed["w.scale"].nbytes == scale.nbytes
    assert equal(unpack(packed)["w"].scale, scale)


def test_scales_and_groups_as_they_are_stay_readable() -> None:
    """The layout with a shape of 3 numbers."""
    layer = Layer(
        (4, 8), bits=3, codes=torch.arange(32, dtype=torch.uint8).view(4, 8) % 8, scale=torch.rand(4, 2).half(),
        g_idx=torch.tensor([0, 1] * 4, dtype=torch.int32),
    )  # fmt: skip
    tensors = pack({"w": layer})
    assert layer.g_idx is not None
    for raw in (torch.uint8, torch.int32):
        old = {"w.shape": tensors["w.shape"][:3], "w.scale": layer.scale, "w.g_idx": layer.g_idx.to(raw)}
        assert_same(unpack({**tensors, **old})["w"], layer)


def test_a_stranger_is_refused() -> None:
    good = pack({"w": Layer((1, 8), mask=torch.ones(1, 8, dtype=torch.bool), values=torch.ones(8))})
    with pytest.raises(ValueError, match="no part of a packed layer"):
        unpack({**good, "w.weight": torch.ones(1)})
    with pytest.raises(ValueError, match="needs a shape"):
        unpack({"w.mask": good["w.mask"]})
    with pytest.raises(ValueError, match=r"'w': .* cannot hold"):
        unpack({**good, "w.mask": torch.zeros(2, dtype=torch.uint8)})
    with pytest.raises(ValueError, match="'w': 8 values for 7 weights"):
        unpack({**good, "w.mask": torch.tensor([0b01111111], dtype=torch.uint8)})


def test_sizes() -> None:
    layer = Layer((8, 64), bits=4, codes=torch.zeros(8, 64, dtype=torch.uint8), scale=torch.ones(8, 2).half())
    got = stats(pack({"w": layer}), {"norm": torch.zeros(10)}, torch.float32)
    packed = 8 * 64 // 2 + 8 * 2 * 15 // 8 + 5 * 4  # codes, scales, shape
    assert got["packed_bytes"] == packed
    assert got["bits_per_weight"] == 8 * packed / 512
    assert got["dense_bytes"] == 4 * 512
    assert got["model_bytes"] == packed + 40
    assert got["linear_ratio"] == 2 * 512 / packed
    assert got["model_ratio"] == 2 * 522 / (packed + 40)
    assert got["sparsity"] == 0


def test_sparsity_is_counted_in_the_masks() -> None:
    mask = torch.tensor([[True, False, False, True], [True, True, True, False]])
    sparse = Layer((2, 4), mask=mask, values=torch.ones(5))
    whole = Layer((2, 4), values=torch.ones(8))
    assert stats(pack({"a": sparse, "b": whole}), {}, torch.float16)["sparsity"] == 3 / 16


SMOLLM2 = [(576, 576)] * 2 + [(192, 576)] * 2 + [(1536, 576)] * 2 + [(576, 1536)]
LLAMA_7B = [(64, 4096)] * 4 + [(172, 4096)] * 2 + [(64, 11008)]  # every 64th row


@pytest.mark.parametrize(("shapes", "size"), [(SMOLLM2, 64), (LLAMA_7B, 128)], ids=["smollm2", "llama-7b"])
@pytest.mark.parametrize(
    ("width", "sparsity", "most"),
    [(4, 0, 4.3), (3, 0, 3.3), (2, 0, 2.3), (None, 0.5, 9.1), (None, 0.75, 5.1), (4, 0.5, 3.3)],
)
def test_bits_per_weight(
    shapes: list[tuple[int, int]], size: int, width: int | None, sparsity: float, most: float
) -> None:
    """All that a block's linears take, on asymmetric grids."""
    total = 0
    for rows, columns in shapes:
        mask = torch.arange(rows * columns).view(rows, columns) % 4 >= 4 * sparsity if sparsity else None
        if width is None:
            assert mask is not None
            layer = Layer((rows, columns), mask=mask, values=torch.ones(int(mask.sum())).half())
        else:
            codes, groups = torch.ones(rows, columns, dtype=torch.uint8), (rows, columns // size)
            layer = Layer((rows, columns), bits=width, codes=codes if mask is None else codes * mask, mask=mask,
                          scale=torch.ones(groups).half(), zero=torch.ones(groups, dtype=torch.uint8))  # fmt: skip
        total += sum(t.nbytes for t in pack({"w": layer}).values())
    assert 8 * total / sum(rows * columns for rows, columns in shapes) <= most
