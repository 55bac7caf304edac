"""Perplexity against models whose answer is known and against a slow reference."""

import math
from types import SimpleNamespace

import pytest
import torch
from support.tiny import random_windows, tiny_bloom, tiny_llama, tiny_opt

from ctp.evaluation.perplexity import PerplexityResult, perplexity
from ctp.prompts import attach, prefix

MODELS = {
    "llama": tiny_llama,
    "opt": tiny_opt,
    "opt_projected": lambda: tiny_opt(embed=16),
    "bloom": tiny_bloom,
}


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]()


def random_prompt(model, k, seed=1):
    width = model.get_input_embeddings().embedding_dim
    return torch.randn(k, width, generator=torch.Generator().manual_seed(seed))


def reference(model, windows, prompt=None):
    """Summed NLL one window and one position at a time, float64 log-softmax of all logits."""
    total, k = 0.0, 0 if prompt is None else len(prompt)
    for window in windows:
        embeds = model.get_input_embeddings()(window)
        if prompt is not None:
            embeds = torch.cat([prompt, embeds])
        with torch.no_grad():
            logits = model(inputs_embeds=embeds[None]).logits[0].double()
        for t in range(1, len(window)):
            total -= torch.log_softmax(logits[k + t - 1], dim=0)[window[t]].item()
    return total


@pytest.mark.parametrize("k", [0, 1, 7])
def test_a_uniform_model_has_perplexity_v_for_every_prompt(model, k):
    head = model.get_output_embeddings().weight
    torch.nn.init.zeros_(head)
    result = perplexity(model, random_windows(3, 20), random_prompt(model, k) if k else None)
    # Each fp32 log(61) is off by at most 2.4e-7, exp passes that on as a relative error: 1e-5 is generous.
    assert result.ppl == pytest.approx(61, rel=1e-5)
    assert result.ppl_paper == pytest.approx(61 ** (19 / (19 + k)), rel=1e-5)


def test_without_prompt_it_is_the_models_own_loss(model):
    windows = random_windows(4, 24)
    with torch.no_grad():
        loss = model(input_ids=windows, labels=windows).loss.item()
    result = perplexity(model, windows)
    # Theirs is an fp32 mean of 92 numbers, and every addition may round by 2^-24.
    assert math.log(result.ppl) == pytest.approx(loss, rel=92 * 2**-24)
    assert (result.scored_tokens, result.positions) == (4 * 23, 4 * 23)
    assert result.ppl_paper == result.ppl


@pytest.mark.parametrize("k", [0, 1, 5])
def test_it_equals_the_slow_reference(model, k):
    windows, prompt = random_windows(3, 17), random_prompt(model, k) if k else None
    result = perplexity(model, windows, prompt, batch=2)
    assert result.nll_sum == pytest.approx(reference(model, windows, prompt), rel=1e-6)
    assert (result.scored_tokens, result.positions) == (3 * 16, 3 * (16 + k))


def test_the_prompt_matters_and_its_rows_are_never_scored():
    model, windows = tiny_llama(), random_windows(2, 12)
    a, b = (perplexity(model, windows, random_prompt(model, 4, seed)) for seed in (1, 2))
    assert a.nll_sum != b.nll_sum
    assert a.scored_tokens == b.scored_tokens == 22


def test_the_papers_denominator():
    k, s, n = 7, 13, 5
    model = tiny_opt()
    result = perplexity(model, random_windows(n, s), random_prompt(model, k))
    assert result.positions == n * (s - 1 + k)
    assert result.ppl_paper == pytest.approx(result.ppl ** ((s - 1) / (s - 1 + k)), rel=1e-12)


def test_uniform_over_64_symbols_comes_out_as_44_at_the_papers_lengths():
    result = PerplexityResult(nll_sum=1023 * math.log(64), scored_tokens=1023, positions=1123)
    assert result.ppl == pytest.approx(64)
    assert result.ppl_paper == pytest.approx(44.2, abs=0.05)


