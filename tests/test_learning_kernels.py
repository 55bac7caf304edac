"""The compiled kernels of learning in bfloat16, against the same in torch and fp32."""

import pytest
import torch
import torch.nn.functional as F

from ctp.recover import kernels
from ctp.recover.objective import linear_nll

pytest.importorskip("ctp.recover.kernels_cpu", reason="numba is not installed", exc_type=ImportError)

SHAPES = [(1, 7), (5, 1), (33, 1025), (70, 64)]  # rows are taken 16 at a time, long ones 1024 numbers at a time
HALF = 2.0**-8  # the largest relative error of one rounding to bfloat16, a little over half of its last digit


@pytest.fixture(autouse=True, params=["one", "team", "pool"])
def threads(request, monkeypatch):
    """One thread, two of torch's OpenMP runtime, two of a pool."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if request.param == "one" else 2)
    if request.param == "pool":
        monkeypatch.setattr(kernels, "_team", lambda: None)
    yield
    torch.set_num_threads(before)


def some(*shape, seed=0, scale=1.0):
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).bfloat16()


def rounded_once(found, exact):
    """Is found exact rounded to bfloat16, but for sums in fp32 that fall on the other side of a tie?"""
    assert found.dtype == torch.bfloat16
    return bool(((found.float() - exact).abs() <= HALF * 1.01 * exact.abs() + 1e-30).all())


@pytest.mark.parametrize("shape", SHAPES)
def test_exponentials_and_their_sums(shape):
    z = some(*shape, scale=20)
    z[0, 1:] = -torch.inf
    z[-1, -1] = 3e4
    wide = z.double()
    top = wide.amax(1, keepdim=True)
    wanted = (wide - top).exp()
    tops, sums = kernels.exponentials(z)
    assert torch.equal(tops.double(), top)
    assert ((sums / wanted.sum(1, keepdim=True)) - 1).abs().max() < 1e-6  # fp32: a polynomial, a sum of a few hundred
    kept = (wanted >= 1e-37).float()  # e^-87 and less is 0
    assert rounded_once(z, (wanted * kept).float())


def test_a_logit_that_is_not_a_number_is_not_hidden():
    z = some(3, 40)
    z[1, 5] = torch.nan
    sums = kernels.exponentials(z)[1]
    assert sums.isnan().flatten().tolist() == [False, True, False]


@pytest.mark.parametrize("shape", SHAPES)
def test_norm_and_its_gradient(shape):
    x, grad, base = (some(*shape, seed=i, scale=5) for i in range(3))
    x[0] = 0  # eps alone is under the root
    weight = some(shape[1], seed=3)
    wide = x.float().requires_grad_()
    norm = F.rms_norm(wide, shape[1:], None, 1e-5)
    wanted = torch.autograd.grad(norm * weight, wide, grad.float())[0] + base
    out = kernels.rms_norm(x, weight, 1e-5, torch.empty_like(x))
    twice = (norm.bfloat16() * weight).float()  # as the model's own module rounds
    assert torch.allclose(out.float(), twice, rtol=2 * HALF, atol=0)
    assert (out.float() != twice).float().mean() < 0.01  # where a sum in another order falls on the other side of a tie
    found = kernels.rms_norm_gradient(grad, x, weight, 1e-5, base)
    assert torch.allclose(found.float(), wanted, rtol=HALF, atol=1e-4)  # a difference


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 7), (6, 6), (19, 40)])
def test_causal_softmax(queries, keys):
    scores = some(2, 3 * queries, keys, scale=30)
    seen = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries).repeat(3, 1)
    exact = torch.softmax((0.3 * scores.float()).masked_fill(~seen, -torch.inf), -1)
    found = kernels.causal_softmax(scores, 0.3, queries, torch.full_like(scores, torch.nan))
    assert torch.allclose(found.float(), exact, rtol=HALF, atol=1e-37)
    assert not found[:, ~seen].any()


def test_the_head_has_the_loss_and_the_gradient_that_it_has_without(monkeypatch):
    hidden, weight, targets = some(9, 16), some(61, 16, seed=1), torch.arange(9)
    hidden.requires_grad_()
    results = []
    for known in (True, False):
        if not known:
            monkeypatch.setattr(kernels, "kernels_cpu", None)
        loss = linear_nll(hidden, weight, targets)
        results.append((loss.item(), torch.autograd.grad(loss, hidden)[0]))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)  # the same logits: only sums differ
    assert torch.allclose(results[0][1], results[1][1], rtol=2 * HALF, atol=1e-3)
