"""The solver on single linears: exact where there is a closed form, better than rounding where there is none."""

import pytest
import torch
from torch import Tensor

from ctp.cells import GPTQ, Solver, SparseGPT
from ctp.compression.quantize import fit, nearest
from ctp.compression.solver import factorise, solve
from ctp.formats.layer import check

ROWS, COLUMNS = 24, 64


def weight(rows: int = ROWS, columns: int = COLUMNS) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def inputs(columns: int = COLUMNS, tokens: int = 512, dtype: torch.dtype = torch.float32) -> Tensor:
    """Correlated inputs of very different size, as activations are."""
    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5 + torch.eye(columns)
    size = torch.logspace(-1, 1, columns)[torch.randperm(columns, generator=generator)]
    return (torch.randn(tokens, columns, generator=generator) @ mix * size).to(dtype)


def hessian(x: Tensor) -> Tensor:
    return x.T @ x / len(x)


def output_error(x: Tensor, before: Tensor, after: Tensor) -> float:
    return float(((before - after) @ x.T.to(before.dtype)).square().sum())


def compress(w: Tensor, h: Tensor, compression: Solver) -> Tensor:
    new, layer = solve(w, factorise(h, compression.damping, compression.act_order), compression)
    assert torch.equal(layer.dense(w.dtype), new)
    check(layer, new, compression)
    return new


def rounded(w: Tensor, bits: int, group: int, *, sym: bool = False, mse: bool = False) -> Tensor:
    """Round to nearest with a grid per row and group of inputs."""
    out = []
    for part in w.split(group, dim=1):
        scale, zero = fit(part.T, bits, sym=sym, mse=mse)
        out.append(nearest(part.T, scale, zero, bits).T)
    return torch.cat(out, dim=1)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("group", [None, 16])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_uncorrelated_inputs_leave_only_rounding(bits: int, group: int | None, sym: bool, act_order: bool) -> None:
    spec = GPTQ(bits=bits, group_size=group, sym=sym, act_order=act_order, block_size=32, refit=False)
    got = compress(weight(), torch.eye(COLUMNS), spec)
    assert torch.equal(got, rounded(weight(), bits, group or COLUMNS, sym=sym))


