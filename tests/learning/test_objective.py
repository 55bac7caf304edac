"""The loss that is learned by, its gradient and what it keeps, against the model's own forward pass and autograd."""

import pytest
import torch
import torch.nn.functional as F
from support.tiny import random_windows, tiny_bloom, tiny_llama, tiny_mixtral, tiny_opt
from torch import nn

from ctp.kernels.attention import BLOCK, Scratch, causal_attention
from ctp.kernels.block import forward_of
from ctp.kernels.modules import rounded_weights
from ctp.learning.objective import CHUNK, Objective, choose, linear_nll
from ctp.prompts.attach import frozen, scored_logits, summed_nll

K, S = 5, 12
MODELS = {"llama": tiny_llama, "opt": tiny_opt, "projected": lambda: tiny_opt(embed=16), "bloom": tiny_bloom}


def loss_and_gradient(nll, prompt):
    prompt.grad = None
    loss = nll()
    (loss / 7).backward()
    return loss.item(), prompt.grad.clone()


def far(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradient_are_those_of_the_models_own_pass(name, recompute):
    model, windows = MODELS[name](), random_windows(3, S)
    prompt = nn.Parameter(model.get_input_embeddings().weight[:K].detach() + 0.1)
    exact, found = own_and_ours(model, windows, prompt, recompute, name != "bloom")
    assert found[0] == pytest.approx(exact[0], rel=1e-6)  # sums of some hundred numbers in another order
    assert far(found[1], exact[1]) < 1e-4
    with torch.autocast("cpu", torch.bfloat16):
        rounded, found = own_and_ours(model, windows, prompt, recompute, name != "bloom")
    assert found[0] == pytest.approx(exact[0], rel=2e-3)  # numbers of 8 binary digits through large random weights
    assert far(found[1], exact[1]) < 2 * far(rounded[1], exact[1])  # scores of attention are rounded too


def own_and_ours(model, windows, prompt, recompute, packed):
    with frozen(model):
        own = loss_and_gradient(lambda: summed_nll(scored_logits(model, windows, prompt), windows), prompt)
        ours = choose(model, windows, prompt, recompute)
        assert (ours.packed, ours.headless) == (packed, True)
        with ours.active():
            return own, loss_and_gradient(lambda: ours.nll(windows, prompt), prompt)


def test_a_block_of_known_parts_is_one_function_and_others_are_not():
    model, windows = tiny_llama(), random_windows(3, S)
    prompt = nn.Parameter(model.get_input_embeddings().weight[:K].detach() + 0.1)
    biased, halved = (x.self_attn.q_proj for x in model.model.layers[:2])
    biased.bias = nn.Parameter(torch.linspace(-1, 1, len(biased.weight)))
    halved.register_forward_hook(lambda module, args, out: out / 2)  # nobody knows what a hook does
    blocks = model.model.layers
    with frozen(model):
        assert [forward_of(b) is not None for b in blocks] == [True, False]
        assert forward_of(tiny_opt().model.decoder.layers[0]) is None
    for recompute in (False, True):
        exact, found = own_and_ours(model, windows, prompt, recompute, True)
        assert found[0] == pytest.approx(exact[0], rel=1e-6)
        assert far(found[1], exact[1]) < 1e-4
    blocks[0].mlp.up_proj.weight.requires_grad_()
    assert forward_of(blocks[0]) is None


def test_without_a_prompt_and_with_something_learning_inside():
    model, windows = tiny_llama(), random_windows(3, S)
    with frozen(model):
        inside = model.model.layers[0].self_attn.v_proj.weight.requires_grad_()
        plain = loss_and_gradient(lambda: summed_nll(scored_logits(model, windows), windows), inside)
        ours = choose(model, windows, None, recompute=False)
        with ours.active():
            found = loss_and_gradient(lambda: ours.nll(windows, None), inside)
    assert ours.packed
    assert found[0] == pytest.approx(plain[0], rel=1e-6)
    assert far(found[1], plain[1]) < 1e-5


def test_recomputing_changes_no_bit_and_keeps_less():
    model, windows = tiny_llama(), random_windows(3, S)
    prompt = nn.Parameter(model.get_input_embeddings().weight[:K].detach().clone())
    results, kept = [], []
    with frozen(model):
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        for recompute in (False, True):
            stored = {}

            def keep(t, stored=stored):
                stored[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
                return t

            ours = Objective(model, packed=True, headless=True, recompute=recompute)
            with ours.active(), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
                results.append(loss_and_gradient(lambda ours=ours: ours.nll(windows, prompt), prompt))
            kept.append(sum(n for place, n in stored.items() if place not in weights))
    assert results[0][0] == results[1][0]
    assert torch.equal(results[0][1], results[1][1])
    assert kept[1] < 0.75 * kept[0]


def test_the_model_is_left_as_it_was():
    model, windows = tiny_llama(), random_windows(2, S)
    before, state = scored_logits(model, windows), {n: dict(vars(m)) for n, m in model.named_modules()}

    def interrupted():
        with frozen(model), rounded_weights(model, torch.bfloat16, torch.bfloat16):
            assert model.lm_head.weight.dtype == torch.bfloat16
            assert model.get_input_embeddings().weight.dtype == torch.float32
            with Objective(model, packed=True, headless=True, recompute=True).active():
                assert "forward" in vars(model.model.norm)
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        interrupted()
    assert all(dict(vars(m)) == state[n] for n, m in model.named_modules())
    assert torch.equal(scored_logits(model, windows), before)
    assert model.config._attn_implementation == "sdpa"


def test_what_is_not_plainly_causal_or_not_a_plain_head_is_left_to_the_model():
    windows = random_windows(2, S)
    sliding = tiny_mixtral()
    sliding.config.sliding_window = 6
    prompt = nn.Parameter(sliding.get_input_embeddings().weight[:K].detach().clone())
    with frozen(sliding):
        ours = choose(sliding, windows, prompt)
        assert not ours.packed
        assert ours.headless
        plain = loss_and_gradient(lambda: summed_nll(scored_logits(sliding, windows, prompt), windows), prompt)
        with ours.active():
            found = loss_and_gradient(lambda: ours.nll(windows, prompt), prompt)
    assert found[0] == pytest.approx(plain[0], rel=1e-6)
    assert far(found[1], plain[1]) < 1e-4
    biased = tiny_llama()
    biased.lm_head = nn.Linear(32, 61)
    scaled = tiny_llama()
    scaled.register_forward_hook(lambda model, args, out: out)  # something happens around it
    with frozen(biased), frozen(scaled):
        assert not choose(biased, windows, prompt).headless
        assert not choose(scaled, windows, prompt).headless


@pytest.mark.parametrize("rows", [1, 7, 64])
def test_linear_nll_is_cross_entropy_in_chunks(monkeypatch, rows):
    monkeypatch.setitem(CHUNK, "cpu", 61 * rows)
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(20, 8, requires_grad=True), 3 * torch.randn(61, 8), torch.arange(20)
    wanted = F.cross_entropy(hidden @ weight.T, targets, reduction="sum")
    gradient = torch.autograd.grad(wanted, hidden)[0]
    found = linear_nll(hidden, weight, targets)
    assert found.dtype == torch.float64
    assert found.item() == pytest.approx(wanted.item(), rel=1e-6)
    assert torch.allclose(torch.autograd.grad(found, hidden)[0], gradient, atol=1e-5)
    assert linear_nll(hidden.detach(), weight, targets).item() == found.item()


def test_a_logit_that_overflows_an_exponential_does_not_overflow_the_loss():
    hidden = torch.tensor([[1000.0, 0.0]], requires_grad=True)
    loss = linear_nll(hidden, torch.eye(2), torch.tensor([1]))
    assert loss.item() == 1000
    assert torch.equal(torch.autograd.grad(loss, hidden)[0], torch.tensor([[1.0, -1.0]]))


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize(("t", "s"), [(1, 1), (6, 9), (BLOCK + 3, BLOCK + 3), (2 * BLOCK + 1, 2 * BLOCK + 30)])
def test_attention_is_torchs(t, s, keep):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, h, n, 8, requires_grad=True) for h, n in ((4, t), (2, s), (2, s)))
    mask = torch.ones(t, s, dtype=torch.bool).tril(s - t)
    grouped = [x.repeat_interleave(2, 1) for x in (k, v)]
    wanted = F.scaled_dot_product_attention(q, *grouped, attn_mask=mask, scale=0.3)
    found = causal_attention(q, k, v, 0.3, keep, Scratch())
    seed = torch.randn_like(wanted)
    assert torch.allclose(found, wanted, atol=1e-5)
    for a, b in zip(*(torch.autograd.grad(o, (q, k, v), seed) for o in (found, wanted)), strict=True):
        assert torch.allclose(a, b, atol=1e-4)
