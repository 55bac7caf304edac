"""One step of learning a soft prompt: time and memory, next to PEFT with a plain loop and with Hugging Face's Trainer.

    python -m benchmarks.learning [--rounds N] [--steps N] [--precision fp32 bf16]
    python -m benchmarks.learning --device cuda

On a CPU: SmolLM2-135M, 4 windows of 256 tokens behind 100 rows, AdamW; the same weights, rows, tokens and scored tokens
for all, each in a process of its own, one after the other in every round. Time is the median of all steps but the first
of each process, extra memory the largest resident size during the steps over that before them. The floor is the time
that the matrix products alone would take: those of frozen linears for every position once (the prompt's once a batch)
and of the head for scored positions, forward and for the inputs' gradient, at the rate measured here. bf16 is measured
where the CPU multiplies it fast; elsewhere one more row has a model stored in bfloat16, which is computed in float32.

On a GPU: a model of LLaMA-7B's shape with random weights, bfloat16, 4 windows of 1,024 tokens behind 100 rows,
next to PEFT with a plain loop: share of the card's measured rate of matrix products, and peak memory.

Exit status 1 where a claim does not hold.
"""

import argparse
import gc
import importlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ctp.machine.arithmetic import computed_in

K, BATCH, WINDOW = 100, 4, 256
TOKENS = Path(__file__).with_name("smollm2_wikitext2_256.safetensors")
WAYS = {"peft": "PEFT, plain loop", "trainer": "PEFT, HF Trainer", "ctp": "ctp", "recompute": "ctp, recomputing"}
HALF = {"half": "ctp, stored in bf16"}  # where bf16 is computed in float32
SLOWEST = {"fp32": 0.75, "bf16": 1.0}  # of the time of PEFT's plain loop
TRAINER = {"fp32": 0.85, "bf16": 1.0}  # of the Trainer's, which is now faster than the loop and now slower
RECOMPUTED = 1.35  # of the time without
LARGEST = {"ctp": 0.4, "recompute": 0.2}  # of PEFT's extra memory
WIDENED = 1.3  # a model stored in bf16, computed in float32: of the time of one stored in float32
LOSS = {"fp32": 1e-5, "bf16": 5e-3}  # relative, of the first step
GPU_WINDOW = 1024
GPU_WAYS = {"peft": WAYS["peft"], "ctp": WAYS["ctp"], "recompute": WAYS["recompute"],
            "packed": "ctp, recomputing, 4-bit weights packed"}  # fmt: skip
GPU_SHARE, GPU_OF_PEFT = 0.5, 0.85  # of the rate of matrix products, of the time of PEFT's plain loop
GPU_MEMORY = {"recompute": 24 * 2**30, "packed": 12 * 2**30}


def resident(peak: bool = False) -> int:
    """Bytes of this process in memory; peak: the most since `forget_peak`."""
    name = "VmHWM" if peak else "VmRSS"
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name))
    return 1024 * int(line.split()[1])


def forget_peak() -> int:
    """Start measuring the peak from here; returns the bytes in memory."""
    Path("/proc/self/clear_refs").write_text("5")
    return resident()


# ------------------------------------------------------------------------- the ways


def ours(model: Any, windows: Tensor, steps: int, precision: str, recompute: bool) -> tuple[list[float], float]:
    """Seconds of each step and the first step's loss, through `learn`, the function that cells call."""
    from ctp.cells import SoftPrompt
    from ctp.cells.inputs import Windows
    from ctp.cells.runtime import Runtime
    from ctp.learning import run
    from ctp.learning.soft_prompt import learn

    text = Windows(dataset="wikitext2", split="train", seq_len=windows.shape[1], count=len(windows))
    held_out = text.model_copy(update={"split": "validation"})
    spec = SoftPrompt(k=K, text=text, validation=held_out, steps=steps, batch=len(windows), validate_every=steps,
                      init="first_rows", precision=precision, lr=1e-3, warmup=0, clip=None)  # fmt: skip
    seconds, losses = [], []
    update = run.Run.update

    def timed(self: Any) -> None:
        begun = time.perf_counter()
        update(self)
        seconds.append(time.perf_counter() - begun)
        losses.append(self.losses[-1])

    run.Run.update = timed  # type: ignore[method-assign]
    device = model.device.type
    learn(model, windows, windows[:1, :8], spec, runtime=Runtime(device=device, recompute=recompute))
    return seconds, losses[0]


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


def plain_loop(model: Any, windows: Tensor, steps: int) -> tuple[list[float], float]:
    tuned, seconds, losses = prompt_tuning(model), [], []
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(steps):
        begun = time.perf_counter()
        loss = tuned(input_ids=windows, labels=scored(windows)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - begun)
    return seconds, losses[0]


