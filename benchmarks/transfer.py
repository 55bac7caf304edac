"""Seconds of a transfer matrix in ctp, next to the plain loop: 6 prompts x 6 compressed targets x 3 texts.

    python -m benchmarks.transfer [--seq-len N] [--windows N] [--longer N ...] [--threads N]

The plain loop is what one writes with transformers: for each target and prompt load the target; for each text tokenise
it, put the prompt's embeddings in front of every window, run the model, take the cross entropy of the window's logits.
ctp's side is what the grid runs: its cells, in the order in which they are handed out, in one process on a local store.
Both take their turn target by target, in fp32, with the same stored targets, prompts, windows and batches.

Model: SmolLM2-135M. Targets: dense, and rounded to 4, 3, 2 bits or pruned by magnitude without calibration, because
only the time counts; they are stored as every target is. Prompts: k = 100 rows of the embedding drawn by seed. Texts:
three that come with packages.

Prints where the time goes, the ratio, and the largest relative difference of the summed log-likelihoods; then, for one
target and prompt, what windows of --longer tokens cost each side (the better of two). One run of each side; the spread
is that over the targets.
Exit status 1 where the ratio is above 0.35 or the difference above 1e-4.
"""

import argparse
import contextlib
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

import ctp
from benchmarks.matrix import BATCH, MODEL, Bench, K
from benchmarks.report import head, row, timed
from ctp.cells import Perplexity
from ctp.cells.cell import Evaluate
from ctp.evaluation import perplexity as measuring
from ctp.evaluation.perplexity import perplexity
from ctp.execution import jobs, loading
from ctp.execution.execute import execute
from ctp.machine.record import machine
from ctp.prompts.files import load_prompt
from ctp.prompts.prefix import prefix
from ctp.storage.ref import ref

LARGEST_RATIO, LARGEST_DIFFERENCE = 0.35, 1e-4
STEPS = ("load", "tokenise", "prefix", "windows")


# -------------------------------------------------------------------------- both sides


@dataclass
class Side:
    """One way of doing it: seconds of each step and each target, summed log-likelihoods by target, prompt and text."""

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STEPS, 0.0))
    targets: list[float] = field(default_factory=list)
    nll: dict[tuple[str, str, str], float] = field(default_factory=dict)

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Time what is done inside as one step."""
        begun = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - begun

    @contextlib.contextmanager
    def target(self) -> Iterator[None]:
        """Time what is done inside as one target."""
        begun = time.perf_counter()
        yield
        self.targets.append(time.perf_counter() - begun)

    def timed(self, name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        """`work`, its time taken as that of a step."""

        def inside(*args: Any, **options: Any) -> Any:
            with self.step(name):
                return work(*args, **options)

        return inside


def name_of(cell: Evaluate) -> tuple[str, str, str]:
    """Target, prompt, text."""
    assert cell.recovery is not None
    assert isinstance(cell.measure, Perplexity)
    return cell.target.compression.label, cell.recovery.recovery.label, cell.measure.text.dataset


# ------------------------------------------------------------------------------- ctp


@contextlib.contextmanager
def watched(side: Side) -> Iterator[None]:
    """Take the time of ctp's steps while its cells run as they always do."""
    places: list[tuple[Any, str, str]] = [
        (loading, "open_model", "load"),
        (jobs, "token_windows", "tokenise"),
        (loading, "prompt_prefix", "prefix"),
        (measuring, "perplexity", "windows"),
    ]
    before = [getattr(place, name) for place, name, _ in places]
    try:
        for (place, name, step), work in zip(places, before, strict=True):
            setattr(place, name, side.timed(step, work))
        yield
    finally:
        for (place, name, _), work in zip(places, before, strict=True):
            setattr(place, name, work)


def ours(bench: Bench, cells: list[Evaluate], side: Side) -> None:
    """The cells of one target, done as a worker does them."""
    with watched(side), side.target():
        for cell in cells:
            execute(cell, bench.store, bench.runtime, lambda event: None)
    for cell in cells:
        side.nll[name_of(cell)] = bench.store.manifest(ref(cell))["metrics"]["nll_sum"]


# ------------------------------------------------------------------------ the plain loop


def plain(bench: Bench, cells: list[Evaluate], side: Side) -> None:
    """The same cells, pair by pair."""
    pairs: dict[tuple[str, str], list[Evaluate]] = {}
    for cell in cells:
        pairs.setdefault(name_of(cell)[:2], []).append(cell)
    with side.target():
        for group in pairs.values():
            one_pair(bench, group, side)


