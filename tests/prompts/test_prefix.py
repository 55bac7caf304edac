"""A prompt's keys and values, computed once, against the prompt concatenated to every window."""

import pytest
import torch
from support.tiny import PLAIN, random_windows, tiny_llama
from transformers import MambaConfig, MambaForCausalLM, MistralConfig, MistralForCausalLM

from ctp.prompts.attach import token_logits
from ctp.prompts.prefix import prefix


def tiny_mistral():
    """Attention to the last 5 positions only: fewer than the prompt has."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = MistralForCausalLM(MistralConfig(vocab_size=61, num_key_value_heads=2, sliding_window=5, **sizes))
    return model.eval()


def tiny_mamba():
    """A state-space model: its past is no keys and values."""
    torch.manual_seed(0)
    return MambaForCausalLM(MambaConfig(vocab_size=61, hidden_size=32, num_hidden_layers=2, state_size=4)).eval()


CACHED = {
    **PLAIN,
    "mistral": tiny_mistral,
}


def rows(model, k=7):
    width = model.get_input_embeddings().embedding_dim
    return torch.randn(k, width, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", CACHED)
def test_logits_and_gradient_are_those_of_the_concatenated_input(name):
    model = CACHED[name]().requires_grad_(False)
    prompt, windows = rows(model).requires_grad_(), random_windows(3, 13)
    made = prefix(model, prompt)
    assert made.cache is not None
    assert len(made) == made.cache.get_seq_length() == 7
    ours, expected = token_logits(model, windows, made), token_logits(model, windows, prompt)
    assert ours.shape == (3, 13, 61)
    # fp32 sums in another order: 4e-7 of the largest logit was seen. Without the prompt they are 0.2 to 1.7 off.
    assert torch.allclose(ours, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    gradients = [torch.autograd.grad(x.logsumexp(-1).sum(), prompt)[0] for x in (ours, expected)]
    assert (gradients[0] - gradients[1]).norm() <= 1e-5 * gradients[1].norm()


def test_the_prefix_stays_as_it_is_and_serves_any_batch():
    model = tiny_llama()
    with torch.no_grad():
        made = prefix(model, rows(model))
        kept = [t.clone() for layer in made.cache.layers for t in (layer.keys, layer.values)]
        first = token_logits(model, random_windows(4, 9), made)
        parts = [token_logits(model, ids, made) for ids in random_windows(4, 9).split([1, 3])]
    assert torch.allclose(torch.cat(parts), first, atol=1e-5)
    assert made.cache.get_seq_length() == 7
    now = [t for layer in made.cache.layers for t in (layer.keys, layer.values)]
    assert all(torch.equal(a, b) for a, b in zip(now, kept, strict=True))
    assert not any(t.requires_grad for t in now)


def test_a_model_without_keys_and_values_reads_the_rows_before_every_window():
    mamba, plain, windows = tiny_mamba(), tiny_llama(), random_windows(2, 9)
    forward = plain.forward
    plain.forward = lambda inputs_embeds, use_cache: forward(inputs_embeds=inputs_embeds, use_cache=use_cache)
    for model in (mamba, plain):
        prompt = rows(model)
        with torch.no_grad():
            made = prefix(model, prompt)
            assert made.cache is None
            assert torch.equal(token_logits(model, windows, made), token_logits(model, windows, prompt))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_it_differs_by_rounding(dtype):
    model, windows = tiny_llama().to(dtype), random_windows(3, 13)
    with torch.no_grad():
        exact = token_logits(tiny_llama(), windows, rows(model))
        ours, expected = (token_logits(model, windows, p).float() for p in (prefix(model, rows(model)), rows(model)))
    # Neither is nearer to fp32 than the format's own rounding allows; 1.5: they round differently, not alike.
    assert (ours - exact).norm() <= 1.5 * (expected - exact).norm()


def test_under_autocast_the_prompts_gradient_comes_back_in_fp32():
    model = tiny_llama().requires_grad_(False)
    prompt = rows(model).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        logits = token_logits(model, random_windows(3, 13), prefix(model, prompt))
    (gradient,) = torch.autograd.grad(logits.float().logsumexp(-1).sum(), prompt)
    assert gradient.dtype == torch.float32
    assert gradient.norm() > 0
