"""The ways to take a step of learning a soft prompt that `benchmarks.learning` times: ctp, and PEFT twice."""

import contextlib
import itertools
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

K = 100  # rows of the prompt


@contextlib.contextmanager
def step_times() -> Iterator[list[float]]:
    """When each step of an optimizer ended, in seconds, whoever calls it."""
    ends: list[float] = []
    hook = register_optimizer_step_post_hook(lambda *_: ends.append(time.perf_counter()))
    try:
        yield ends
    finally:
        hook.remove()


def ours(model: Any, windows: Tensor, steps: int, precision: str, recompute: bool) -> float:
    """Through `learn`, the function that cells call; the first step's loss."""
    from ctp.cells import SoftPrompt
    from ctp.cells.inputs import Windows
    from ctp.cells.runtime import Runtime
    from ctp.learning.soft_prompt import learn

    text = Windows(dataset="wikitext2", split="train", seq_len=windows.shape[1], count=len(windows))
    held_out = text.model_copy(update={"split": "validation"})
    spec = SoftPrompt(k=K, text=text, validation=held_out, steps=steps, batch=len(windows), validate_every=steps,
                      init="first_rows", precision=precision, lr=1e-3, warmup=0, clip=None)  # fmt: skip
    losses: list[float] = []  # the sums since the last validation, which is before the first step
    runtime = Runtime(device=model.device.type, recompute=recompute, checkpoint_seconds=0)
    learn(model, windows, windows[:1, :8], spec, runtime=runtime, checkpoint=lambda run: losses.append(run.loss_sum))
    return losses[0]


def prompt_tuning(model: Any) -> Any:
    """The model with PEFT's prompt of the same rows in front."""
    from peft import PromptTuningConfig, TaskType, get_peft_model

    rows = model.get_input_embeddings().weight[:K].detach().clone()
    tuned = get_peft_model(model, PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=K))
    with torch.no_grad():
        tuned.prompt_encoder["default"].embedding.weight.copy_(rows)
    return tuned


def scored(windows: Tensor) -> Tensor:
    """Labels without each window's first token: ctp scores x_1 .. x_{s-1}."""
    labels = windows.clone()
    labels[:, 0] = -100
    return labels


def plain_loop(model: Any, windows: Tensor, steps: int) -> float:
    """PEFT in a plain loop; the first step's loss."""
    tuned, losses = prompt_tuning(model), []
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(steps):
        loss = tuned(input_ids=windows, labels=scored(windows)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses[0]


def with_trainer(model: Any, windows: Tensor, steps: int, precision: str) -> float:
    """PEFT in Hugging Face's Trainer; the first step's loss."""
    from transformers import Trainer, TrainingArguments

    rows = [{"input_ids": w, "labels": y} for w, y in zip(windows, scored(windows), strict=True)] * steps
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder, per_device_train_batch_size=len(windows), max_steps=steps, learning_rate=1e-3, use_cpu=True,
            bf16=precision == "bf16", report_to=[], save_strategy="no", logging_steps=1, disable_tqdm=True,
        )  # fmt: skip
        trainer = Trainer(prompt_tuning(model), args, train_dataset=rows)
        trainer.train()
    return float(trainer.state.log_history[0]["loss"])


def steps_of(way: str, model: Any, windows: Tensor, steps: int, precision: str) -> tuple[list[float], float]:
    """Seconds of each step but the first, and the first step's loss."""
    with step_times() as ends:
        if way == "peft":
            loss = plain_loop(model, windows, steps)
        elif way == "trainer":
            loss = with_trainer(model, windows, steps, precision)
        else:
            loss = ours(model, windows, steps, precision, way in ("recompute", "packed"))
    return [b - a for a, b in itertools.pairwise(ends)], loss


def llama_7b() -> Any:
    """A model of LLaMA-7B's shape with random weights, bfloat16, on the GPU."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            return LlamaForCausalLM(LlamaConfig(max_position_embeddings=2048)).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(torch.float32)


def pack_linears(model: Any) -> None:
    """Replaces the linears of the blocks by packed ones of 4 random bits, groups of 128."""
    from ctp.formats.layer import Layer
    from ctp.formats.pack import pack
    from ctp.formats.packed import put_packed

    for name, linear in [
        (n, m) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and ".layers." in n
    ]:
        rows, columns = linear.weight.shape
        codes = torch.randint(1, 16, (rows, columns), dtype=torch.uint8, device="cuda")
        scale = torch.full((rows, columns // 128), 0.005, dtype=torch.float16, device="cuda")
        put_packed(model, pack({name: Layer((rows, columns), bits=4, codes=codes, scale=scale)}), torch.bfloat16)
