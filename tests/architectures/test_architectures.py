"""Models whose blocks differ, share weights or lie in other models: compressed as they run, or refused untouched."""

import copy

import peft
import pytest
import torch
from support.tiny import random_windows, tiny_llama
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import ctp
from ctp.architectures.blocks import decoder_blocks
from ctp.architectures.calls import Batch, Call
from ctp.architectures.chain import capture
from ctp.cells import GPTQ
from ctp.compression.calibration import shared_inputs
from ctp.compression.walk import compress_model, hessians
from ctp.formats.checkpoint import open_checkpoint
from ctp.models.config import config_facts
from ctp.models.tiny import byte_tokenizer

COMMON = {
    "vocab_size": 258, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "eos_token_id": 1, "bos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip
SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
WINDOWS = random_windows(5, 24, 258)
SPEC = {"method": "gptq", "bits": 4}

MODELS = {
    "gemma3_text": SLIDING,
    "qwen2": SLIDING | {"use_sliding_window": True},
    "gemma3n_text": {
        "num_hidden_layers": 4, "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 8, "laurel_rank": 4,
        "vocab_size_per_layer_input": 258, "altup_num_inputs": 2, "activation_sparsity_pattern": [0.0] * 4,
        "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "gpt2": {"head_dim": None, "num_key_value_heads": None},
    "mpt": {"max_seq_len": 64, "expansion_ratio": 2, "head_dim": None},
    "mamba": {"state_size": 8},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_d_state": 8, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1,
                  "mamba_chunk_size": 8},
}  # fmt: skip


def config_of(kind, **settings):
    known = type(AutoConfig.for_model(kind))
    fields = known.__init__.__annotations__ | getattr(known, "__annotations__", {}) | known.attribute_map
    common = {n: v for n, v in COMMON.items() if n in fields}
    return known(**{n: v for n, v in (common | settings).items() if v is not None})


def model_of(kind, **settings):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(kind, **settings), dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05 if parameter.ndim < 2 else 0.2)
    return model


def logits(model):
    with torch.no_grad():
        return model(input_ids=WINDOWS, use_cache=False).logits


def inputs_of(model, run):
    """What every block is handed last while `run()` runs, of those that are handed all windows."""
    seen, handles = {}, []

    def keep(i):
        def hook(_, args, kwargs):
            hidden = args[0] if args else kwargs["hidden_states"]
            if WINDOWS.shape in (hidden.shape[:2], hidden.shape[1:3]):
                seen[i] = hidden.clone()

        return hook

    for i, block in enumerate(decoder_blocks(model)[1]):
        handles.append(block.register_forward_pre_hook(keep(i), with_kwargs=True))
    run()
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("kind", MODELS)
def test_every_block_reads_what_it_reads_in_the_model_and_the_artifact_is_the_model(kind, tmp_path):
    model = model_of(kind, **MODELS[kind])
    assert "compress" not in config_facts(model.config).refused
    made = []
    walked = inputs_of(model, lambda: made.append(ctp.compress(model, byte_tokenizer(), SPEC, WINDOWS)))
    own = inputs_of(model, lambda: logits(model))
    assert walked.keys() == own.keys() == set(range(model.config.num_hidden_layers))
    for i, hidden in own.items():
        torch.testing.assert_close(walked[i], hidden, rtol=1e-5, atol=1e-5)
    wanted = logits(model)
    made[0].save(tmp_path)
    assert torch.equal(logits(ctp.load(tmp_path)[0]), wanted)
    torch.testing.assert_close(logits(made[0].model(packed=True)), wanted, rtol=1e-5, atol=1e-5)


def test_equal_arguments_are_kept_once():
    model = model_of("gemma3_text", **SLIDING)
    blocks = list(decoder_blocks(model)[1])
    one, two = capture(model, WINDOWS[:4], 2)
    sliding, full, last = (one.calls[b].kwargs["attention_mask"] for b in blocks)
    assert sliding is last is two.calls[blocks[2]].kwargs["attention_mask"]
    assert full is two.calls[blocks[1]].kwargs["attention_mask"]
    assert full is None or not torch.equal(sliding, full)


def test_the_linears_of_gpt2_are_exported_as_their_readers_expect(tmp_path):
    model = model_of("gpt2", **MODELS["gpt2"])
    small = ctp.compress(model, byte_tokenizer(), SPEC | {"sym": True}, WINDOWS)
    assert small.stats()["weights"] == sum(m.weight.numel() for m in model.modules() if type(m).__name__ == "Conv1D")
    ctp.export(small, tmp_path / "hf", "hf")
    assert torch.equal(logits(ctp.load(tmp_path / "hf")[0]), logits(model))
    for format in ("gptq", "compressed-tensors"):  # transformers cannot open them
        message = rf"{format}: model type gpt2: transformer\.h\.0\.attn\.c_attn is no nn\.Linear"
        with pytest.raises(ValueError, match=message):
            ctp.export(small, tmp_path / "other", format)
    pruned = ctp.compress(model, byte_tokenizer(), {"method": "sparsegpt", "sparsity": 0.5}, WINDOWS)
    ctp.export(pruned, tmp_path / "pruned", "hf")
    again = open_checkpoint(tmp_path / "pruned")
    assert again.stats()["sparsity"] == 0.5
    assert torch.equal(logits(again.model()), logits(model))