def with_trainer(model: Any, windows: Tensor, steps: int, precision: str) -> tuple[list[float], float]:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    begun: list[float] = []
    seconds: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            begun.append(time.perf_counter())

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            seconds.append(time.perf_counter() - begun[-1])

    rows = [{"input_ids": w, "labels": y} for w, y in zip(windows, scored(windows), strict=True)] * steps
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder, per_device_train_batch_size=len(windows), max_steps=steps, learning_rate=1e-3, use_cpu=True,
            bf16=precision == "bf16", report_to=[], save_strategy="no", logging_steps=1, disable_tqdm=True,
        )  # fmt: skip
        trainer = Trainer(prompt_tuning(model), args, train_dataset=rows, callbacks=[Clock()])
        trainer.train()
    return seconds, float(trainer.state.log_history[0]["loss"])


def one(way: str, folder: str, precision: str, steps: int) -> dict[str, Any]:
    """What one process measures."""
    from transformers import AutoModelForCausalLM

    precision = "bf16" if way == "half" else precision
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval().requires_grad_(False)
    for p in model.parameters():  # out of the mapped file, into memory
        p.data = p.data.clone()
    windows = load_file(TOKENS)["calibration"][:BATCH, :WINDOW].long()
    for name in ("accelerate", "peft", "ctp.cells", "ctp.learning.soft_prompt"):  # their memory is no step's
        importlib.import_module(name)
    before = forget_peak()
    if way == "peft":
        seconds, loss = plain_loop(model, windows, steps)
    elif way == "trainer":
        seconds, loss = with_trainer(model, windows, steps, precision)
    else:
        seconds, loss = ours(model, windows, steps, precision, way == "recompute")
    return {"seconds": seconds[1:], "memory": resident(peak=True) - before, "loss": loss}


# ------------------------------------------------------------------------ the table


def rate(dtype: torch.dtype, shape: tuple[int, int, int], device: str = "cpu") -> float:
    """Operations a second of a matrix product (m, n, k)."""
    m, n, k = shape
    a, b = torch.randn(m, k, device=device).to(dtype), torch.randn(n, k, device=device).to(dtype)
    seconds = min(_timed(lambda: a @ b.T, device) for _ in range(30))
    return 2 * m * n * k / seconds


def _timed(work: Callable[[], object], device: str) -> float:
    begun = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def operations(config: Any, b: int, s: int) -> float:
    """Of a step's matrix products without attention: 2 a weight and position, forward and for the inputs' gradient."""
    width, inner, kv = config.hidden_size, config.intermediate_size, config.num_key_value_heads * config.head_dim
    block = 2 * width * width + 2 * width * kv + 3 * width * inner
    return 2 * 2 * (config.num_hidden_layers * block * (K + b * (s - 1)) + config.vocab_size * width * b * (s - 1))


def native() -> bool:
    """Does this CPU multiply bfloat16 fast?"""
    return computed_in("bfloat16", "cpu") == "bfloat16"


