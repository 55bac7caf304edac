"""One step of learning a soft prompt: time and memory, next to PEFT with a plain loop and with Hugging Face's Trainer.

    python -m benchmarks.learning [--steps N] [--precision fp32 bf16]
    python -m benchmarks.learning --device cuda

On a CPU: SmolLM2-135M, 4 windows of 256 tokens behind 100 rows, AdamW; the same weights, rows, tokens and scored tokens
for all, each in a process of its own. Time is the median of all steps but the first, extra memory the largest resident
size during the steps over that before them. The floor is the time that the matrix products alone would take: those of
frozen linears for every position once (the prompt's once a batch) and of the head for scored positions, forward and for
the inputs' gradient, at the rate measured here. bf16 is measured where the CPU multiplies it fast; elsewhere one more
row has a model stored in bfloat16, which is computed in float32.

On a GPU: a model of LLaMA-7B's shape with random weights, bfloat16, 4 windows of 1,024 tokens behind 100 rows,
next to PEFT with a plain loop: share of the card's measured rate of matrix products, and peak memory.

Exit status 1 where a claim does not hold.
"""

import argparse
import gc
import importlib
import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.report import environment, head, row, timed
from benchmarks.steps import K, llama_7b, pack_linears, steps_of
from ctp.machine.arithmetic import computed_in

BATCH, WINDOW = 4, 256
TOKENS = Path(__file__).with_name("smollm2_wikitext2_256.safetensors")
WAYS = {"peft": "PEFT, plain loop", "trainer": "PEFT, HF Trainer", "ctp": "ctp", "recompute": "ctp, recomputing"}
HALF = {"half": "ctp, stored in bf16"}  # where bf16 is computed in float32
NAMES = WAYS | HALF | {"packed": "ctp, recomputing, 4-bit weights packed"}
SLOWEST = {"fp32": 0.75, "bf16": 1.0}  # of the time of PEFT's plain loop
TRAINER = {"fp32": 0.85, "bf16": 1.0}  # of the Trainer's, which is now faster than the loop and now slower
RECOMPUTED = 1.35  # of the time without
LARGEST = {"ctp": 0.4, "recompute": 0.2}  # of PEFT's extra memory
WIDENED = 1.3  # a model stored in bf16, computed in float32: of the time of one stored in float32
LOSS = {"fp32": 1e-5, "bf16": 5e-3}  # relative, of the first step
GPU_WINDOW = 1024
GPU_WAYS = ("peft", "ctp", "recompute", "packed")
GPU_SHARE, GPU_OF_PEFT = 0.5, 0.85  # of the rate of matrix products, of the time of PEFT's plain loop
GPU_MEMORY = {"recompute": 24 * 2**30, "packed": 12 * 2**30}


@dataclass(frozen=True)
class Measured:
    """A way of learning: seconds of each step but the first, extra memory in bytes, the first step's loss."""

    seconds: list[float]
    memory: int
    loss: float

    @property
    def step(self) -> float:
        return statistics.median(self.seconds)


def resident(name: str = "VmRSS") -> int:
    """Bytes of this process in memory; VmHWM: the most since its peak was cleared."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name))
    return 1024 * int(line.split()[1])


def one(way: str, folder: str, precision: str, steps: int) -> Measured:
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
    Path("/proc/self/clear_refs").write_text("5")  # the peak is measured from here
    before = resident()
    seconds, loss = steps_of(way, model, windows, steps, precision)
    return Measured(seconds, resident("VmHWM") - before, loss)


# ------------------------------------------------------------------------ the table


def rate(dtype: torch.dtype, shape: tuple[int, int, int], device: str = "cpu") -> float:
    """Operations a second of a matrix product (m, n, k)."""
    m, n, k = shape
    a, b = torch.randn(m, k, device=device).to(dtype), torch.randn(n, k, device=device).to(dtype)
    return 2 * m * n * k / min(timed(lambda: a @ b.T, 30, device))


def operations(config: Any, b: int, s: int) -> float:
    """Of a step's matrix products without attention: 2 a weight and position, forward and for the inputs' gradient."""
    width, inner, kv = config.hidden_size, config.intermediate_size, config.num_key_value_heads * config.head_dim
    block = 2 * width * width + 2 * width * kv + 3 * width * inner
    return 2 * 2 * (config.num_hidden_layers * block * (K + b * (s - 1)) + config.vocab_size * width * b * (s - 1))


def native() -> bool:
    """Does this CPU multiply bfloat16 fast?"""
    return computed_in("bfloat16", "cpu") == "bfloat16"


def child(way: str, folder: str, precision: str, steps: int) -> Measured:
    """`one` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.learning", "--one", way, folder, precision, "--steps", str(steps)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise RuntimeError(f"{way}, {precision}: {ended.stderr[-2000:]}")
    return Measured(**json.loads(ended.stdout.splitlines()[-1]))


def table(ways: dict[str, Measured], floor: float) -> None:
    """Print what one precision took next to PEFT's plain loop and to the floor, in seconds."""
    peft = ways["peft"]
    print(head(["", "step", "spread", "of PEFT", "of the floor", "extra memory", "of PEFT", "first loss"]))
    for way, m in ways.items():
        spread = (max(m.seconds) - min(m.seconds)) / m.step / 2
        print(row([NAMES[way], f"{m.step:.2f} s", f"±{spread:.0%}", f"{m.step / peft.step:.2f}",
                   f"{m.step / floor:.2f}", f"{m.memory / 2**20:.0f} MiB", f"{m.memory / peft.memory:.2f}",
                   f"{m.loss:.5f}"]), flush=True)  # fmt: skip


