"""Learning a prompt: the gradient, the loop against a hand-written one, initialisation, PEFT's format."""

import json

import peft
import pytest
import torch
from support.prompts import S, run, spec
from support.tiny import random_windows, tiny_bloom, tiny_llama, tiny_opt
from support.trained import pruned, windows
from transformers import optimization as hf

from ctp.evaluation.perplexity import perplexity
from ctp.learning.soft_prompt import initial_prompt
from ctp.learning.steps import batch_rows, learning_rate
from ctp.prompts.attach import scored_logits, summed_nll
from ctp.prompts.files import load_prompt

# ------------------------------------------------------------------- gradient


def eq_1(model):
    """The summed loss as a function of the prompt, in float64 as far as the architecture allows, and a prompt."""
    model, windows = model.double(), random_windows(2, 8)
    prompt = torch.randn(3, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(3), requires_grad=True)
    return lambda p: summed_nll(scored_logits(model, windows, p), windows), prompt


def test_the_gradient_of_eq_1_is_the_slope_of_the_loss():
    loss, prompt = eq_1(tiny_opt(hidden=16))
    (gradient,) = torch.autograd.grad(loss(prompt), prompt)
    with torch.no_grad():
        for i, j in [(0, 0), (1, 5), (2, 15)]:
            h = torch.zeros_like(prompt)
            h[i, j] = 1e-5
            slope = (loss(prompt + h) - loss(prompt - h)) / 2e-5
            assert gradient[i, j].item() == pytest.approx(slope.item(), rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("make", [tiny_llama, tiny_bloom])
def test_the_gradient_is_the_slope_along_itself(make):
    """These two compute norms or softmax in fp32 inside, which drowns small steps: one larger step, steepest way."""
    loss, prompt = eq_1(make(hidden=16))
    (gradient,) = torch.autograd.grad(loss(prompt), prompt)
    way = gradient / gradient.norm()
    with torch.no_grad():
        slope = (loss(prompt + 0.01 * way) - loss(prompt - 0.01 * way)) / 0.02
    assert gradient.norm().item() == pytest.approx(slope.item(), rel=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_only_the_prompt_learns_and_the_model_is_left_as_it_was(dtype, precision):
    model = tiny_opt().to(dtype).train()
    model.model.decoder.final_layer_norm.weight.requires_grad_(False)
    weights = {n: t.clone() for n, t in model.state_dict().items()}
    flags = [p.requires_grad for p in model.parameters()]
    learned = run(model, precision=precision)
    assert all(torch.equal(t, weights[n]) for n, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(m.training for m in model.modules())
    assert learned.embeddings.dtype == torch.float32
    assert learned.embeddings.device.type == "cpu"


# ----------------------------------------------------------- the loop by hand


def by_hand(model, train, validation, spec):
    """The plainest loop that should give the same prompt: full batch, full logits, transformers' schedules."""
    prompt = torch.nn.Parameter(initial_prompt(model, spec).to(getattr(torch, spec.dtype)))
    adamw = torch.optim.AdamW([prompt], lr=spec.lr, weight_decay=spec.weight_decay)
    schedule = {
        "constant": lambda: hf.get_constant_schedule_with_warmup(adamw, spec.warmup),
        "linear": lambda: hf.get_linear_schedule_with_warmup(adamw, spec.warmup, spec.steps),
        "cosine": lambda: hf.get_cosine_schedule_with_warmup(adamw, spec.warmup, spec.steps),
    }[spec.schedule]()

    def nll(windows):
        embeds = model.get_input_embeddings()(windows)
        logits = model(
            inputs_embeds=torch.cat([prompt.to(embeds.dtype).expand(len(windows), -1, -1), embeds], 1)
        ).logits
        logits = logits[:, spec.k : -1]
        return torch.nn.functional.cross_entropy(logits.transpose(1, 2), windows[:, 1:], reduction="none")

    seen = []
    for step in range(spec.steps + 1):
        if step % spec.validate_every == 0 or step == spec.steps:
            with torch.no_grad():
                seen.append((nll(validation).mean().item(), step, prompt.detach().clone()))
        if step < spec.steps:
            losses = nll(train[batch_rows(len(train), spec, step)])
            adamw.zero_grad()
            (losses.mean() if spec.loss == "token_mean" else losses.sum(1).mean()).backward()
            if spec.clip is not None:
                torch.nn.utils.clip_grad_norm_([prompt], spec.clip)
            adamw.step()
            schedule.step()
    return min(seen, key=lambda x: x[0]), seen


@pytest.mark.parametrize(
    "fields",
    [
        {"schedule": "constant", "clip": None, "weight_decay": 0.0},
        {"schedule": "linear", "warmup": 2, "loss": "sequence_sum"},
        {"schedule": "cosine", "weight_decay": 0.5, "clip": 0.1},
        {"accumulate": 2},
        {"accumulate": 4, "loss": "sequence_sum", "clip": None},
    ],
)
def test_it_equals_a_loop_written_by_hand(fields):
    model, train, validation = tiny_llama(), random_windows(10, S, seed=1), random_windows(5, S, seed=2)
    (loss, step, prompt), seen = by_hand(model, train, validation, spec(**fields))
    learned = run(model, train, validation, **fields)
    assert learned.best_step == step
    assert learned.best_val_loss == pytest.approx(loss, rel=1e-5)
    assert [h["val_loss"] for h in learned.history] == pytest.approx([x[0] for x in seen], rel=1e-5)
    # Adam divides by the gradient's size: where an element is nearly 0, rounding moves it by a little of lr = 0.05.
    assert torch.allclose(learned.embeddings, prompt, atol=1e-3)


def test_a_bfloat16_prompt_is_updated_in_bfloat16():
    """Updates and moments are rounded as AdamW rounds them: small steps of large elements are lost."""
    model, text, fields = tiny_llama(), random_windows(5, S, seed=2), {"dtype": "bfloat16", "steps": 12, "lr": 4e-4}
    (_, step, prompt), seen = by_hand(model, text, text, spec(**fields))
    learned = run(model, text, text, **fields)
    assert learned.best_step == step > 0
    # The same loop but for the order of sums: a gradient may be rounded the other way now and then.
    assert (learned.embeddings == prompt.float()).float().mean() > 0.95
    assert [h["val_loss"] for h in learned.history] == pytest.approx([x[0] for x in seen], rel=1e-3)
    assert learned.embeddings.dtype == torch.float32
    assert torch.equal(learned.embeddings, learned.embeddings.to(torch.bfloat16).float())
    start, exact = initial_prompt(model, spec()), run(model, text, text, **fields | {"dtype": "float32"}).embeddings
    large = start.abs() > 0.13  # neighbours in bfloat16 are 0.001 apart there, and an update is 0.0004
    assert large.any()
    assert torch.equal(learned.embeddings[large], start[large].to(torch.bfloat16).float())
    assert (exact[large] - start[large]).abs().mean() > 1e-3


def test_a_bfloat16_prompt_and_a_loss_scale_exclude_each_other():
    with pytest.raises(ValueError, match=r"dtype = 'bfloat16' goes with precision fp32 or bf16, not with .* fp16"):
        spec(dtype="bfloat16", precision="fp16")


def test_accumulation_equals_the_full_batch():
    for loss in ("token_mean", "sequence_sum"):
        full, parts = (run(accumulate=a, loss=loss, steps=4) for a in (1, 4))
        assert torch.allclose(full.embeddings, parts.embeddings, atol=1e-3)
        assert [h["val_loss"] for h in parts.history] == pytest.approx([h["val_loss"] for h in full.history], rel=1e-5)


@pytest.mark.parametrize("warmup", [0, 3])
@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_rates_are_those_of_transformers(schedule, warmup):
    one = spec(steps=10, warmup=warmup, schedule=schedule, lr=0.3)
    adamw = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=one.lr)
    theirs = hf.get_scheduler("constant_with_warmup" if schedule == "constant" else schedule, adamw, warmup, 10)
    for done in range(10):
        assert learning_rate(one, done) == pytest.approx(theirs.get_last_lr()[0], rel=1e-12, abs=1e-15)
        adamw.step()
        theirs.step()
    if schedule != "constant":
        assert learning_rate(one, 10) == 0


def test_batches_are_permutations_of_each_epoch_and_a_function_of_seed_and_step():
    one = spec(batch=4)
    stream = torch.cat([batch_rows(10, one, done) for done in range(5)])
    assert sorted(stream[:10].tolist()) == sorted(stream[10:].tolist()) == list(range(10))
    assert stream[:10].tolist() != stream[10:].tolist()
    assert torch.equal(batch_rows(10, one, 3), stream[12:16])
    assert not torch.equal(batch_rows(10, spec(seed=1), 3), stream[12:16])
    assert len(batch_rows(3, spec(batch=8), 0)) == 8


# ------------------------------------------------------------- initialisation


def test_initial_rows_are_embeddings_and_follow_the_seed():
    model = tiny_llama()
    table = model.get_input_embeddings().weight
    assert torch.equal(initial_prompt(model, spec(init="first_rows", k=5)), table[:5])
    rows = initial_prompt(model, spec(k=61))
    assert torch.equal(rows.sum(1).sort().values, table.sum(1).sort().values)  # distinct: every entry once
    assert torch.equal(rows, initial_prompt(model, spec(k=61)))
    assert not torch.equal(rows, initial_prompt(model, spec(k=61, seed=1)))
    with pytest.raises(ValueError, match=r"k = 62 .* 61"):
        initial_prompt(tiny_llama(context=128), spec(k=62))


def test_text_is_repeated_or_cut_to_k_rows():
    model = tiny_llama()
    table = model.get_input_embeddings().weight

    def tokenizer(text, add_special_tokens):
        assert not add_special_tokens
        return {"input_ids": [ord(c) - ord("a") for c in text]}

    for k, ids in ((5, [2, 0, 1, 2, 0]), (2, [2, 0])):
        rows = initial_prompt(model, spec(init="text", init_text="cab", k=k), tokenizer)
        assert torch.equal(rows, table[ids])
    assert run(model, init="text", init_text="cab", tokenizer=tokenizer).embeddings.shape == (4, 32)
    with pytest.raises(ValueError, match="no tokens"):
        initial_prompt(model, spec(init="text", init_text="?"), lambda text, add_special_tokens: {"input_ids": []})
    with pytest.raises(ValueError, match="tokenizer"):
        run(model, init="text", init_text="cab")


# ----------------------------------------------------------------------- PEFT


@pytest.mark.parametrize("make", [tiny_llama, lambda: tiny_opt(embed=16), tiny_bloom])
def test_peft_loads_the_prompt_and_gives_the_same_logits(tmp_path, make):
    learned = run(make(), steps=2)
    learned.save(tmp_path, "some/model")
    assert {p.name for p in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors", "history.json"}
    assert torch.equal(load_prompt(tmp_path), learned.embeddings)
    history = json.loads((tmp_path / "history.json").read_text())
    assert (history["best_step"], history["history"]) == (learned.best_step, learned.history)
    windows = random_windows(3, S)
    ours = scored_logits(make(), windows, learned.embeddings)
    theirs = peft.PeftModel.from_pretrained(make(), str(tmp_path)).eval()
    with torch.no_grad():
        logits = theirs(input_ids=windows, attention_mask=torch.ones_like(windows)).logits
    # fp32, one position more on their side: rounding only.
    assert torch.allclose(logits[:, 4:-1], ours, atol=2e-5, rtol=1e-4)


# -------------------------------------------------------------- a real model


def test_a_prompt_wins_back_what_pruning_took_from_a_real_model(trained):
    model, train, held_out = pruned(trained, 0.85), windows("train", 200), windows("test", 40)
    before = perplexity(model, held_out, batch=40)
    learned = run(model, train, held_out, k=8, steps=60, validate_every=20, lr=5e-2, schedule="cosine")
    prompted = perplexity(model, held_out, learned.embeddings, batch=40)
    assert learned.history[0]["val_loss"] > learned.best_val_loss
    assert prompted.ppl < 0.98 * before.ppl
