"""Learning LoRA: what it trains and how much of it, the saved adapter, resume to the byte, the model left alone."""

import json
import math
import re

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from support.bench import Bench
from support.tiny import random_windows, tiny_bloom, tiny_llama, tiny_opt
from support.tinygrid import model_folder
from support.trained import pruned, windows
from transformers import (
    BloomConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    Phi3Config,
)

from ctp.cells import LoRA
from ctp.cells.cell import Evaluate, Learn
from ctp.cells.runtime import Runtime
from ctp.evaluation.perplexity import perplexity
from ctp.execution import loading
from ctp.learning.checkpoint import TrainState
from ctp.learning.lora import SplitProjection, injected, learn_lora
from ctp.learning.steps import batch_rows
from ctp.models.adapters import ADAPTER, adapter_facts, parameters
from ctp.models.config import config_facts
from ctp.models.hf import skeleton
from ctp.prompts.adapter import applied
from ctp.prompts.attach import scored_logits
from ctp.prompts.files import LearnedPrompt
from ctp.storage.ref import ref

S = 12
CPU = Runtime(device="cpu", checkpoint_seconds=0.0)
MODELS = {"llama": tiny_llama, "opt": tiny_opt, "bloom": tiny_bloom}
LLAMA_13B = {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40}
LLAMA_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
BLOOM_7B = {"hidden_size": 4096, "n_layer": 30, "n_head": 32, "vocab_size": 250880}


def spec(**fields):
    text = {"dataset": "d", "split": "train", "seq_len": S}
    return LoRA(**{"r": 3, "alpha": 6, "text": text, "steps": 6, "validate_every": 2, "lr": 0.02, **fields})


def run(model, train=None, validation=None, **fields):
    options = {n: fields.pop(n) for n in ("resume", "checkpoint", "report") if n in fields}
    train = random_windows(10, S, seed=1) if train is None else train
    validation = random_windows(5, S, seed=2) if validation is None else validation
    return learn_lora(model, train, validation, spec(**fields), runtime=CPU, **options)


@pytest.fixture(params=MODELS)
def make(request):
    return MODELS[request.param]


# -------------------------------------------------------------------- what is trained


@pytest.mark.parametrize(
    ("config", "fields", "lora", "prompt"),
    [
        (LlamaConfig(**LLAMA_13B, vocab_size=32000), {"r": 32}, 26_214_400, 512_000),
        (BloomConfig(**BLOOM_7B), {"r": 32}, 15_728_640, 409_600),
        (LlamaConfig(**LLAMA_7B, vocab_size=32000), {"r": 1, "layers": 25}, 409_600, 409_600),
    ],
    ids=["llama-2-13b", "bloom-7b1", "llama-7b, as many as a prompt"],
)
def test_as_many_parameters_as_the_paper_counts(config, fields, lora, prompt):
    model = skeleton(config)
    with injected(model, spec(**fields)) as made:
        assert sum(p.numel() for p in made.parameters.values()) == lora
        assert {p.requires_grad for p in made.parameters.values()} == {True}
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == lora
    rows = torch.empty(100, model.get_input_embeddings().embedding_dim, device="meta")
    assert LearnedPrompt(rows, best_step=0, best_val_loss=0.0, history=[], seconds=0.0).trainable_parameters == prompt


def test_a_split_projection_is_the_fused_one():
    fused, x = tiny_bloom().transformer.h[0].self_attention.query_key_value, torch.randn(2, 5, 32)
    split = SplitProjection(fused, heads=4)
    # Each output is the same dot product; only the order in which a matrix product adds it up may differ.
    assert torch.allclose(split(x), fused(x), rtol=0, atol=1e-5)
    width = split.q_proj.weight
    for head in range(4):  # rows of a head: its queries, its keys, its values, 8 each
        rows = fused.weight[24 * head : 24 * head + 24]
        assert torch.equal(width[8 * head : 8 * head + 8], rows[:8])
        assert torch.equal(split.v_proj.weight[8 * head : 8 * head + 8], rows[16:])


def test_it_starts_as_the_compressed_model(make):
    model, windows = make(), random_windows(3, S)
    plain = scored_logits(model, windows)
    with injected(model, spec()) as made:
        assert not any(m.training for m in model.modules())
        if make is tiny_bloom:  # three products in place of one: rounding
            assert torch.allclose(scored_logits(model, windows), plain, atol=1e-5)
        else:
            assert torch.equal(scored_logits(model, windows), plain)
        assert all(p.abs().max() > 0 for n, p in made.parameters.items() if n.endswith("lora_A"))
        first = {n: p.detach().clone() for n, p in made.parameters.items()}
    torch.manual_seed(123)  # the process's random numbers do not matter
    for seed, same in ((0, True), (1, False)):
        with injected(make(), spec(seed=seed)) as made:
            assert all(torch.equal(p, first[n]) for n, p in made.parameters.items()) == same
    bound = 1 / math.sqrt(32)  # PEFT's: Kaiming's uniform with a = sqrt 5, 1 / sqrt(in)
    largest = max(p.abs().max().item() for p in first.values())
    assert 0.9 * bound < largest <= bound