def child(way: str, folder: str, precision: str, steps: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.learning", "--one", way, folder, precision, "--steps", str(steps)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise RuntimeError(f"{way}, {precision}: {ended.stderr[-2000:]}")
    return dict(json.loads(ended.stdout.splitlines()[-1]))


def table(precision: str, folder: str, config: Any, rounds: int, steps: int) -> list[str]:
    """Measure and print one precision; returns the claims that do not hold."""
    names = WAYS if precision == "bf16" or native() else WAYS | HALF
    runs: dict[str, list[dict[str, Any]]] = {way: [] for way in names}
    for _ in range(rounds):
        for way, some in runs.items():
            some.append(child(way, folder, precision, steps))
    seconds = {w: [x for run in some for x in run["seconds"]] for w, some in runs.items()}
    time_of = {w: statistics.median(x) for w, x in seconds.items()}
    memory = {w: statistics.median(run["memory"] for run in some) for w, some in runs.items()}
    loss = {w: some[0]["loss"] for w, some in runs.items()}
    speed = rate(torch.bfloat16 if precision == "bf16" else torch.float32, (1120, 1536, 576))
    floor = operations(config, BATCH, WINDOW) / speed
    print(f"\n{precision}: matrix products at {speed / 1e9:.0f} GFLOP/s; floor {floor:.2f} s\n")
    print("| | step | spread | of PEFT | of the floor | extra memory | of PEFT | first loss |")
    print("|---|---|---|---|---|---|---|---|")
    for w, name in names.items():
        spread = (max(seconds[w]) - min(seconds[w])) / time_of[w] / 2
        print(f"| {name} | {time_of[w]:.2f} s | ±{spread:.0%} | {time_of[w] / time_of['peft']:.2f} | "
              f"{time_of[w] / floor:.2f} | {memory[w] / 2**20:.0f} MiB | {memory[w] / memory['peft']:.2f} | "
              f"{loss[w]:.5f} |", flush=True)  # fmt: skip
    claims = [("ctp", "peft", SLOWEST[precision]), ("ctp", "trainer", TRAINER[precision]),
              ("recompute", "ctp", RECOMPUTED), ("half", "ctp", WIDENED)]  # fmt: skip
    broken = [f"{precision}: {names[w]} takes {time_of[w] / time_of[p]:.2f} of {names[p]}'s time, not {most}"
              for w, p, most in claims if w in names and time_of[w] > most * time_of[p]]  # fmt: skip
    broken += [f"{precision}: {WAYS[w]} takes {memory[w] / memory['peft']:.2f} of PEFT's extra memory, not {most}"
               for w, most in LARGEST.items() if memory[w] > most * memory["peft"]]  # fmt: skip
    broken += [f"{precision}: the first loss is {loss[w]}, PEFT's {loss['peft']}" for w in ("ctp", "recompute")
               if abs(loss[w] / loss["peft"] - 1) > LOSS[precision]]  # fmt: skip
    return broken


def on_cpu(rounds: int, steps: int, precisions: list[str]) -> list[str]:
    from ctp.models.hf import quiet
    from ctp.models.load import load_model
    from ctp.models.sources import locate

    _, revision, location = locate("smollm2-135m")
    model, _ = load_model(location, revision, "float32", "cpu")
    print(f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads;", end=" ")
    print(", ".join(f"{n} {version(n)}" for n in ("torch", "transformers", "peft")), end="; ")
    print(f"SmolLM2-135M, {BATCH} x {WINDOW} tokens behind {K} rows; {rounds} rounds of {steps - 1} steps")
    with tempfile.TemporaryDirectory() as folder:
        with quiet():
            model.save_pretrained(folder)
        config = model.config
        del model
        return [x for p in precisions for x in table(p, folder, config, rounds, steps)]


def on_gpu(steps: int) -> list[str]:
    """Measure and print one GPU; returns the claims that do not hold."""
    speed = rate(torch.bfloat16, (8192, 8192, 8192), "cuda")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; {speed / 1e12:.0f} TFLOP/s of products; "
          f"LLaMA-7B's shape, {BATCH} x {GPU_WINDOW} tokens behind {K} rows, bf16; {steps - 1} steps")  # fmt: skip
    model = llama_7b()
    windows = torch.randint(model.config.vocab_size, (BATCH, GPU_WINDOW))
    floor, time_of, peak = operations(model.config, BATCH, GPU_WINDOW) / speed, {}, {}
    print("\n| | step | of the rate | of PEFT | peak memory | first loss |\n|---|---|---|---|---|---|")
    for way, name in GPU_WAYS.items():
        if way == "packed":
            pack_linears(model)
        seconds, loss, peak[way] = _on_gpu(way, model, windows, steps)
        time_of[way] = statistics.median(seconds[1:])
        of_rate, of_peft = f"{floor / time_of[way]:.0%}", f"{time_of[way] / time_of['peft']:.2f}"
        print(f"| {name} | {time_of[way]:.3f} s | {of_rate} | {of_peft} | {peak[way] / 2**30:.1f} GiB | {loss:.4f} |",
              flush=True)  # fmt: skip
    fastest = min(time_of["ctp"], time_of["recompute"])
    claims = [
        (f"{floor / fastest:.0%} of the rate, not {GPU_SHARE:.0%}", floor / fastest >= GPU_SHARE),
        (
            f"{fastest / time_of['peft']:.2f} of PEFT's time, not {GPU_OF_PEFT}",
            fastest <= GPU_OF_PEFT * time_of["peft"],
        ),
        *(
            (f"{GPU_WAYS[w]} takes {peak[w] / 2**30:.1f} GiB, not {most / 2**30:.0f}", peak[w] <= most)
            for w, most in GPU_MEMORY.items()
        ),
    ]
    return [text for text, holds in claims if not holds]


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


def _on_gpu(way: str, model: Any, windows: Tensor, steps: int) -> tuple[list[float], float, int]:
    """Seconds of each step, the first loss, and the peak of the GPU's memory in bytes."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    if way == "peft":
        seconds, loss = plain_loop(model, windows.cuda(), steps)
    else:
        seconds, loss = ours(model, windows, steps, "bf16", way != "ctp")
    return seconds, loss, torch.cuda.max_memory_allocated()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=4, help="of each process, the first of which is not counted")
    parser.add_argument(
        "--precision", nargs="+", choices=list(SLOWEST), help="default: fp32, and bf16 where it is fast"
    )
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        way, folder, precision = args.one
        print(json.dumps(one(way, folder, precision, args.steps)))
        return 0
    if args.device == "cuda":
        broken = on_gpu(args.steps)
    else:
        broken = on_cpu(args.rounds, args.steps, args.precision or (["fp32", "bf16"] if native() else ["fp32"]))
    print("\n" + ("\n".join(f"Does not hold: {b}." for b in broken) or "All claims hold."))
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
