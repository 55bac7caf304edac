"""Learning, attached prompts and evaluation on a GPU."""

import pytest
import torch
from shapes import WIDTH, llama, qwen3, windows
from torch import nn

from ctp.cells import LoRA, SoftPrompt
from ctp.cells.inputs import Windows
from ctp.cells.runtime import Runtime
from ctp.evaluation.latency import latency
from ctp.evaluation.perplexity import perplexity
from ctp.kernels import llama as kernels
from ctp.learning.lora import learn_lora
from ctp.learning.objective import choose
from ctp.learning.soft_prompt import learn
from ctp.prompts.attach import frozen, scored_logits, summed_nll
from ctp.prompts.attached import attach_prompt


def test_liger_kernels_are_there():
    """Without them the rest passes on slower code."""
    assert kernels.available()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("make", [llama, qwen3], ids=["llama", "qwen3"])
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_loss_and_gradient_are_the_models_own_and_attention_is_flash(make, dtype, recompute):
    model, batch = make(dtype=dtype), windows(4, 512).cuda()
    start = torch.randn(100, model.config.hidden_size, device="cuda") * 0.02

    def plain(prompt):
        loss = summed_nll(scored_logits(model, batch, prompt), batch)
        (loss / 512).backward()
        return loss.item()

    def packed(prompt):
        objective = choose(model, batch, prompt.detach(), recompute)
        assert objective.packed
        with objective.active():
            loss = objective.nll(batch, prompt)
            (loss / 512).backward()
        return loss.item()

    def run(way):
        prompt = nn.Parameter(start.clone())
        with frozen(model), torch.autocast("cuda", dtype):
            return way(prompt), prompt.grad

    own_loss, own = run(plain)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        loss, gradient = run(packed)
        torch.cuda.synchronize()
    assert any("flash" in event.key for event in profile.key_averages())
    # Half precision has 8 (bf16) or 11 (fp16) bits: sums of rounding errors over two blocks, as a share of the largest.
    tolerance = 0.1 if dtype == torch.bfloat16 else 0.03
    assert loss == pytest.approx(own_loss, rel=1e-3)
    assert float((gradient - own).abs().max() / own.abs().max()) < tolerance


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_learning_lowers_the_loss_and_resumes_to_the_same_steps(precision, tmp_path):
    model = llama(dtype=torch.float16 if precision == "fp16" else torch.bfloat16)
    train, held_out = windows(16, 257), windows(4, 257)
    text = Windows(dataset="wikitext2", split="train", seq_len=257, count=16)
    spec = SoftPrompt(
        k=100, lr=1e-2, text=text, validation=text.model_copy(update={"split": "validation"}), steps=20, batch=4,
        validate_every=10, clip=None, precision=precision,
    )  # fmt: skip
    states = []
    whole = learn(model, train, held_out, spec, runtime=Runtime(device="cuda", checkpoint_seconds=0.0),
                  checkpoint=lambda s: states.append(s) or s.save(tmp_path / f"{len(states)}"))  # fmt: skip
    half = tmp_path / f"{len(states) // 2}"
    resumed = learn(model, train, held_out, spec, runtime=Runtime(device="cuda"), resume=half)
    losses = [[h["val_loss"] for h in run.history] for run in (whole, resumed)]
    assert losses[0][-1] < losses[0][0] / 2
    # Flash attention's backward adds in an order that differs from run to run.
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


def test_lora_learns():
    text = Windows(dataset="wikitext2", split="train", seq_len=257, count=16)
    spec = LoRA(text=text, validation=text.model_copy(update={"split": "validation"}), steps=20, batch=4,
                validate_every=10, clip=None, precision="bf16")  # fmt: skip
    run = learn_lora(
        llama(dtype=torch.bfloat16), windows(16, 257), windows(4, 257), spec, runtime=Runtime(device="cuda")
    )
    losses = [h["val_loss"] for h in run.history]
    assert losses[-1] < losses[0]


def test_an_attached_prompt_generates_as_without_a_cache():
    model, prompt, ids = llama(dtype=torch.float32), torch.randn(16, WIDTH) * 0.02, windows(2, 9).cuda()
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False}
    handle = attach_prompt(model, prompt)
    try:
        cached, plain = (model.generate(**given, use_cache=u, pad_token_id=0) for u in (True, False))
    finally:
        handle.remove()
    assert torch.equal(cached, plain)


def test_perplexity_is_the_cpus():
    model, prompt, batch = llama(1, torch.float32), torch.randn(16, WIDTH) * 0.02, windows(2, 128)
    on_gpu = perplexity(model, batch, prompt, batch=2).ppl
    assert on_gpu == pytest.approx(perplexity(model.cpu(), batch, prompt, batch=2).ppl, rel=1e-3)


def test_latency_has_numbers():
    numbers = latency(llama(), 128, 8, torch.randn(16, WIDTH) * 0.02, repeats=3).metrics()
    assert 0 < numbers["decode_seconds_per_token"] < 1
