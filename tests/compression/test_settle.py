"""The kernels that settle a block against the plain loop, on every combination of options."""

import copy
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ctp.cells import GPTQ, Solver, SparseGPT
from ctp.compression import solver
from ctp.compression.settle import Block, settle_loop
from ctp.compression.solver import factorise, settle, solve

ROWS, COLUMNS = 150, 48  # outputs: two whole tiles and a part of one
QUANTIZED = (None, 2, 4)
PRUNED = (None, "half", (2, 4))


def block(bits: int | None, pruned: object, dtype: torch.dtype = torch.float32) -> Block:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4 * COLUMNS, COLUMNS, generator=generator, dtype=dtype)
    inverse = factorise(x.T @ x / len(x), 0.01, False)
    work = torch.randn(COLUMNS, ROWS, generator=generator, dtype=dtype)
    made = Block(work, inverse.upper, torch.empty_like(work))
    if bits:
        made.group, made.top = torch.arange(COLUMNS) // 16, 2**bits - 1
        made.scale = torch.rand(3, ROWS, generator=generator, dtype=dtype) * 3 / made.top + 0.1
        made.zero = torch.randint(made.top, (3, ROWS), generator=generator).to(dtype)
    if pruned:
        made.drop = torch.zeros(COLUMNS, ROWS, dtype=torch.bool)
        if isinstance(pruned, tuple):
            made.n_of_m = pruned
        else:
            made.drop = torch.rand(COLUMNS, ROWS, generator=generator) < 0.5
    return made


def assert_alike(kernel, bits: int | None, pruned: object, dtype: torch.dtype = torch.float32) -> None:
    """Equal decisions for nearly all outputs, equal numbers within rounding for those.

    An output whose first tie is rounded the other way goes its own way from there: at most 2 % of them may.
    """
    got, expected = block(bits, pruned, dtype), block(bits, pruned, dtype)
    kernel(got)
    settle_loop(expected)
    near = torch.isclose(got.work, expected.work, rtol=1e-4, atol=1e-4).all(0)
    assert near.float().mean() >= 0.98
    torch.testing.assert_close(got.errors[:, near], expected.errors[:, near], rtol=1e-3, atol=1e-3)
    if got.drop is not None and expected.drop is not None:
        assert torch.equal(got.drop[:, near], expected.drop[:, near])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("pruned", PRUNED, ids=str)
@pytest.mark.parametrize("bits", QUANTIZED)
def test_the_compiled_kernel_does_what_the_loop_does(bits, pruned, dtype) -> None:
    from ctp.compression.settle_cpu import settle_cpu

    assert_alike(settle_cpu, bits, pruned, dtype)


def test_the_number_of_threads_does_not_change_a_bit() -> None:
    """Of what the kernel does. The factor that it is given may change, where a library splits sums among threads."""
    before, given, results = torch.get_num_threads(), block(4, (2, 4)), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            made = copy.deepcopy(given)
            settle(made)
            results.append(made)
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert torch.equal(other.work, results[0].work)
        assert torch.equal(other.errors, results[0].errors)
        assert torch.equal(other.drop, results[0].drop)


@pytest.mark.parametrize(
    "spec",
    [
        GPTQ(bits=3, block_size=32),
        GPTQ(bits=4, group_size=16, scale="mse", block_size=32),
        GPTQ(bits=4, group_size=16, act_order=True, static_groups=True),
        SparseGPT(pattern="2:4", bits=4, group_size=6, block_size=8),  # patterns cross groups
        SparseGPT(sparsity=0.5, bits=3, sym=True, act_order=True),
        SparseGPT(pattern="4:8", block_size=24),
    ],
    ids=lambda s: s.label,
)
def test_whole_layers_are_as_good_as_by_the_loop(monkeypatch, spec: Solver) -> None:
    """Squared output errors within 1 %: a code that fell the other way at a tie costs neither more nor less."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(400, 96, generator=generator) @ torch.randn(96, 96, generator=generator)
    weight = torch.randn(ROWS, 96, generator=generator)
    inverse = factorise(x.T @ x / len(x), 0.01, spec.act_order)

    def error() -> tuple[float, torch.Tensor]:
        new, layer = solve(weight, inverse, spec)
        return float(((new - weight) @ x.T).square().sum()), layer.codes if layer.codes is not None else layer.mask

    fast, codes = error()
    monkeypatch.setattr(solver, "settle", settle_loop)
    plain, same = error()
    assert fast == pytest.approx(plain, rel=0.01)
    assert (codes == same).float().mean() > 0.98


@pytest.mark.parametrize("piece", [(0, 128, 0, 1), (0, 300, 0, 4), (16, 112, 48, 1), (0, 24, 6, 4), (0, 96, 12, 4)])
def test_pieces_cover_a_block_and_split_no_group_or_pattern(piece) -> None:
    start, stop, size, m = piece
    pieces = list(solver._pieces(*piece))
    assert [a for a, _ in pieces] == [start, *(b for _, b in pieces[:-1])]
    assert pieces[-1][1] == stop
    assert all(0 < b - a <= 128 for a, b in pieces)
    for a, b in pieces:
        assert not size or (a - start) // size == (b - 1 - start) // size
        assert a // m == (b - 1) // m if size % m else (a - start) % m == 0


def assert_unpacked(bits: int, groups: int, zero: bool, act: bool) -> None:
    """One launch gives the bits that the layer itself does. The interpreter rounds to bfloat16 otherwise than a GPU."""
    from ctp.formats.layer import Layer
    from ctp.formats.pack import group_bits, pack
    from ctp.formats.unpack import dense

    layer = Layer(
        (7, 96), bits=bits, codes=torch.randint(2**bits, (7, 96)).to(torch.uint8), scale=torch.rand(7, groups).half(),
        zero=torch.randint(2**bits, (7, groups)).to(torch.uint8) if zero else None,
        g_idx=torch.randint(groups, (96,)).int() if act else None,
    )  # fmt: skip
    fields = {name.removeprefix("w."): tensor for name, tensor in pack({"w": layer}).items()}
    kind, index_bits = fields.pop("shape").tolist()[4], group_bits(groups, act)
    for dtype in (torch.float32, torch.float16):
        made = dense((7, 96), bits, groups, kind, dtype, **fields, index_bits=index_bits)
        assert torch.equal(made, layer.dense(dtype)), (bits, groups, zero, act)


def test_the_gpu_kernels_do_what_plain_code_does_in_tritons_interpreter() -> None:
    """In a process of its own: triton reads TRITON_INTERPRET when it is imported."""
    pytest.importorskip("triton", reason="triton is not installed: it comes with torch's CUDA builds")
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]


if __name__ == "__main__":
    from ctp.compression.settle_cuda import settle_cuda

    for bits, pruned in itertools.product(QUANTIZED, PRUNED):
        assert_alike(settle_cuda, bits, pruned)
    for bits, groups, zero, act in itertools.product((1, 3, 4, 8), (1, 3), (False, True), (False, True)):
        assert_unpacked(bits, groups, zero, act)


def test_numba_comes_when_columns_are_settled_and_not_before():
    """It takes half a second and 100 MB, which learning and evaluating have no use for."""
    code = (
        "import sys, torch, ctp.api, ctp.execution.execute, ctp.learning.lora, ctp.evaluation.generation\n"
        "from ctp.compression.settle import Block\nfrom ctp.compression.solver import settle\n"
        "assert 'numba' not in sys.modules\n"
        "settle(Block(torch.ones(2, 4), torch.eye(2), torch.empty(2, 4)))\n"
        "assert 'numba' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