def test_uncorrelated_inputs_leave_only_magnitude_pruning() -> None:
    got = compress(weight(), torch.eye(COLUMNS), SparseGPT(sparsity=0.5))
    smallest = weight().abs().flatten().argsort()[: ROWS * COLUMNS // 2]
    expected = weight().flatten()
    expected[smallest] = 0
    assert torch.equal(got, expected.view(ROWS, COLUMNS))


def test_one_pruned_weight_matches_the_closed_form() -> None:
    """Optimal brain surgeon: removing weight p of a row changes the row by -w_p / [H^-1]_pp * H^-1[:, p]."""
    w, x = weight(1, 8).double(), inputs(8, dtype=torch.float64)
    damping = 1e-12
    # Only the first column may lose its weight here; the solver then compensates with all later ones.
    w[0, 0] = 1e-3
    got = compress(w, hessian(x), SparseGPT(sparsity=1 / 8, block_size=8, damping=damping))
    inverse = torch.linalg.inv(hessian(x))
    expected = w[0] - w[0, 0] / inverse[0, 0] * inverse[:, 0]
    expected[0] = 0
    torch.testing.assert_close(got[0], expected, rtol=1e-8, atol=1e-10)


def test_factor_is_the_upper_cholesky_factor_of_the_inverse() -> None:
    h = hessian(inputs(dtype=torch.float64))
    damped = h + 0.01 * h.diagonal().mean() * torch.eye(COLUMNS, dtype=torch.float64)
    upper = factorise(h, 0.01, False).upper
    torch.testing.assert_close(upper, torch.linalg.cholesky(torch.linalg.inv(damped), upper=True))


@pytest.mark.parametrize(
    "spec",
    [GPTQ(bits=3), GPTQ(bits=4, group_size=16, act_order=True), GPTQ(bits=2, scale="mse"), GPTQ(bits=4, sym=True)],
    ids=lambda s: s.label,
)
def test_compensated_rounding_beats_rounding(spec: GPTQ) -> None:
    x = inputs()
    got = compress(weight(), hessian(x), spec)
    plain = rounded(weight(), spec.bits, spec.group_size or COLUMNS, sym=spec.sym, mse=spec.scale == "mse")
    assert output_error(x, weight(), got) < 0.85 * output_error(x, weight(), plain)


def test_compensated_pruning_beats_magnitude() -> None:
    x = inputs()
    magnitude = compress(weight(), torch.eye(COLUMNS), SparseGPT(sparsity=0.5))
    got = compress(weight(), hessian(x), SparseGPT(sparsity=0.5))
    assert output_error(x, weight(), got) < 0.5 * output_error(x, weight(), magnitude)


def test_joint_is_sparse_and_on_the_grid_and_near_pruning_alone() -> None:
    x, spec = inputs(), SparseGPT(sparsity=0.5, bits=4)
    got = compress(weight(), hessian(x), spec)
    assert int((got == 0).sum()) >= ROWS * COLUMNS // 2
    after = rounded(compress(weight(), hessian(x), SparseGPT(sparsity=0.5)), 4, COLUMNS)
    assert output_error(x, weight(), got) < output_error(x, weight(), after)


@pytest.mark.parametrize("spec", [{"bits": 4}, {"bits": 3, "group_size": 8}, {"bits": 4, "act_order": True}], ids=str)
def test_block_size_does_not_change_quantization(spec: dict[str, object]) -> None:
    w, h = weight().double(), hessian(inputs(dtype=torch.float64))
    results = [compress(w, h, GPTQ(**spec, block_size=size)) for size in (1, 7, 128)]
    for other in results[1:]:
        torch.testing.assert_close(other, results[0])


@pytest.mark.parametrize("static", [False, True])
def test_act_order_gives_columns_back_in_order(static: bool) -> None:
    x = inputs()
    spec = GPTQ(bits=8, group_size=16, act_order=True, static_groups=static)
    got, layer = solve(weight(), factorise(hessian(x), 0.01, True), spec)
    torch.testing.assert_close(got, weight(), rtol=0, atol=0.3)  # shuffled columns would be off by far more
    assert (layer.g_idx is None) == static
    assert torch.bincount(layer.groups()).tolist() == [16] * 4


@pytest.mark.parametrize(
    "spec",
    [GPTQ(bits=3), GPTQ(bits=2, group_size=16, act_order=True), SparseGPT(sparsity=0.5, bits=3, group_size=8)],
    ids=lambda s: s.label,
)
def test_refitted_scales_keep_the_codes_and_lower_the_error(spec: Solver) -> None:
    x = inputs()
    inverse = factorise(hessian(x), 0.01, spec.act_order)
    plain, before = solve(weight(), inverse, spec.model_copy(update={"refit": False}))
    got, after = solve(weight(), inverse, spec)
    assert before.codes is not None
    assert after.codes is not None
    assert torch.equal(before.codes, after.codes)
    check(after, got, spec)
    assert output_error(x, weight(), got) < 0.98 * output_error(x, weight(), plain)


def test_refitted_scales_survive_a_layer_of_zeros() -> None:
    spec = GPTQ(bits=4, group_size=16)
    got, layer = solve(torch.zeros(4, 64), factorise(hessian(inputs()), 0.01, False), spec)
    check(layer, got, spec)
    assert not got.any()


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8)])
def test_pattern_is_exact(n: int, m: int, bits: int | None) -> None:
    spec = SparseGPT(pattern=f"{n}:{m}", bits=bits, block_size=6)
    _, layer = solve(weight(), factorise(hessian(inputs()), 0.01, False), spec)
    assert layer.mask is not None
    assert ((~layer.mask).view(ROWS, -1, m).sum(-1) == n).all()


@pytest.mark.parametrize("sparsity", [0.01, 1 / 3, 0.5, 0.99])
@pytest.mark.parametrize("block", [5, 128])
def test_sparsity_is_exact(sparsity: float, block: int) -> None:
    spec = SparseGPT(sparsity=sparsity, block_size=block, act_order=True)
    _, layer = solve(weight(), factorise(hessian(inputs()), 0.01, True), spec)
    assert layer.kept == ROWS * COLUMNS - round(sparsity * ROWS * COLUMNS)


