"""The kernels and the walk of compression on a GPU, next to the plain loop and to the CPU."""

import itertools

import pytest
import torch
from shapes import llama, windows

from ctp.cells import GPTQ, SparseGPT
from ctp.compression.settle import Block, settle_loop
from ctp.compression.solver import factorise, settle, solve
from ctp.compression.walk import compress_model
from ctp.formats.artifact import Compressed
from ctp.formats.layer import Layer
from ctp.formats.pack import pack, unpack
from ctp.formats.packed import PackedLinear
from ctp.machine import triton


def test_triton_runs():
    """All kernels depend on it: without it everything else here would pass on slower code."""
    assert triton.works()


@pytest.mark.parametrize(("columns", "rows"), [(1, 40), (7, 33), (48, 150), (100, 70), (128, 4096), (128, 11008)])
@pytest.mark.parametrize("pruned", [None, "half", (2, 4), (4, 8)])
def test_the_kernel_settles_as_the_loop_does(columns, rows, pruned):
    """But for outputs where rounding decides otherwise between two equally good codes: fewer than 3 %."""
    if isinstance(pruned, tuple) and columns % pruned[1]:
        pytest.skip(f"{pruned} does not divide {columns} columns")
    for bits in (None, 2, 4) if pruned else (2, 3, 4, 8):
        one, other = _block(columns, rows, bits, pruned), _block(columns, rows, bits, pruned)
        settle(one)
        settle_loop(other)
        same = torch.isclose(one.work, other.work, rtol=1e-4, atol=1e-4).all(0).float().mean()
        assert float(same) > 0.97, bits


def test_a_weight_that_is_not_finite_is_refused():
    x = torch.randn(64, 32, device="cuda")
    inverse = factorise(x.T @ x / 64, 0.01, False)
    for bad in (float("nan"), float("inf")):
        weight = torch.randn(16, 32, device="cuda")
        weight[3, 31] = bad  # the last column: its error spreads nowhere
        with pytest.raises(ValueError, match="not finite"):
            solve(weight, inverse, GPTQ(bits=4))


def test_nan_stays_nan_in_the_kernel():
    block = _block(128, 64, 4, None)
    block.work[127, 5] = float("nan")
    settle(block)
    assert bool(block.work[127, 5].isnan())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_unpacking_by_the_kernel_gives_the_same_bits(dtype):
    for bits, groups, zero, act in itertools.product((2, 3, 4, 8), (1, 32), (False, True), (False, True)):
        layer = _layer(96, 4096, bits, groups, zero, act)
        fields = {n.split(".")[1]: t for n, t in pack({"w": layer}).items()}
        made = PackedLinear(fields, None, dtype).dense(dtype)
        assert torch.equal(made, unpack(pack({"w": layer}))["w"].dense(dtype)), (bits, groups, zero, act)


@pytest.mark.parametrize(
    "spec", [GPTQ(bits=3), SparseGPT(sparsity=0.5), GPTQ(bits=4, group_size=128, act_order=True)], ids=lambda s: s.label
)
def test_a_compressed_model_loads_in_its_own_memory(spec):
    """At most 1.1 times what it takes, and bit for bit."""
    model = llama()
    small = Compressed.of(model, compress_model(model, windows(8, 2048), spec), None)
    wanted = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
    del model
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loaded = small.model("cuda")
    size = sum(p.nbytes for p in loaded.parameters())
    largest = max(p.nbytes for p in loaded.parameters())
    # Above its size: one matrix while it is unpacked, in float32 beside its codes (6 times its 2 bytes a weight).
    peak = torch.cuda.max_memory_allocated() - before
    assert peak < 1.1 * size + 6 * largest, f"{peak / size:.2f} times the model"
    assert all(torch.equal(wanted[name], tensor.cpu()) for name, tensor in loaded.state_dict().items())
    assert not any(hasattr(m, "_hf_hook") for m in loaded.modules())


def _layer(rows, columns, bits, groups, zero, act):
    def draw(top, *shape, dtype=torch.uint8):
        return torch.randint(top, shape, device="cuda").to(dtype)

    return Layer(
        (rows, columns), bits=bits, codes=draw(2**bits, rows, columns),
        scale=torch.rand(rows, groups, device="cuda").add_(0.01).half(),
        zero=draw(2**bits, rows, groups) if zero else None,
        g_idx=draw(groups, columns, dtype=torch.int32) if act else None,
    )  # fmt: skip


def _block(columns, rows, bits, pruned):
    draw = torch.Generator().manual_seed(columns + rows)
    x = torch.randn(4 * columns + 8, columns, generator=draw).cuda()
    upper = factorise(x.T @ x / len(x), 0.01, False).upper
    block = Block(torch.randn(columns, rows, generator=draw).cuda(), upper, torch.empty(columns, rows, device="cuda"))
    if bits:
        groups = -(-columns // 16)
        block.top, block.group = 2**bits - 1, (torch.arange(columns) // 16).cuda()
        block.scale = (torch.rand(groups, rows, generator=draw) * 3 / block.top + 0.1).half().float().cuda()
        block.zero = torch.randint(block.top + 1, (groups, rows), generator=draw).float().cuda()
    if pruned == "half":
        block.drop = (torch.rand(columns, rows, generator=draw) < 0.5).cuda()
    elif pruned:
        block.drop, block.n_of_m = torch.zeros(columns, rows, dtype=torch.bool, device="cuda"), pruned
    return block
