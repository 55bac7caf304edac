"""Mixtures of experts: every expert is solved by itself, on the tokens routed to it, and stored by its name."""

import copy
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.tiny import random_windows, tiny_llama, tiny_moe
from support.tinygrid import VOCAB, byte_tokenizer
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import ctp
from ctp.architectures.blocks import decoder_blocks
from ctp.architectures.chain import capture
from ctp.architectures.experts import experts_in, matrices, split
from ctp.cells import GPTQ, SparseGPT
from ctp.compression.calibration import shared_inputs
from ctp.compression.routing import filled_up, pieces, stages
from ctp.compression.walk import compress_model, hessians
from ctp.formats.artifact import Compressed, Routing
from ctp.formats.checkpoint import open_checkpoint
from ctp.formats.export import export
from ctp.models.config import config_facts

NAMES = {  # what the first expert's matrices are called, gate, up, down, in the last block
    "mixtral": [f"model.layers.1.block_sparse_moe.experts.0.{n}" for n in ("w1", "w3", "w2")],
    "qwen3_moe": [f"model.layers.1.mlp.experts.0.{n}" for n in ("gate_proj", "up_proj", "down_proj")],
    "gpt_oss": [f"model.layers.1.mlp.experts.0.{n}" for n in ("gate_proj", "up_proj", "down_proj")],
    "deepseek_v3": [f"model.layers.1.mlp.experts.0.{n}" for n in ("gate_proj", "up_proj", "down_proj")],
}


@pytest.fixture(params=NAMES)
def model(request):
    return tiny_moe(request.param)


def seen(model: nn.Module, windows: torch.Tensor, layer: str) -> tuple[torch.Tensor, torch.Tensor]:
    """What reaches a block's experts: hidden states (tokens, width), and the experts of each token."""
    found: list[tuple[torch.Tensor, ...]] = []
    handle = model.get_submodule(layer).register_forward_pre_hook(lambda _, args: found.append(args))
    with torch.no_grad():
        model(input_ids=windows)
    handle.remove()
    return found[0][0], found[0][1]


def by_hand(model: nn.Module, layer: str, expert: int, x: torch.Tensor) -> torch.Tensor:
    """What an expert makes of x before down_proj, as its architecture's paper says."""
    m = model.get_submodule(layer)
    if model.config.model_type == "gpt_oss":
        both = x @ m.gate_up_proj[expert] + m.gate_up_proj_bias[expert]
        gate, up = both[:, ::2].clamp(max=7.0), both[:, 1::2].clamp(-7.0, 7.0)
        return (up + 1) * gate * torch.sigmoid(1.702 * gate)
    gate, up = (x @ m.gate_up_proj[expert].T).chunk(2, dim=1)
    return nn.functional.silu(gate) * up


def gram(x: torch.Tensor) -> torch.Tensor:
    return x.T @ x / max(1, len(x))


def measured(model: nn.Module, windows: torch.Tensor, layer: str) -> tuple[dict[str, torch.Tensor], Routing]:
    """Hessians of the first mixture's linears, by name inside the experts."""
    prefix, blocks = decoder_blocks(model)
    at = int(layer.removeprefix(f"{prefix}.").partition(".")[0])
    with torch.no_grad():
        batches = capture(model, windows, 2)
        for block in blocks[:at]:
            for b in batches:
                b.hidden = b.run(block)
        with split(blocks[at]):
            groups = shared_inputs(blocks[at], batches[0])
            routing = Routing()
            sums = filled_up(blocks[at], groups, partial(hessians, blocks[at], batches), f"{prefix}.{at}", routing)
    inside = layer.removeprefix(f"{prefix}.{at}.") + "."
    return {
        n.removeprefix(inside): h for g, h in zip(groups, sums, strict=True) for n in g if n.startswith(inside)
    }, routing


def check_hessians(model: nn.Module, windows: torch.Tensor) -> Routing:
    """Every expert's Hessians are those of the tokens routed to it, and of all tokens for as many as it lacks."""
    layer = experts_in(model)[0][0]
    got, routing = measured(model, windows, layer)
    hidden, index = seen(model, windows, layer)
    for expert in range(4):
        x = hidden[(index == expert).any(-1)]
        assert routing.tokens[f"{layer}.{expert}"] == len(x)
        inner, everything = by_hand(model, layer, expert, x), by_hand(model, layer, expert, hidden)
        for name, own, whole in (("gate_proj", x, hidden), ("up_proj", x, hidden), ("down_proj", inner, everything)):
            n, m = min(len(own), own.shape[1]), own.shape[1]
            expected = (n * gram(own) + (m - n) * gram(whole)) / m
            torch.testing.assert_close(got[f"{expert}.{name}"], expected, rtol=1e-3, atol=1e-4)
    return routing


def test_an_experts_hessian_is_that_of_the_tokens_routed_to_it(model):
    routing = check_hessians(model, random_windows(16, 32))
    assert len(routing.short) <= 2  # most have more tokens than inputs


