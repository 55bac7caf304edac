"""A run of learning as a whole: what is kept and reported, resume to the byte, failures, precisions."""

import math
from contextlib import contextmanager

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from support.prompts import S, run, spec
from support.tiny import random_windows, tiny_llama

from ctp.cells.runtime import Runtime
from ctp.evaluation.perplexity import perplexity
from ctp.learning import accelerator as learning_accelerator
from ctp.learning.checkpoint import TrainState
from ctp.learning.soft_prompt import learn

ORDINARY = learning_accelerator.accelerated


# ------------------------------------------------------- the run, and resuming


def test_the_best_step_is_kept_and_everything_is_reported():
    told = []
    learned = run(steps=5, lr=3.0, report=told.append)  # far too fast: later steps are worse
    assert [h["step"] for h in learned.history] == [0, 2, 4, 5]
    best = min(learned.history, key=lambda h: h["val_loss"])
    assert (learned.best_step, learned.best_val_loss) == (best["step"], best["val_loss"])
    assert learned.history[0]["loss"] is None
    again = perplexity(tiny_llama(), random_windows(5, S, seed=2), learned.embeddings)
    assert math.log(again.ppl) == pytest.approx(learned.best_val_loss, rel=1e-6)
    assert [t.step for t in told if t.val_loss is not None] == [0, 2, 4, 5]
    for name in ("loss", "lr"):  # live as in the history: one curve
        assert [getattr(t, name) for t in told if t.val_loss is not None] == [h[name] for h in learned.history]
    assert set(told[-1].numbers()) == {
        "step", "steps", "loss", "lr", "tokens_per_s", "best_val_loss", "best_step", "val_loss",
    }  # fmt: skip
    assert told[-1].tokens_per_s > 0
    assert learned.seconds > 0


class Stopped(Exception):
    pass


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", "float32"), ("bf16", "float32"), ("bf16", "bfloat16")])
@pytest.mark.parametrize("stop", [1, 3, 4])
def test_an_interrupted_run_resumes_to_the_same_bytes(tmp_path, precision, dtype, stop):
    fields = {"precision": precision, "dtype": dtype, "schedule": "cosine", "warmup": 2, "accumulate": 2, "steps": 7}
    whole = run(**fields)

    def checkpoint(state):
        if state.step == stop:
            state.save(tmp_path)
            raise Stopped

    with pytest.raises(Stopped):
        run(**fields, checkpoint=checkpoint)
    resumed = run(**fields, resume=tmp_path)
    assert torch.equal(resumed.embeddings, whole.embeddings)
    assert resumed.history == whole.history
    assert (resumed.best_step, resumed.best_val_loss) == (whole.best_step, whole.best_val_loss)
    assert {p.name for p in tmp_path.iterdir()} == {"state.json", "state.safetensors"}


def test_checkpoints_keep_their_distance_and_the_last_step_has_none(tmp_path):
    steps = []
    run(checkpoint=lambda state: steps.append(state.step))
    assert steps == [1, 2, 3, 4, 5]
    learn(
        tiny_llama(), random_windows(10, S), random_windows(5, S), spec(), runtime=Runtime(device="cpu"),
        checkpoint=lambda state: pytest.fail("a minute has not passed"),
    )  # fmt: skip


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    run(checkpoint=lambda state: state.save(tmp_path))
    assert TrainState.load(tmp_path).step == 5
    for other in ({"lr": 0.06}, {"train": random_windows(10, S, seed=9)}):
        with pytest.raises(ValueError, match="another spec or other text"):
            run(**other, resume=tmp_path)
    with pytest.raises(FileNotFoundError):
        run(resume=tmp_path / "nothing")


# ------------------------------------------------------------------- failures


def test_a_loss_that_is_not_finite_stops_the_run():
    model = tiny_llama()
    with torch.no_grad():
        model.get_input_embeddings().weight[7] = math.nan
    fine = random_windows(10, S, vocab=7)
    with pytest.raises(FloatingPointError, match=r"step [1-3]: the training loss is nan; learning rate 0\.05"):
        run(model, torch.cat([fine, torch.full((1, S), 7)]), fine, init="first_rows")
    with pytest.raises(FloatingPointError, match="step 0: the validation loss"):
        run(model, fine, torch.full((1, S), 7), init="first_rows")


