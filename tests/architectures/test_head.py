"""Logits made a chunk at a time, where the head is all that stands between a model's body and its logits."""

import pytest
import torch
from support.tiny import PLAIN, random_windows, tiny_llama
from transformers import Gemma2Config, Gemma2ForCausalLM

from ctp.architectures.head import head_of
from ctp.evaluation.perplexity import perplexity
from ctp.prompts import attach
from ctp.prompts.attached import attach_prompt


def tiny_gemma():
    """Its logits are capped behind the head; a window of 5 positions in every other layer."""
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=61, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, head_dim=8,
        num_key_value_heads=2, sliding_window=5, final_logit_softcapping=2.0,
    )  # fmt: skip
    return Gemma2ForCausalLM(config).eval()


@pytest.mark.parametrize("name", PLAIN)
def test_a_chunk_of_logits_at_a_time_gives_the_same_sum(name, monkeypatch):
    model, windows = PLAIN[name](), random_windows(3, 13)
    with torch.no_grad():
        expected = attach.summed_nll(attach.scored_logits(model, windows), windows).item()
        head, sizes = head_of(model), []
        head.register_forward_hook(lambda module, given, made: sizes.append(made.shape))
        monkeypatch.setattr(attach, "CHUNK", 61 * 10)
        # Rows of a matrix product may be summed in another order when there are fewer of them.
        assert attach.scored_nll(model, windows).item() == pytest.approx(expected, rel=1e-6)
    assert sizes == [(10, 61)] * 3 + [(6, 61)]


def test_logits_that_are_capped_are_the_models_own():
    model, windows = tiny_gemma(), random_windows(3, 13)
    assert head_of(model) is None
    prompt = torch.randn(7, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = attach.summed_nll(attach.scored_logits(model, windows, prompt), windows).item()
    assert perplexity(model, windows, prompt).nll_sum == pytest.approx(expected, rel=1e-6)


def test_a_model_called_in_another_way_is_not_taken_apart():
    """What was found of the plain model must not bypass a prompt that is attached, or a hook."""
    model, windows = tiny_llama(), random_windows(3, 13)
    prompt = torch.randn(4, 32, generator=torch.Generator().manual_seed(1))
    plain, behind = perplexity(model, windows), perplexity(model, windows, prompt)
    attached = attach_prompt(model, prompt)
    assert head_of(model) is None
    assert perplexity(model, windows).nll_sum == pytest.approx(behind.nll_sum, rel=1e-6)
    attached.remove()
    assert perplexity(model, windows) == plain
    doubled = model.register_forward_hook(lambda module, given, made: made.logits.mul_(2) and None)
    assert head_of(model) is None
    doubled.remove()
    assert head_of(model) is model.lm_head