def test_a_model_inside_another_is_found_beside_a_tower_as_deep():
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    settings = {"text_config": COMMON | SLIDING, "vision_config": vision | {"image_size": 28, "patch_size": 14}}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gemma3", **settings, mm_tokens_per_image=1)).eval()
    assert decoder_blocks(model)[0] == "model.language_model.layers"
    before = copy.deepcopy(model.model.vision_tower.state_dict())
    small = ctp.compress(model, byte_tokenizer(), SPEC, WINDOWS)
    assert all(torch.equal(before[n], t) for n, t in model.model.vision_tower.state_dict().items())
    assert torch.equal(logits(small.model()), logits(model))


REFUSED = {
    "rwkv": ({"attention_hidden_size": 32, "rescale_every": 2}, "it changes what block 1 gives"),
    "bart": ({"d_model": 32, "decoder_ffn_dim": 64, "decoder_layers": 2, "decoder_attention_heads": 4},
             r"does not run these linears on text, .*encoder_attn"),
    "zamba2": ({"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2, "num_mem_blocks": 1,
                "num_key_value_heads": 4, "mamba_d_state": 8, "n_mamba_heads": 4, "mamba_ngroups": 1, "chunk_size": 8,
                "adapter_rank": 4}, "are one weight"),
    "xlnet": ({"n_layer": 2, "d_model": 32, "n_head": 4, "d_inner": 64}, r"rel_attn\.q is not the weight of a linear"),
    "xlm": ({"emb_dim": 32, "n_layers": 2, "n_heads": 4}, "no single list of decoder blocks"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_chain_of_own_linears_is_refused_alike_when_planned_and_when_run(kind):
    settings, reason = REFUSED[kind]
    config = config_of(kind, **settings)
    why = config_facts(config).refused["compress"]
    assert why.startswith(f"model type {kind}: ")
    check_refused(AutoModelForCausalLM.from_config(config).eval(), reason, why)


def check_refused(model, reason, why=""):
    before = {n: t.clone() for n, t in model.state_dict().items() if not t.is_meta}
    with pytest.raises(ValueError, match=reason) as e:
        ctp.compress(model, byte_tokenizer(), SPEC, WINDOWS)
    assert why in str(e.value)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items() if n in before)


def test_what_could_not_be_opened_again_is_refused_untouched():
    model = tiny_llama(258)
    check_refused(AutoModel.from_config(model.config), "LlamaModel is no causal language model with its head")
    lora = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    check_refused(peft.get_peft_model(tiny_llama(258), lora).get_base_model(), "has adapter layers inside")
    check_refused(tiny_llama(258).to("meta"), "weights on the meta device")
    model.model.layers[0].extra = nn.Linear(4, 4)
    check_refused(model, r"other weights than its configuration describes: model\.layers\.0\.extra\.bias")
    model = tiny_llama(258)
    model.config.quantization_config = {"quant_method": "gptq", "bits": 4}
    check_refused(model, "is quantized already")


class Twice(nn.Module):
    """Runs one linear on two inputs, another on the first of them."""

    def __init__(self):
        super().__init__()
        self.again, self.once = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, hidden):
        return self.again(self.again(hidden)) + self.once(hidden)


def test_a_linear_that_runs_twice_is_calibrated_on_both_inputs():
    torch.manual_seed(0)
    block = Twice()
    batches = [Batch(x, {block: Call()}) for x in torch.randn(4, 3, 6).split(2)]
    with torch.no_grad():
        groups = shared_inputs(block, batches[0])
        assert groups == [["again"], ["once"]]
        sums, _ = hessians(block, batches, groups)
        x = torch.cat([b.hidden for b in batches]).flatten(0, 1)
        both = torch.cat([x, block.again(x)])
    torch.testing.assert_close(sums[0], both.T @ both / 24)
    torch.testing.assert_close(sums[1], x.T @ x / 12)


@pytest.mark.parametrize("fault", ["counts", "overwrites", "between", "remembers"])
def test_blocks_that_rely_on_more_than_their_inputs_are_refused_untouched(fault):
    model = tiny_llama(258)
    first, second = model.model.layers
    forward, left = second.forward, []

    def changed(hidden, **kwargs):
        if fault == "counts":  # in an argument, as a cache that grows each time
            kwargs["past_key_values"].append(1)
            hidden = hidden * len(kwargs.pop("past_key_values"))
        elif fault == "overwrites":
            hidden.mul_(2)
        elif fault == "remembers" and hidden.shape[1] > 16:  # only a whole window shows it
            hidden = hidden + left[-1]
        return forward(hidden, **kwargs)

    def with_list(_, args, kwargs):
        return args, kwargs | {"past_key_values": left[-1]}

    second.forward = changed
    if fault == "counts":
        model.model.register_forward_pre_hook(lambda *_: left.append([]))
        second.register_forward_pre_hook(with_list, with_kwargs=True, prepend=True)
    elif fault == "between":
        second.register_forward_pre_hook(lambda _, args: (args[0] * 2, *args[1:]), prepend=True)
    elif fault == "remembers":
        first.register_forward_hook(lambda *_: left.append(len(left)))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"no chain of blocks that can be compressed one by one: .*block [01]"):
        compress_model(model, WINDOWS, GPTQ(bits=4))
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
