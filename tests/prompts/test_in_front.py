"""Rows in front of models of many kinds: each is read as text there would be, or refused."""

import pytest
import torch
import torch.nn.functional as F
from support.tiny import random_windows
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from ctp.architectures import families
from ctp.architectures.context import context_length
from ctp.evaluation.generation import answer_tokens
from ctp.evaluation.perplexity import perplexity
from ctp.learning.objective import choose
from ctp.models.config import config_facts
from ctp.prompts.attach import frozen
from ctp.prompts.attached import attach_prompt
from ctp.prompts.rows import embedding_rows

K, S = 6, 14
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = {**SIZES, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": None}
MAMBA = {"mamba_d_state": 4, "mamba_d_conv": 4, "mamba_expand": 2, "mamba_n_heads": 8, "mamba_d_head": 8,
         "mamba_n_groups": 1, "mamba_chunk_size": 8}  # fmt: skip
GEMMA3 = {**LLAMA, "sliding_window": 5, "query_pre_attn_scalar": 8}
MPT = {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 48, "expansion_ratio": 2}
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
          "image_size": 28, "patch_size": 14}  # fmt: skip
LONGROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4,
            "long_factor": [4.0, 5.0, 6.0, 7.0], "original_max_position_embeddings": 20}  # fmt: skip
KINDS = {
    "gpt_neo": {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]],
                "window_size": 5},
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    "jamba": {**LLAMA, **MAMBA, "mamba_dt_rank": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2,
              "num_experts_per_tok": 1},
    "falcon_h1": {**LLAMA, **MAMBA, "mamba_d_ssm": 64},  # states beside the attention of every layer
    "lfm2": {**LLAMA, "layer_types": ["conv", "full_attention"]},
    "mpt": MPT,
    "deepseek_v2": {**LLAMA, "num_key_value_heads": 4, "head_dim": 4, "q_lora_rank": 8, "kv_lora_rank": 8,
                    "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8, "first_k_dense_replace": 2},
    "phi3": {**LLAMA, "sliding_window": None, "original_max_position_embeddings": 20, "rope_parameters": LONGROPE},
    "gemma3_text": GEMMA3,
    "gemma3": {"text_config": {**GEMMA3, "vocab_size": 61}, "vision_config": VISION, "mm_tokens_per_image": 4,
               "image_token_index": 60, "boi_token_index": 59, "eoi_token_index": 58},
    "ctrl": {"n_embd": 32, "dff": 48, "n_layer": 2, "n_head": 4, "n_positions": 64},  # scales what it is given in place
    "openai-gpt": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
}  # fmt: skip
GEMMA3N = {**GEMMA3, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 61, "laurel_rank": 4,
           "altup_num_inputs": 2, "num_kv_shared_layers": 0, "activation_sparsity_pattern": [0.0, 0.0],
           "layer_types": ["sliding_attention", "full_attention"]}  # fmt: skip
RECURRENT = {**SIZES, "num_key_value_heads": 1, "lru_width": 32, "attention_window_size": 8}


def make(kind, **settings):
    """A random model whose weights are large enough that all it reads counts."""
    torch.manual_seed(0)
    known = {} if "text_config" in settings else {"vocab_size": 61}
    config = AutoConfig.for_model(kind, **known, bos_token_id=1, eos_token_id=None, **settings)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.generation_config = GenerationConfig()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape) * (0.8 / p.shape[-1] ** 0.5 if p.dim() > 1 else 0.05))
    return model


def front(model, k=K):
    """Tokens, and their rows."""
    ids = random_windows(1, k, 50, seed=7)[0]
    return ids, embedding_rows(model, ids.tolist())


def own_loss(model, windows, prompt):
    """The summed loss by plain passes over one window each."""
    total = 0
    for window in windows:
        tokens = model.get_input_embeddings()(window[:-1])
        logits = model(inputs_embeds=torch.cat([prompt, tokens])[None], use_cache=False).logits[0, len(prompt) :]
        total = total + F.cross_entropy(logits, window[1:], reduction="sum")
    return total


@pytest.mark.parametrize("kind", KINDS)
def test_learning_and_perplexity_are_those_of_plain_passes(kind):
    model, windows = make(kind, **KINDS[kind]), random_windows(4, S, 50)
    ids, rows = front(model)
    given = rows.clone()
    with torch.no_grad():
        plain = sum(
            F.cross_entropy(model(input_ids=torch.cat([ids, w[:-1]])[None]).logits[0, K:], w[1:], reduction="sum")
            for w in windows
        )
    assert perplexity(model, windows, rows, batch=3).nll_sum == pytest.approx(plain.item(), rel=1e-5)
    assert torch.equal(rows, given)
    prompt = nn.Parameter(rows)
    with frozen(model):
        (wanted,) = torch.autograd.grad(own_loss(model, windows, prompt), prompt)
        for recompute in (False, True):
            ours = choose(model, windows, prompt, recompute)
            with ours.active():
                (found,) = torch.autograd.grad(ours.nll(windows, prompt), prompt)
            assert (found - wanted).norm() <= 1e-3 * wanted.norm()