def one_pair(bench: Bench, cells: list[Evaluate], side: Side) -> None:
    """A target and a prompt: load both, then tokenise and score each text."""
    first = cells[0]
    assert first.recovery is not None
    with side.step("load"):
        model, tokenizer = ctp.load(bench.place(first.target), device="cpu")
        prompt = load_prompt(bench.store.folder(ref(first.recovery)))
    for cell in cells:
        assert isinstance(cell.measure, Perplexity)
        text = cell.measure.text
        with side.step("tokenise"):
            whole = (text.join or "").join(bench.documents(text))
            ids = torch.tensor(tokenizer(whole, verbose=False)["input_ids"])
            windows = ids[: len(ids) // text.seq_len * text.seq_len].view(-1, text.seq_len)[: text.count]
        with side.step("windows"):
            side.nll[name_of(cell)] = concatenated(model, windows, prompt)


@torch.no_grad()
def concatenated(model: Any, windows: Tensor, prompt: Tensor) -> float:
    """Summed -log p of all but the first token of the windows (n, s), the prompt (k, d) before each."""
    total = 0.0
    for batch in windows.split(BATCH):
        tokens = model.get_input_embeddings()(batch)
        logits = model(inputs_embeds=torch.cat([prompt.expand(len(batch), -1, -1), tokens], dim=1)).logits
        predicting = logits[:, len(prompt) : -1].flatten(0, 1)
        total += F.cross_entropy(predicting, batch[:, 1:].flatten(), reduction="sum").item()
    return total


# --------------------------------------------------------------------------- the report


def table(plain_side: Side, our_side: Side) -> None:
    """Where the time goes, in markdown."""
    totals = [sum(s.targets) for s in (plain_side, our_side)]
    print(head(["seconds", *STEPS, "the rest", "all"]))
    for name, side, total in zip(("plain loop", "ctp"), (plain_side, our_side), totals, strict=True):
        cells = [*(side.seconds[s] for s in STEPS), total - sum(side.seconds.values()), total]
        print(row([name, *(f"{c:.1f}" for c in cells)]))


@torch.no_grad()
def longer(bench: Bench, cell: Evaluate, lengths: list[int]) -> None:
    """A batch of longer windows behind one prompt, each side; what is loaded and tokenised does not depend on it."""
    assert cell.recovery is not None
    model, tokenizer = ctp.load(bench.place(cell.target), device="cpu")
    prompt = load_prompt(bench.store.folder(ref(cell.recovery)))
    made = prefix(model, prompt)
    print(f"\nLonger windows, {BATCH} at a time, without loading and tokenising; ctp makes the prefix once a prompt:\n")
    print(head(["tokens", "plain loop", "ctp", "prefix", "ctp / plain loop"]))
    for length in lengths:
        windows = torch.randint(len(tokenizer), (BATCH, length), generator=torch.Generator().manual_seed(0))
        loop = min(timed(partial(concatenated, model, windows, prompt), 2))
        read = min(timed(partial(perplexity, model, windows, made, batch=BATCH), 2))
        first = min(timed(partial(prefix, model, prompt), 2))
        print(row([length, f"{loop:.2f} s", f"{read:.2f} s", f"{first:.2f} s", f"{read / loop:.2f}"]), flush=True)


def run(bench: Bench, lengths: list[int]) -> int:
    """Run both sides and print the comparison. Returns the exit status."""
    bench.prepare()
    sides, last = (Side(), Side()), None
    for number, cells in enumerate(bench.tasks()):
        for turn in (0, 1) if number % 2 else (1, 0):  # a drift of the machine's speed meets both alike
            (plain, ours)[turn](bench, cells, sides[turn])
        print(f"{cells[0].target.compression.label}: " + ", ".join(f"{s.targets[-1]:.1f} s" for s in sides), flush=True)
        last = cells[0]
    loading.forget()
    first, second = sides
    print()
    table(first, second)
    ratio = sum(second.targets) / sum(first.targets)
    each = [b / a for a, b in zip(first.targets, second.targets, strict=True)]
    assert first.nll.keys() == second.nll.keys()
    difference = max(abs(second.nll[n] / x - 1) for n, x in first.nll.items())
    print(f"\n{len(first.nll)} results; ratio {ratio:.3f} (by target {min(each):.3f} to {max(each):.3f}); ", end="")
    print(f"largest relative difference {difference:.1e}", flush=True)
    if lengths and last is not None:
        longer(bench, last, lengths)
    good = ratio <= LARGEST_RATIO and math.isfinite(difference) and difference <= LARGEST_DIFFERENCE
    print(
        f"\n{'Within' if good else 'NOT within'} a ratio of {LARGEST_RATIO} and a difference of {LARGEST_DIFFERENCE}."
    )
    return 0 if good else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seq-len", type=int, default=32, help="tokens of a window (default 32)")
    parser.add_argument("--windows", type=int, default=4, help="windows of each text (default 4)")
    parser.add_argument("--longer", type=int, nargs="*", default=[256], help="also these lengths")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads of torch (default: all)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory(prefix="ctp-transfer-") as folder:
        bench = Bench(Path(folder), args.seq_len, args.windows)
        about = machine()
        texts = sorted({name_of(c)[2] for cells in bench.tasks() for c in cells})
        print(f"{about['cpu']}, {about['threads']} threads; torch {torch.__version__}, "
              f"transformers {transformers.__version__}; {MODEL}, k = {K}, {args.windows} windows of {args.seq_len} "
              f"tokens of each of {', '.join(texts)}, {BATCH} at a time, fp32.\n"
              "Seconds by target, plain loop and ctp:", flush=True)  # fmt: skip
        return run(bench, args.longer)


if __name__ == "__main__":
    sys.exit(main())