def test_dead_inputs_lose_their_weights_and_change_nothing_else() -> None:
    x = inputs()
    x[:, [3, 40]] = 0
    spec = GPTQ(bits=4, act_order=True)
    got = compress(weight(), hessian(x), spec)
    assert not got[:, [3, 40]].any()
    alive = [j for j in range(COLUMNS) if j not in (3, 40)]
    w = weight()
    w[:, [3, 40]] = 0  # neither counts in the range of the grid
    alone = compress(w[:, alive], hessian(x)[alive][:, alive], spec)
    # Factors of 64 and of 62 inputs are summed in other blocks: a scale, which has 11 bits, may be rounded the other
    # way, and so may a code at a tie, behind which its row goes another way. Two of 24 rows may.
    near = torch.isclose(got[:, alive], alone, rtol=2**-10, atol=0).all(1)
    assert near.float().mean() > 0.9


def test_every_scale_of_the_hessian_gives_the_same_result() -> None:
    h = hessian(inputs())
    assert torch.equal(compress(weight(), h * 2**20, GPTQ(bits=4)), compress(weight(), h, GPTQ(bits=4)))


def test_mse_never_rounds_worse_than_minmax() -> None:
    x = weight(200, 32).T.pow(3)
    errors = []
    for mse in (False, True):
        scale, zero = fit(x, 3, sym=False, mse=mse)
        errors.append((nearest(x, scale, zero, 3) - x).abs().pow(2.4).sum(0))
    assert (errors[1] <= errors[0] * (1 + 32 * 2**-24)).all()  # sums of 32 terms, which the search adds up differently
    assert errors[1].sum() < 0.95 * errors[0].sum()


def test_mse_search_finds_the_best_of_all_ranges_for_most_columns() -> None:
    x = weight(300, 64).T
    found = fit(x, 4, sym=False, mse=True)
    low, high = x.amin(0).clamp(max=0), x.amax(0).clamp(min=0)
    best = torch.full_like(low, torch.inf)
    for step in range(80):
        scale = ((high - low) * (1 - step / 100) / 15).half().float()
        zero = torch.round(-low * (1 - step / 100) / scale)
        best = torch.minimum(best, (nearest(x, scale, zero, 4) - x).abs().pow(2.4).sum(0))
    error = (nearest(x, *found, 4) - x).abs().pow(2.4).sum(0)
    assert (error <= best * 1.0001).float().mean() > 0.7
    assert error.sum() < 1.02 * best.sum()


def test_grids_of_constant_and_one_sided_columns_hold_zero() -> None:
    x = torch.stack([torch.zeros(4), torch.full((4,), 3.0), torch.full((4,), -3.0)], dim=1)
    for sym in (False, True):
        scale, zero = fit(x, 8, sym=sym, mse=False)
        got = nearest(x, scale, zero, 8)
        torch.testing.assert_close(got, x, rtol=0.01, atol=0)
        assert not nearest(torch.zeros_like(x), scale, zero, 8).any()


def test_bad_hessians_are_refused() -> None:
    with pytest.raises(ValueError, match="not finite"):
        factorise(torch.full((4, 4), torch.nan), 0.01, False)
    with pytest.raises(ValueError, match="raise damping"):
        factorise(torch.tensor([[1.0, 2.0], [2.0, 1.0]]), 0.01, False)


@pytest.mark.parametrize("spec", [GPTQ(bits=4, group_size=48), SparseGPT(pattern="2:5")], ids=lambda s: s.label)
def test_what_does_not_divide_is_refused(spec: Solver) -> None:
    with pytest.raises(ValueError, match=r"does not divide 64 inputs; allowed: \[2, 4, 8, 16, 32, 64\]"):
        compress(weight(), torch.eye(COLUMNS), spec)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_weights_stay_in_their_dtype(dtype: torch.dtype) -> None:
    for spec in (GPTQ(bits=4, group_size=16), SparseGPT(sparsity=0.5), SparseGPT(pattern="2:4", bits=3)):
        assert compress(weight().to(dtype), hessian(inputs()), spec).dtype == dtype