def test_padding_is_tried_on_the_model_without_its_prompt():
    chunked = {**LLAMA, "intermediate_size_mlp": 48, "num_local_experts": 2, "attention_chunk_size": 32}
    model, text = make("llama4_text", **chunked), random_windows(1, 5, 50)  # its base model is the model itself
    rows = front(model)[1]
    attached = attach_prompt(model, rows)
    alone = model(input_ids=text).logits
    padded = model(input_ids=F.pad(text, (3, 0), value=2), attention_mask=F.pad(torch.ones_like(text), (3, 0))).logits
    assert torch.allclose(padded[:, 3:], alone, atol=1e-4)
    attached.remove()


def test_a_window_that_sees_the_one_before_is_not_read_in_one_row():
    model, windows = make("falcon_h1", **KINDS["falcon_h1"]), random_windows(1, S, 50)
    with frozen(model):
        assert not choose(model, windows, front(model)[1]).packed


@pytest.mark.parametrize("cached", [True, False])
def test_generation_goes_on_where_the_angles_change(cached):
    model, text = make("phi3", **KINDS["phi3"]), random_windows(1, 9, 50)
    ids, rows = front(model)
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "use_cache": cached}
    whole = torch.cat([ids[None], text], dim=1)
    wanted = model.generate(whole, attention_mask=torch.ones_like(whole), **settings)[0, K + 9 :]
    attach_prompt(model, rows)
    assert torch.equal(model.generate(text, attention_mask=torch.ones_like(text), **settings)[0, 9:], wanted)


@pytest.mark.parametrize(
    ("kind", "settings", "use", "message"),
    [
        ("gemma3n_text", GEMMA3N, "prompt", "hidden_size_per_layer_input: every layer reads embeddings of the token"),
        ("bert", SIZES, "prompt", "no decoder that reads text from left to right"),
        ("recurrent_gemma", RECURRENT, "generate", "its decoding state lies outside the cache"),
        ("mamba", KINDS["mamba"], "generate", "its forward lacks past_key_values"),
    ],
)
def test_what_cannot_stand_behind_rows_is_refused_before_anything_runs(kind, settings, use, message):
    model = make(kind, **settings)
    assert message in families.refusals(AutoConfig.for_model(kind, **settings))[use]
    rows = front(model)[1]
    with pytest.raises(ValueError, match=message):
        attach_prompt(model, rows)
    if use == "prompt":
        with pytest.raises(ValueError, match=message):
            perplexity(model, random_windows(2, S, 50), rows)


def test_a_model_that_looks_at_token_ids_is_found_by_trying():
    model = make("gpt2", n_embd=32, n_layer=2, n_head=4, n_positions=64)
    own = model.transformer.forward
    model.transformer.forward = lambda input_ids=None, **other: own(
        inputs_embeds=model.transformer.wte(input_ids) * 2 if input_ids is not None else other.pop("inputs_embeds"),
        **other,
    )
    with pytest.raises(ValueError, match="makes more of token ids than their embeddings"):
        perplexity(model, random_windows(2, S, 50), front(model)[1])


class Tokenizer:
    """A token a letter."""

    eos_token_id = None

    def __call__(self, text, **_):
        return {"input_ids": [ord(c) - ord("a") for c in text]}


def test_positions_that_count_padding_are_not_generated_from_in_padded_batches():
    sizes = {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48}
    model = make("bart", **sizes, max_position_embeddings=64, pad_token_id=2)
    ids, rows = front(model)
    questions = ["bcdefgh", "kl"]
    whole = torch.cat([ids, torch.tensor(Tokenizer()(questions[1])["input_ids"])])[None]
    alone = model.generate(whole, attention_mask=torch.ones_like(whole), max_new_tokens=5, do_sample=False)
    wanted = alone[0, K + 2 :].tolist()
    assert answer_tokens(model, Tokenizer(), questions, rows, new_tokens=5, batch=2)[1] == wanted
    attach_prompt(model, rows)
    padded, mask = torch.tensor([[3, 4, 5], [2, 3, 4]]), torch.tensor([[1, 1, 1], [0, 1, 1]])
    with pytest.raises(ValueError, match="give it rows of one length"):
        model(input_ids=padded, attention_mask=mask)


@pytest.mark.parametrize(
    ("kind", "settings", "context"),
    [
        ("mpt", {"max_seq_len": 48}, 48),
        ("gpt2", {"n_positions": 32}, 32),
        ("dbrx", {"max_seq_len": 16}, 16),
        ("bloom", {"seq_length": 48}, None),  # in its files; its model does not read it
        ("falcon", {"alibi": True}, None),
        ("mamba", {}, None),
        ("xlnet", {}, None),
        ("llama", {"max_position_embeddings": 24}, 24),
        ("gemma3", {"text_config": {"max_position_embeddings": 40}}, 40),
    ],
)
def test_the_longest_input_is_known_by_its_many_names(kind, settings, context):
    assert context_length(AutoConfig.for_model(kind, **settings)) == context


def test_blocks_of_any_name_are_planned_with():
    facts = config_facts(AutoConfig.for_model("mpt", vocab_size=61, **MPT))
    assert (facts.context, facts.layers, facts.in_features) == (48, 2, (32, 128))
    assert list(facts.refused) == ["lora"]
    assert "block 0 has no such projections" in facts.refused["lora"]
    assert not config_facts(AutoConfig.for_model("llama", vocab_size=61, **LLAMA)).refused