def broken(precision: str, ways: dict[str, Measured]) -> list[str]:
    """The claims that do not hold."""
    peft, out = ways["peft"], []
    for way, other, most in (("ctp", "peft", SLOWEST[precision]), ("ctp", "trainer", TRAINER[precision]),
                             ("recompute", "ctp", RECOMPUTED), ("half", "ctp", WIDENED)):  # fmt: skip
        if way in ways and (share := ways[way].step / ways[other].step) > most:
            out.append(f"{NAMES[way]} takes {share:.2f} of {NAMES[other]}'s time, not {most}")
    for way, most in LARGEST.items():
        if (share := ways[way].memory / peft.memory) > most:
            out.append(f"{NAMES[way]} takes {share:.2f} of PEFT's extra memory, not {most}")
        if abs(ways[way].loss / peft.loss - 1) > LOSS[precision]:
            out.append(f"the first loss of {NAMES[way]} is {ways[way].loss}, PEFT's {peft.loss}")
    return [f"{precision}: {claim}" for claim in out]


def on_cpu(steps: int, precisions: list[str]) -> list[str]:
    from ctp.models.hf import quiet
    from ctp.models.load import load_model
    from ctp.models.sources import locate

    _, revision, location = locate("smollm2-135m")
    model, _ = load_model(location, revision, "float32", "cpu")
    print(environment("torch", "transformers", "peft"), f"{torch.get_num_threads()} threads", sep=", ", end="; ")
    print(f"SmolLM2-135M, {BATCH} x {WINDOW} tokens behind {K} rows; {steps - 1} steps")
    with tempfile.TemporaryDirectory() as folder:
        with quiet():
            model.save_pretrained(folder)
        config, claims = model.config, []
        del model
        for precision in precisions:
            names = [*WAYS, *(HALF if precision == "fp32" and not native() else ())]
            ways = {way: child(way, folder, precision, steps) for way in names}
            speed = rate(torch.bfloat16 if precision == "bf16" else torch.float32, (1120, 1536, 576))
            floor = operations(config, BATCH, WINDOW) / speed
            print(f"\n{precision}: matrix products at {speed / 1e9:.0f} GFLOP/s; floor {floor:.2f} s\n")
            table(ways, floor)
            claims += broken(precision, ways)
        return claims


def on_gpu(steps: int) -> list[str]:
    """Measure and print one GPU; returns the claims that do not hold."""
    speed = rate(torch.bfloat16, (8192, 8192, 8192), "cuda")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; {speed / 1e12:.0f} TFLOP/s of products; "
          f"LLaMA-7B's shape, {BATCH} x {GPU_WINDOW} tokens behind {K} rows, bf16; {steps - 1} steps")  # fmt: skip
    model = llama_7b()
    windows = torch.randint(model.config.vocab_size, (BATCH, GPU_WINDOW))
    floor, time_of, peak = operations(model.config, BATCH, GPU_WINDOW) / speed, {}, {}
    print("\n" + head(["", "step", "of the rate", "of PEFT", "peak memory", "first loss"]))
    for way in GPU_WAYS:
        if way == "packed":
            pack_linears(model)
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        seconds, loss = steps_of(way, model, windows.cuda() if way == "peft" else windows, steps, "bf16")
        peak[way], time_of[way] = torch.cuda.max_memory_allocated(), statistics.median(seconds)
        of_rate, of_peft = f"{floor / time_of[way]:.0%}", f"{time_of[way] / time_of['peft']:.2f}"
        memory = f"{peak[way] / 2**30:.1f} GiB"
        print(row([NAMES[way], f"{time_of[way]:.3f} s", of_rate, of_peft, memory, f"{loss:.4f}"]), flush=True)
    fastest = min(time_of["ctp"], time_of["recompute"])
    claims = [f"{NAMES[w]} takes {peak[w] / 2**30:.1f} GiB, not {most / 2**30:.0f}"
              for w, most in GPU_MEMORY.items() if peak[w] > most]  # fmt: skip
    if floor / fastest < GPU_SHARE:
        claims.append(f"{floor / fastest:.0%} of the rate, not {GPU_SHARE:.0%}")
    if fastest > GPU_OF_PEFT * time_of["peft"]:
        claims.append(f"{fastest / time_of['peft']:.2f} of PEFT's time, not {GPU_OF_PEFT}")
    return claims


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--steps", type=int, default=4, help="of each process, the first of which is not counted")
    parser.add_argument(
        "--precision", nargs="+", choices=list(SLOWEST), help="default: fp32, and bf16 where it is fast"
    )
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        way, folder, precision = args.one
        print(json.dumps(asdict(one(way, folder, precision, args.steps))))
        return 0
    precisions = args.precision or (["fp32", "bf16"] if native() else ["fp32"])
    claims = on_gpu(args.steps) if args.device == "cuda" else on_cpu(args.steps, precisions)
    print("\n" + ("\n".join(f"Does not hold: {c}." for c in claims) or "All claims hold."))
    return 1 if claims else 0


if __name__ == "__main__":
    sys.exit(main())