def test_layers_are_the_last_blocks(make, tmp_path):
    with injected(make(layers=3), spec(layers=2)) as made:
        assert {part for n in made.parameters for part in n.split(".") if part.isdigit()} == {"1", "2"}
    learned = run(make(layers=3), layers=1)
    learned.save(tmp_path, "some/model")
    model, windows = make(layers=3), random_windows(2, S)
    plain, seen = scored_logits(model, windows), []
    with applied(model, tmp_path):
        assert not torch.allclose(scored_logits(model, windows), plain, atol=1e-3)
        seen += [n for n, m in model.named_modules() if hasattr(m, "lora_A")]
    assert {n.split("layers.")[-1].split("h.")[-1][0] for n in seen} == {"2"}


@pytest.mark.parametrize(
    "config",
    [
        GPT2Config(n_embd=32, n_layer=2, n_head=2),
        GPTNeoXConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64),
        Phi3Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
                   intermediate_size=64, pad_token_id=0),
    ],
    ids=["gpt2", "gpt-neox", "phi3"],
)  # fmt: skip
def test_projections_that_it_does_not_know_are_refused(config):
    why = config_facts(config).refused["lora"]
    assert "LoRA is learned on q_proj and v_proj, or BLOOM's query_key_value, and block 0 has no such" in why
    with pytest.raises(ValueError, match=re.escape(why)), injected(skeleton(config), spec()):
        pass


def test_more_layers_than_there_are_is_refused(make):
    with pytest.raises(ValueError, match=r"layers = 3: the model has 2 decoder blocks"):
        run(make(), layers=3)


@pytest.mark.parametrize("layers", [None, 1])
def test_a_projection_outside_the_blocks_is_left_alone(layers, tmp_path):
    """As in a tower for images: the adapter's configuration then names projections by a pattern."""
    model = tiny_llama()
    model.model.extra = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(32, 32)})
    found = run(model, layers=layers)
    assert len(found.weights) == 4 * (layers or 2)
    found.save(tmp_path, "base")
    theirs = PeftModel.from_pretrained(model, tmp_path).state_dict()
    assert sum("lora_A" in n for n in theirs) == 2 * (layers or 2)
    assert not any("extra" in n and "lora" in n for n in theirs)


# -------------------------------------------------------------------- the loop