def test_batch_size_and_chunks_do_not_change_it(model, monkeypatch):
    windows, prompt = random_windows(7, 15), random_prompt(model, 3)
    sums = [perplexity(model, windows, prompt, batch=b).nll_sum for b in (1, 3, 7, 100)]
    monkeypatch.setattr(attach, "CHUNK", 61 * 4)  # four positions at a time
    sums.append(perplexity(model, windows, prompt, batch=3).nll_sum)
    assert sums == pytest.approx([sums[0]] * 5, rel=1e-5)


def test_a_model_that_cannot_keep_only_some_logits_gives_the_same():
    model, windows = tiny_llama(), random_windows(3, 10)
    prompt, forward = random_prompt(model, 2), model.forward
    expected = perplexity(model, windows, prompt).nll_sum
    model.forward = lambda inputs_embeds, use_cache: forward(inputs_embeds=inputs_embeds, use_cache=use_cache)
    assert perplexity(model, windows, prompt).nll_sum == pytest.approx(expected, rel=1e-6)


def test_bf16_models_are_scored_in_fp32():
    model, windows = tiny_llama().to(torch.bfloat16), random_windows(3, 20)
    with torch.no_grad():
        logits = model(input_ids=windows).logits[:, :-1]
    assert logits.dtype == torch.bfloat16
    exact = -torch.log_softmax(logits.double(), -1).gather(-1, windows[:, 1:, None]).sum().item()
    # The model itself rounds differently for other shapes (one position fewer); the scoring must not add to that.
    assert perplexity(model, windows, batch=3).nll_sum == pytest.approx(exact, rel=2e-3)
    kept = attach.scored_logits(model, windows)
    again = -torch.log_softmax(kept.double(), -1).gather(-1, windows[:, 1:, None]).sum().item()
    assert attach.summed_nll(kept, windows).item() == pytest.approx(again, rel=1e-6)


def test_mode_and_gradient_flags_are_put_back_and_dropout_is_off():
    model, windows = tiny_opt().train(), random_windows(2, 20)
    model.model.decoder.layers[0].eval()
    model.lm_head.weight.requires_grad_(False)
    before = [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]
    assert perplexity(model, windows) == perplexity(model, windows)
    assert before == ([m.training for m in model.modules()], [p.requires_grad for p in model.parameters()])


def test_progress_is_told_after_each_batch():
    seen = []
    perplexity(tiny_llama(), random_windows(5, 8), batch=2, progress=lambda done, n: seen.append((done, n)))
    assert seen == [(2, 5), (4, 5), (5, 5)]


def test_what_does_not_fit_is_refused_with_numbers():
    model = tiny_llama(context=32)
    assert perplexity(model, random_windows(1, 28), random_prompt(model, 4)).scored_tokens == 27
    with pytest.raises(ValueError, match=r"5 prompt rows .* 28 tokens = 33 .* 32"):
        perplexity(model, random_windows(1, 28), random_prompt(model, 5))
    with pytest.raises(ValueError, match=r"16 numbers .* 32"):
        perplexity(model, random_windows(1, 8), torch.zeros(2, 16))
    with pytest.raises(ValueError, match=r"0\.\.61"):
        perplexity(model, torch.tensor([[0, 61]]))
    for bad in (random_windows(1, 1), random_windows(0, 8), random_windows(2, 8).float(), random_windows(1, 8)[0]):
        with pytest.raises(ValueError, match="windows must be"):
            perplexity(model, bad)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_sum_that_is_not_finite_is_an_error(value):
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight[3] = value
    with pytest.raises(FloatingPointError, match="21 tokens"):
        perplexity(model, random_windows(3, 8))


def test_context_is_unlimited_where_the_architecture_has_none():
    attach.check_fit(tiny_bloom(), random_windows(1, 5000), 100)


def test_prompt_rows_are_cast_to_the_embeddings_dtype():
    embedding = torch.nn.Embedding(5, 4, dtype=torch.bfloat16)
    model = SimpleNamespace(get_input_embeddings=lambda: embedding)
    out = prefix.with_prompt(model, torch.tensor([[1, 2], [3, 4]]), torch.ones(3, 4))
    assert out.dtype == torch.bfloat16
    assert out.shape == (2, 5, 4)
    assert torch.equal(out[1, :3], torch.ones(3, 4, dtype=torch.bfloat16))
    assert torch.equal(out[1, 3:], embedding.weight[[3, 4]])