def test_a_gradient_that_is_not_finite_stops_the_run():
    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.view_as(x)

        @staticmethod
        def backward(ctx, g):
            return g * math.inf

    model = tiny_llama()
    model.model.norm.register_forward_hook(lambda module, args, out: Broken.apply(out))
    with pytest.raises(FloatingPointError, match=r"step 1: the gradient's norm is nan; .* last losses: [0-9]"):
        run(model)
    assert all(p.requires_grad for p in model.parameters())


def test_windows_and_prompt_must_fit_the_context():
    with pytest.raises(ValueError, match=r"5 prompt rows .* 12 tokens = 17 .* 16"):
        run(tiny_llama(context=16), k=5)


def test_runs_of_different_precision_follow_each_other_in_one_process():
    outer = Accelerator(cpu=True)
    first, half, again = (run(precision=p) for p in ("fp32", "bf16", "fp32"))
    assert torch.equal(first.embeddings, again.embeddings)
    assert not torch.equal(first.embeddings, half.embeddings)
    assert half.best_val_loss == pytest.approx(first.best_val_loss, rel=0.02)
    assert outer.mixed_precision == "no"  # an Accelerator of the caller's still works


def test_a_gpu_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="no GPU"):
        learn(tiny_llama(), random_windows(5, S), random_windows(5, S), spec(), runtime=Runtime(device="cuda"))


def test_a_float16_model_without_a_loss_scale_is_refused():
    with pytest.raises(ValueError, match="its gradient vanishes"):
        run(tiny_llama().half())


@pytest.fixture
def fp16_on_cpu(monkeypatch):
    """fp16's loss scale without a GPU: what accelerate sets up there, on the CPU. Gives the scale to start from."""
    start = {"scale": 2.0**10}

    @contextmanager
    def accelerator(precision, device):
        AcceleratorState._reset_state(reset_partial_state=True)
        made = Accelerator(mixed_precision="no", cpu=True)
        made.state._mixed_precision, made.native_amp = "fp16", True
        made.scaler = torch.amp.GradScaler("cpu", init_scale=start["scale"])
        made.autocast = lambda: torch.autocast("cpu", torch.float16)
        yield made
        AcceleratorState._reset_state(reset_partial_state=True)

    monkeypatch.setattr("ctp.learning.train.accelerated", accelerator)
    return start


def test_fp16_scales_the_loss_and_resumes_to_the_same_bytes(tmp_path, fp16_on_cpu):
    full = run(steps=5, accumulate=2)  # patched, so that fp16 is in force whatever the spec says
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ctp.learning.train.accelerated", ORDINARY)
        fp32 = run(steps=5, accumulate=2)
    assert not torch.equal(full.embeddings, fp32.embeddings)
    assert full.best_val_loss == pytest.approx(fp32.best_val_loss, rel=1e-2)

    def checkpoint(state):
        state.save(tmp_path)
        if state.step == 3:
            raise Stopped

    with pytest.raises(Stopped):
        run(steps=5, accumulate=2, checkpoint=checkpoint)
    assert TrainState.load(tmp_path).scaler["scale"] == 2.0**10
    fp16_on_cpu["scale"] = 2.0**5  # must come from the checkpoint instead
    assert torch.equal(run(steps=5, accumulate=2, resume=tmp_path).embeddings, full.embeddings)


def test_fp16_skips_an_overflow_and_lowers_the_scale(tmp_path, fp16_on_cpu):
    fp16_on_cpu["scale"] = 2.0**30
    states = []
    learned = run(steps=20, checkpoint=lambda state: states.append((state.scaler["scale"], bool(state.moments))))
    assert states[0] == (2.0**29, False)
    assert states[-1][0] < 2.0**29
    assert states[-1][1]
    assert learned.best_val_loss < learned.history[0]["val_loss"]