def test_it_equals_a_loop_around_pefts_own_model():
    """Without dropout: PEFT's model and AdamW, full batch, started from the same A."""
    train, validation, one = random_windows(10, S, seed=1), random_windows(5, S, seed=2), spec(dropout=0.0)
    with injected(tiny_llama(), one) as made:
        start = {n: p.detach().clone() for n, p in made.parameters.items()}
    config = LoraConfig(task_type="CAUSAL_LM", r=3, lora_alpha=6, target_modules=["q_proj", "v_proj"])
    theirs = get_peft_model(tiny_llama(), config)
    own = {n: p for n, p in theirs.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for n, p in own.items():
            p.copy_(start[n.removeprefix("base_model.model.").removesuffix(".default.weight")])
    adamw = torch.optim.AdamW(own.values(), lr=one.lr, weight_decay=one.weight_decay)

    def loss(windows):
        logits = theirs(input_ids=windows).logits[:, :-1]
        return torch.nn.functional.cross_entropy(logits.transpose(1, 2), windows[:, 1:])

    seen = []
    for step in range(one.steps + 1):
        with torch.no_grad():
            seen.append(loss(validation).item())
        adamw.zero_grad()
        loss(train[batch_rows(10, one, step)]).backward()
        torch.nn.utils.clip_grad_norm_(own.values(), one.clip)
        adamw.step()
    learned = run(tiny_llama(), train, validation, dropout=0.0)
    # fp32 sums in another order; six steps of Adam at lr 0.02 let it grow to some 1e-6 of the loss.
    assert [h["val_loss"] for h in learned.history] == pytest.approx(seen[::2], rel=1e-4)


def test_learning_lowers_the_loss_and_leaves_the_model_as_it_was(make):
    model = make().train()
    next(model.parameters()).requires_grad_(False)
    flags = [(n, p.requires_grad) for n, p in model.named_parameters()]
    parts = [(n, m, m.training, sorted(vars(m)), list(m._modules)) for n, m in model.named_modules()]
    weights = {n: t.clone() for n, t in model.state_dict().items()}
    windows = random_windows(4, S, seed=1)
    learned = run(model, windows, windows, steps=10)
    assert learned.best_val_loss < 0.9 * learned.history[0]["val_loss"]
    assert math.exp(learned.history[0]["val_loss"]) == pytest.approx(perplexity(make(), windows).ppl, rel=1e-5)
    assert [(n, m, m.training, sorted(vars(m)), list(m._modules)) for n, m in model.named_modules()] == parts
    assert [(n, p.requires_grad) for n, p in model.named_parameters()] == flags
    assert all(torch.equal(t, weights[n]) for n, t in model.state_dict().items())
    assert model.state_dict().keys() == weights.keys()
    assert all(p.grad is None for p in model.parameters())


class Stopped(Exception):
    pass


def test_a_failure_gives_the_model_back_too(make):
    def stop(progress):
        if progress.step == 2:
            raise Stopped

    model, windows = make(), random_windows(3, S)
    before = [(n, type(m), sorted(vars(m))) for n, m in model.named_modules()]
    with pytest.raises(Stopped):
        run(model, report=stop)
    assert [(n, type(m), sorted(vars(m))) for n, m in model.named_modules()] == before
    assert torch.equal(model(windows).logits, make()(windows).logits)


def test_dropout_is_on_in_lora_alone_and_only_for_updates():
    model, seen = tiny_opt(), []  # its own dropout is 0.1

    def look(module, args, kwargs):
        seen.append((torch.is_grad_enabled(), {n.split(".")[-2] for n, m in module.named_modules() if m.training}))

    hook = model.register_forward_pre_hook(look, with_kwargs=True)
    state = torch.get_rng_state()
    run(model, steps=2)
    hook.remove()
    assert (True, {"lora_dropout"}) in seen
    assert all(on == ({"lora_dropout"} if updating else set()) for updating, on in seen)
    assert torch.equal(torch.get_rng_state(), state)  # and the process's random numbers are not drawn from


def test_dropout_is_a_function_of_seed_and_step():
    with injected(tiny_llama(), spec(dropout=0.5)) as made:
        with torch.no_grad():
            for n, p in made.parameters.items():
                if n.endswith("lora_B"):
                    p.fill_(0.3)

        def logits(seed, step):
            with made.updating(seed, step), torch.no_grad():
                return scored_logits(made.model, random_windows(2, S))

        first = logits(0, 4)
        assert torch.equal(logits(0, 4), first)
        assert not torch.equal(logits(0, 5), first)
        assert not torch.equal(logits(1, 4), first)
    text = random_windows(5, S)
    off, on = (run(tiny_llama(), text, text, dropout=d) for d in (0.0, 0.5))
    assert off.history[0] == on.history[0]  # not on where it validates
    assert off.history[1]["loss"] != on.history[1]["loss"]


@pytest.mark.parametrize(("precision", "stop"), [("fp32", 1), ("fp32", 3), ("bf16", 4)])
def test_an_interrupted_run_resumes_to_the_same_bytes(make, tmp_path, precision, stop):
    fields = {"precision": precision, "schedule": "cosine", "warmup": 1, "accumulate": 2, "dropout": 0.3}
    whole = run(make(), **fields)

    def checkpoint(state):
        if state.step == stop:
            state.save(tmp_path / "state")
            raise Stopped

    with pytest.raises(Stopped):
        run(make(), **fields, checkpoint=checkpoint)
    assert TrainState.load(tmp_path / "state").moments.keys() == TrainState.load(tmp_path / "state").values.keys()
    resumed = run(make(), **fields, resume=tmp_path / "state")
    assert resumed.history == whole.history
    for name, learned in (("a", whole), ("b", resumed)):
        learned.save(tmp_path / name, "some/model")
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_lora_of_a_bfloat16_model_is_learned_in_fp32(make, precision):
    model = make().to(torch.bfloat16)
    with injected(model, spec()) as made:
        assert {p.dtype for p in made.parameters.values()} == {torch.float32}
    learned = run(model, precision=precision)
    assert {t.dtype for t in learned.weights.values()} == {torch.float32}
    assert any(not torch.equal(t, t.to(torch.bfloat16).float()) for t in learned.weights.values())
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_a_float16_model_without_a_loss_scale_is_refused():
    with pytest.raises(ValueError, match="its gradient vanishes"):
        run(tiny_llama().half())


# -------------------------------------------------------------------- the adapter


def test_the_adapter_fits_the_ordinary_model(make, tmp_path):
    """PEFT's model, ctp's own loading and the model that learned (split, for BLOOM) give the same logits."""
    model, windows, seen = make(), random_windows(3, S), {}

    def look(progress):
        with torch.no_grad():
            seen[progress.step] = scored_logits(model, windows)

    text = random_windows(5, S, seed=2)
    learned = run(model, text, text, alpha=5, report=look)  # alpha / r is not a whole number
    learned.save(tmp_path, "some/model")
    names = {"adapter_config.json", "adapter_model.safetensors", "history.json"}
    assert {p.name for p in tmp_path.iterdir()} == names
    with applied(model, tmp_path), torch.no_grad():
        ours = scored_logits(model, windows)
    with torch.no_grad():
        theirs = PeftModel.from_pretrained(make(), str(tmp_path)).eval()(input_ids=windows).logits[:, :-1]
    assert learned.best_step > 0
    # fp32: one position more on their side; for BLOOM one product for three, with zeros in it. Rounding only.
    assert torch.allclose(ours, seen[learned.best_step], atol=5e-5, rtol=1e-5)
    assert torch.allclose(theirs, ours, atol=5e-5, rtol=1e-5)
    assert not torch.allclose(ours, scored_logits(model, windows), atol=1e-2)
    assert adapter_facts(tmp_path).kind == "lora"
    targets = json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
    assert targets == (["query_key_value"] if make is tiny_bloom else ["q_proj", "v_proj"])  # always in this order


def test_blooms_adapter_has_twice_the_rank_and_nothing_for_keys(tmp_path):
    text = random_windows(5, S, seed=2)
    learned = run(tiny_bloom(), text, text)
    learned.save(tmp_path, "some/bloom")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert {n: config[n] for n in ("r", "lora_alpha", "target_modules", "base_model_name_or_path")} == {
        "r": 6, "lora_alpha": 12, "target_modules": ["query_key_value"], "base_model_name_or_path": "some/bloom",
    }  # fmt: skip
    name = "base_model.model.transformer.h.0.self_attention.query_key_value"
    a, b = (load_file(tmp_path / ADAPTER)[f"{name}.lora_{x}.weight"] for x in "AB")
    assert (a.shape, b.shape) == ((6, 32), (96, 6))
    heads = b.view(4, 3, 8, 6)
    assert not heads[:, 1].any()
    assert not heads[:, 0, :, 3:].any()
    assert not heads[:, 2, :, :3].any()
    assert heads[:, 0, :, :3].all()
    assert heads[:, 2, :, 3:].all()
    assert learned.trainable_parameters == 2 * 2 * 3 * (32 + 32)
    assert parameters(tmp_path) == 2 * 6 * (32 + 96)


# -------------------------------------------------------------------- a cell, a real model


@pytest.mark.parametrize("architecture", ["llama", "bloom"])
def test_a_cell_learns_lora_and_another_measures_it(tmp_path, architecture):
    text = {"dataset": "pydoc", "split": "train", "seq_len": 24, "count": 16}
    recovery = {"method": "lora", "r": 2, "text": text, "validation": {"count": 4}, "steps": 4, "validate_every": 2,
                "lr": 0.01}  # fmt: skip
    bench = Bench(tmp_path, model_folder(tmp_path / architecture, architecture), recovery=recovery)
    (learn,) = bench.all(Learn)
    evaluate = next(c for c in bench.all(Evaluate) if c.recovery == learn and c.target == learn.source)
    for cell in (learn.source, learn, evaluate):
        bench.execute(cell)
    metrics, folder = bench.store.manifest(ref(learn))["metrics"], bench.store.fetch(ref(learn))
    history = json.loads((folder / "history.json").read_text())
    assert set(metrics) == {"best_step", "best_val_loss", "initial_val_loss", "trainable_parameters"}
    assert metrics["best_val_loss"] == min(h["val_loss"] for h in history["history"]) < metrics["initial_val_loss"]
    # Two layers, r = 2: A (2, 32) and B (out, 2); Llama's v_proj is half as wide.
    assert metrics["trainable_parameters"] == 2 * 2 * (32 + 32 + 32 + (32 if architecture == "bloom" else 16))
    measured = bench.store.manifest(ref(evaluate))["metrics"]
    assert measured["positions"] == measured["scored_tokens"]  # nothing stands in front
    model, tokenizer = loading.load_compressed(learn.source, bench.store, bench.runtime, "cpu")
    with applied(model, folder):
        ids = loading.token_windows(evaluate.measure.text, tokenizer, bench.runtime)
        assert perplexity(model, ids).nll_sum == measured["nll_sum"]


def test_lora_wins_back_what_pruning_took_from_a_real_model(trained):
    learned = run(
        pruned(trained), windows("train", 200), windows("test", 40), r=4, alpha=8, steps=60, validate_every=20, lr=5e-3
    )
    assert learned.best_val_loss < learned.history[0]["val_loss"] - math.log(1.03)  # 3 % of the perplexity