def test_experts_with_few_tokens_are_filled_up_and_told(model):
    windows = random_windows(1, 24)
    routing = check_hessians(model, windows)
    assert routing.short == routing.tokens  # none has as many as it has inputs
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        small = ctp.compress(model, byte_tokenizer(), {"method": "gptq", "bits": 4}, windows)
    every = 4 * len(experts_in(model))
    (line,) = [str(w.message) for w in told if "experts" in str(w.message)]
    assert line.startswith(f"{every} of {every} experts were routed fewer calibration tokens")
    assert small.stats()["experts_short_of_tokens"] == every == len(small.routing.short)
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize("spec", [GPTQ(bits=4, true_sequential=True), SparseGPT(sparsity=0.5, bits=3)])
def test_only_experts_and_linears_change_and_come_back(model, spec, tmp_path):
    before = copy.deepcopy(model.state_dict())
    facts = config_facts(model.config)
    assert "compress" not in facts.refused
    layers = compress_model(model, random_windows(8, 32), spec)
    assert set(NAMES[model.config.model_type]) <= layers.keys()
    assert sum(layer.shape[0] * layer.shape[1] for layer in layers.values()) == facts.linear_parameters
    assert {layer.shape[1] for layer in layers.values()} == set(facts.in_features)
    held = {m.name: m.parameter for m in matrices(model).values()}
    changed = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    assert changed == {held.get(n, f"{n}.weight") for n in layers}
    assert not any("gate.weight" in n or "router" in n for n in changed)
    Compressed.of(model, layers, byte_tokenizer()).save(tmp_path / "small")
    opened = Compressed.open(tmp_path / "small").model()
    ours, theirs = model.state_dict(), opened.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[n], theirs[n]) for n in ours)
    windows = random_windows(2, 16)
    with torch.no_grad():
        assert torch.equal(model(input_ids=windows).logits, opened(input_ids=windows).logits)


def test_an_experts_matrix_is_solved_as_a_linear_would_be():
    """All experts alike and every token routed to all: each is what the dense model's MLP becomes."""
    dense, model = tiny_llama(), tiny_moe("mixtral", num_experts_per_tok=4)
    state = dense.state_dict()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name in state:
                p.copy_(state[name])
        for layer, m, _ in experts_in(model):
            mlp = dense.get_submodule(layer.removesuffix(".experts"))
            m.gate_up_proj.copy_(torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]).expand_as(m.gate_up_proj))
            m.down_proj.copy_(mlp.down_proj.weight.expand_as(m.down_proj))
    windows = random_windows(12, 32)
    ours, theirs = (compress_model(m, windows, GPTQ(bits=8)) for m in (model, dense))
    for i, own in enumerate(NAMES["mixtral"]):
        linear = theirs[f"model.layers.1.mlp.{('gate_proj', 'up_proj', 'down_proj')[i]}"]
        for expert in range(4):
            found = ours[own.replace("experts.0", f"experts.{expert}")].dense(torch.float32)
            torch.testing.assert_close(found, linear.dense(torch.float32), rtol=0.0, atol=0.02)


def test_experts_in_two_dimensions(tmp_path):
    """DBRX: no marks, the experts' matrices one after the other, down_proj transposed."""
    size = {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64, "vocab_size": 61}
    inside = {"hidden_size": 32, "ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2}
    config = AutoConfig.for_model(
        "dbrx", **size, ffn_config=inside, attn_config={"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4}
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape), alpha=0.1)
    before, windows, facts = copy.deepcopy(model.state_dict()), random_windows(8, 32), config_facts(config)
    layers = compress_model(model, windows, GPTQ(bits=8))
    assert sum(layer.shape[0] * layer.shape[1] for layer in layers.values()) == facts.linear_parameters
    name = "transformer.blocks.1.ffn.experts"
    down = before[f"{name}.mlp.w2"].view(4, 48, 32)[3].T
    torch.testing.assert_close(layers[f"{name}.3.down_proj"].dense(torch.float32), down, rtol=0.0, atol=0.02)
    small = Compressed.of(model, layers, byte_tokenizer())
    with torch.no_grad():
        for opened in (small.model(), small.model(packed=True)):
            assert torch.equal(opened(input_ids=windows).logits, model(input_ids=windows).logits)


def test_experts_are_compressed_side_by_side_and_in_little_memory(monkeypatch):
    model, windows = tiny_moe("qwen3_moe"), random_windows(8, 32)
    other = copy.deepcopy(model)
    block = decoder_blocks(model)[1][0]
    with torch.no_grad(), split(block):
        groups = shared_inputs(block, capture(model, windows, 2)[0])
        assert len(stages(block, groups)) == 4  # q/k/v, output, what comes first in all experts, what comes last
        assert len(pieces(block, groups)) == 1
        monkeypatch.setattr("ctp.compression.routing.HESSIAN_BYTES", 1)
        assert pieces(block, groups) == [[g] for g in reversed(groups)]
    in_parts = compress_model(model, windows, GPTQ(bits=4))
    monkeypatch.undo()
    at_once = compress_model(other, windows, GPTQ(bits=4))
    assert in_parts.keys() == at_once.keys()
    for name, layer in in_parts.items():
        assert torch.equal(layer.dense(torch.float32), at_once[name].dense(torch.float32)), name


def test_experts_that_do_more_than_they_say_are_refused():
    model = tiny_moe("mixtral")
    layer = model.get_submodule("model.layers.1.mlp.experts")
    own = layer.forward
    layer.forward = lambda hidden, index, weight: own(hidden, index, weight) * 2
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        ValueError, match=r"model type mixtral: .* the experts of model\.layers\.1, run one by one, differ"
    ):
        compress_model(model, random_windows(2, 16), GPTQ(bits=4))
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


