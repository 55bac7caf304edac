"""Models that are put together in a way of their own: read exactly, or refused while planning with the same words."""

import re

import pytest
import torch
from lm_eval.api.instance import Instance
from support.zoo import CLOSE, FRONT, far, hard_prompt, tokenizer, windows
from transformers import AutoConfig, AutoModelForCausalLM

import ctp
from ctp.architectures.names import as_original
from ctp.cells import LoRA
from ctp.evaluation.harness import SoftPromptLM
from ctp.evaluation.perplexity import perplexity
from ctp.learning.lora import learn_lora
from ctp.learning.objective import choose
from ctp.models.config import config_facts
from ctp.prompts.attached import attach_prompt

SIZES = {"vocab_size": 258, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 257,
         "eos_token_id": 256, "pad_token_id": 1}  # fmt: skip
HALF = {"d_model": 32, "decoder_layers": 2, "decoder_ffn_dim": 64, "decoder_attention_heads": 4, "num_hidden_layers": 1}
LINEAR = {"layer_types": ["linear_attention"] * 2, "linear_num_key_heads": 2, "linear_num_value_heads": 2,
          "linear_key_head_dim": 8, "linear_value_head_dim": 8, "head_dim": 8}  # fmt: skip
KINDS = {"bart": HALF, "pegasus": HALF, "roberta": {"is_decoder": True}, "qwen3_5_text": LINEAR,
         "hrm_text": {"head_dim": 8}, "gemma3_text": {"head_dim": 8}}  # fmt: skip

LORA = LoRA(r=2, text={"dataset": "d", "split": "train", "seq_len": 12}, steps=1, batch=2)


def made(kind, **more):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SIZES, **KINDS[kind], **more})
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model


def ids_of(n, s):
    return windows(n, s).clamp(min=3)  # no padding


def behind(model, ids):
    front = torch.tensor(FRONT).expand(len(ids), -1)
    with torch.no_grad():
        return model(input_ids=torch.cat([front, ids], 1), use_cache=False).logits[:, len(FRONT) :]


def summed(scores, ids):
    return -scores.double().log_softmax(-1).gather(2, ids[..., None]).sum().item()


@pytest.mark.parametrize("kind", ["bart", "pegasus", "qwen3_5_text"])
def test_a_prompt_is_read_where_no_cache_can_be_used(kind):
    model, text = made(kind), ids_of(3, 12)
    found = perplexity(model, text, hard_prompt(model), batch=2).nll_sum
    assert found == pytest.approx(summed(behind(model, text[:, :-1]), text[:, 1:]), rel=CLOSE)


@pytest.mark.parametrize("kind", ["bart", "pegasus"])
def test_a_task_reads_the_context_of_an_answer_though_the_type_is_an_encoder_decoder(kind):
    model, words = made(kind), tokenizer()
    lm = SoftPromptLM(model, words, hard_prompt(model))
    ((found, _),) = lm.loglikelihood([Instance("loglikelihood", {}, ("Once upon", " a time"), 0)], disable_tqdm=True)
    ids = torch.tensor([words("Once upon a time")["input_ids"]])
    start = ids.shape[1] - 7
    assert found == pytest.approx(-summed(behind(model, ids[:, :-1])[:, start - 1 :], ids[:, start:]), rel=CLOSE)


def test_positions_that_do_not_begin_at_0_are_the_models_own():
    model, ids = made("roberta"), ids_of(2, 9)
    wanted, mask = behind(model, ids), torch.ones_like(ids)
    handle = attach_prompt(model, hard_prompt(model))
    with torch.no_grad():
        assert far(model(input_ids=ids, attention_mask=mask).logits, wanted) < CLOSE
        cache = model(input_ids=ids[:, :5], attention_mask=mask[:, :5], use_cache=True).past_key_values
        rest = model(input_ids=ids[:, 5:], attention_mask=mask, past_key_values=cache).logits
    handle.remove()
    assert far(rest, wanted[:, 5:]) < CLOSE


def test_padding_inside_a_text_is_refused_where_it_shifts_positions():
    model, ids = made("roberta"), ids_of(2, 9)
    ids[0, 4] = model.config.pad_token_id
    with pytest.raises(ValueError, match="padding token 1, by which model type roberta counts positions"):
        perplexity(model, ids, torch.randn(4, model.get_input_embeddings().embedding_dim))


def test_blocks_that_are_in_no_single_list_are_computed_again_too():
    model, text = made("hrm_text"), ids_of(2, 8)
    prompt, found = torch.nn.Parameter(hard_prompt(model)), []
    for recompute in (False, True):
        objective = choose(model, text, prompt, recompute)
        with objective.active():
            found += torch.autograd.grad(objective.nll(text, prompt), [prompt])
    assert far(found[1], found[0]) < CLOSE


def test_planning_says_of_a_decoder_what_its_class_makes_of_it():
    for kind in ("bart", "pegasus"):
        assert "prompt" not in config_facts(AutoConfig.for_model(kind, **{**SIZES, **HALF})).refused


@pytest.mark.parametrize("kind", ["hrm_text", "gemma3_text"])
def test_what_planning_refuses_the_call_refuses_in_the_same_words(kind):
    model = made(kind, **({"use_bidirectional_attention": True} if kind == "gemma3_text" else {}))
    refused, text = config_facts(model.config).refused, ids_of(20, 12)
    calls = {
        "lora": lambda: learn_lora(model, text, text[:2], LORA),
        "prompt": lambda: ctp.learn_prompt(model, tokenizer(), text, k=2, steps=1, batch=2),
    }
    wanted = {"hrm_text": {"lora"}, "gemma3_text": {"lora", "prompt"}}[kind]
    assert wanted == refused.keys() & calls.keys()
    for use in wanted:
        with pytest.raises(ValueError, match=re.escape(refused[use])):
            calls[use]()


def test_planning_refuses_blocks_that_hand_each_other_more_than_hidden_states():
    sizes = {"num_experts": 4, "num_experts_per_tok": 1, "head_dim": 8, "num_key_value_heads": 2, "pad_token_id": None}
    config = AutoConfig.for_model("zaya", **{**SIZES, "num_hidden_layers": 3, **sizes})
    why = config_facts(config).refused["compress"]
    assert "depends on the blocks before it" in why
    model = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(ValueError, match=re.escape(why)):
        ctp.compress(model, tokenizer(), {"method": "gptq", "bits": 4}, ids_of(2, 12))


def test_parts_of_one_tensor_have_memory_of_their_own():
    """A convolution over queries, keys and values that are three in the original checkpoints."""
    layers = {"layer_types": ["linear_attention", "full_attention"], "num_experts": 4, "moe_intermediate_size": 32}
    latent = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
    config = AutoConfig.for_model("bailing_hybrid", **{**SIZES, **layers, **latent, "num_key_value_heads": 4})
    model = AutoModelForCausalLM.from_config(config)
    state = {n: t.clone() for n, t in model.state_dict().items()}
    found = as_original(model, state)
    assert found.keys() != state.keys()
    assert len({t.untyped_storage().data_ptr() for t in found.values()}) == len(found)


def test_a_cache_without_attention_is_refused_for_decoding():
    assert "counts tokens" in config_facts(AutoConfig.for_model("qwen3_5_text", **SIZES, **LINEAR)).refused["generate"]