# --------------------------------------------------------------------------- files


def names_in(folder: Path) -> set[str]:
    return set(load_file(folder / "model.safetensors"))


@pytest.mark.parametrize("format", ["hf", "compressed-tensors", "gptq"])
def test_exports_have_the_names_of_original_checkpoints(format, tmp_path):
    model, windows = tiny_moe("mixtral", vocab=VOCAB, hidden=64), random_windows(2, 24, VOCAB)
    layers = compress_model(model, windows, GPTQ(bits=4, group_size=16, sym=True))
    notes = export(Compressed.of(model, layers, byte_tokenizer()), tmp_path / "out", format)
    names, at = names_in(tmp_path / "out"), "model.layers.1.block_sparse_moe"
    part = {"hf": "weight", "compressed-tensors": "weight_packed", "gptq": "qweight"}[format]
    assert {f"{at}.experts.{e}.{w}.{part}" for e in range(4) for w in ("w1", "w2", "w3")} <= names
    assert f"{at}.gate.weight" in names
    assert not [n for n in names if ".mlp." in n]
    with torch.no_grad():
        expected = model(input_ids=windows).logits
        assert torch.equal(ctp.load(tmp_path / "out", device="cpu")[0](input_ids=windows).logits, expected)
        if format == "gptq":
            assert "transformers opens no experts" in " ".join(notes)
        else:
            theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
            assert torch.equal(theirs(input_ids=windows).logits, expected)


def test_a_format_that_cannot_hold_the_experts_is_refused(tmp_path):
    model = tiny_moe("mixtral", hidden=64)
    uneven = Compressed.of(model, compress_model(model, random_windows(2, 24), GPTQ(bits=4)), byte_tokenizer())
    for format in ("gptq", "compressed-tensors"):
        with pytest.raises(ValueError, match=f"{format}: loaders read experts on symmetric grids only"):
            export(uneven, tmp_path / "out", format)
    model = tiny_moe("gpt_oss", hidden=64)
    fused = Compressed.of(model, compress_model(model, random_windows(2, 24), GPTQ(bits=4, sym=True)), byte_tokenizer())
    with pytest.raises(ValueError, match="model type gpt_oss: its checkpoints hold no linear for each expert"):
        export(fused, tmp_path / "out", "gptq")


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_pruned_experts_are_found_in_a_folder(kind, tmp_path):
    """Whatever form it holds them in: one linear each, or all in one."""
    model, windows = tiny_moe(kind, vocab=VOCAB, hidden=64), random_windows(2, 24, VOCAB)
    layers = compress_model(model, windows, SparseGPT(sparsity=0.5))
    export(Compressed.of(model, layers, byte_tokenizer()), tmp_path / "out", "hf")
    opened = open_checkpoint(tmp_path / "out")
    assert {n for n, _ in opened.layers()} == layers.keys()
    with torch.no_grad():
        assert torch.equal(opened.model()(input_ids=windows).logits, model(input_ids=windows).logits)


# ------------------------------------------------------------------------ learning


@pytest.mark.parametrize(("kind", "precision"), [("mixtral", "fp32"), ("gpt_oss", "bf16"), ("deepseek_v3", "bf16")])
def test_a_prompt_is_learned_through_packed_experts_as_through_ordinary_ones(kind, precision):
    model, windows = tiny_moe(kind), random_windows(6, 16)
    layers = compress_model(model, windows, GPTQ(bits=4))
    small = Compressed.of(model, layers, byte_tokenizer())
    ordinary, packed = small.model(), small.model(packed=True)
    assert not any(p.ndim == 3 for p in packed.parameters())
    with torch.no_grad():
        assert torch.equal(packed(input_ids=windows).logits, ordinary(input_ids=windows).logits)
    found = [
        ctp.learn_prompt(m, byte_tokenizer(), windows, validation=windows[:2], k=3, steps=3, precision=precision,
                         device="cpu")
        for m in (packed, ordinary)
    ]  # fmt: skip
    assert torch.equal(found[0].embeddings, found[1].embeddings)
    assert found[0].history[-1]["val_loss"] != found[0].history[0]["val_loss"]
