"""Seconds and perplexity of ctp's compression next to llm-compressor and GPTQModel, all measured in one run.

    python -m benchmarks.compression [--rows NAME ... | all] [--plain] [--threads N] [--windows N] [--repeats N]

Needs `make foreign`: the peers run in environments of their own (benchmarks/peers), each by itself, on the same
model in float32, the same calibration tokens and as many threads. Timed is the compression call alone, without imports
and loading; ctp's includes packing, as GPTQModel's does. ctp's perplexity judges every result on the same windows.

Prints a markdown table; ratios are ctp over the peer, below 1 is better. ctp fits the scales anew when all codes are
settled; --plain leaves that out, and the algorithms are the papers' to the letter. Exit status 1 where ctp takes more
than 0.6 of a peer's seconds, or its perplexity is worse than the best peer's by more than 3 % (running the same code
twice moves as much); 2 where a peer is not installed.
"""

import argparse
import copy
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor, nn

from ctp.cells import Compression, Solver
from ctp.compression.walk import compress_model
from ctp.evaluation.perplexity import perplexity
from ctp.formats.checkpoint import open_checkpoint
from ctp.formats.pack import pack, stats
from ctp.models.hf import quiet
from ctp.models.load import load_model
from ctp.models.sources import locate

HERE = Path(__file__).parent
TOKENS = HERE / "smollm2_wikitext2_256.safetensors"
REFERENCE = HERE / "compression_reference.yaml"
PEERS = {"llmcompressor": "llm-compressor", "gptqmodel": "GPTQModel"}
Run = dict[str, Any]


def spec(row: dict[str, Any], plain: bool) -> Solver:
    """What ctp is asked for in a row."""
    quantizes = row["method"] == "gptq" or "bits" in row["settings"]
    settings = {**row["settings"], "refit": False} if plain and quantizes else row["settings"]
    compression = Compression.registry[row["method"]](**settings)
    assert isinstance(compression, Solver)
    return compression


def run_ctp(model: nn.Module, row: dict[str, Any], tokens: dict[str, Tensor], args: argparse.Namespace) -> Run:
    """ctp on a row: seconds (a list), perplexity, zeros, bits per weight."""
    seconds = []
    for _ in range(args.repeats):
        small = copy.deepcopy(model)
        begun = time.perf_counter()
        packed = pack(compress_model(small, tokens["calibration"].long(), spec(row, args.plain)))
        seconds.append(time.perf_counter() - begun)
    ppl = perplexity(small, tokens["evaluation"].long()).ppl
    return {"seconds": seconds, "ppl": ppl, **stats(packed, {}, torch.float32)}


def run_peer(
    peer: str, model: nn.Module, folder: Path, row: dict[str, Any], tokens: dict[str, Tensor], args: argparse.Namespace
) -> Run:
    """A peer on a row: seconds (a list), perplexity. Raises RuntimeError with the end of what it said if it fails."""
    job = {"model": str(folder), "tokens": str(TOKENS), "threads": args.threads, "batch": 4, "out": str(folder)}
    (folder / "job.json").write_text(json.dumps({**job, "rows": [row] * args.repeats}))
    env = {**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": str(args.threads)}
    env["GPTQMODEL_CPU_WORKERS"] = str(max(2, args.threads))  # on two cores it starts one, and then asks for two
    command = [str(python_of(peer)), str(HERE / "peers" / f"peer_{peer}.py"), str(folder / "job.json")]
    done = subprocess.run(
        command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    got = [json.loads(line.removeprefix("ROW ")) for line in done.stdout.splitlines() if line.startswith("ROW ")]
    if done.returncode or len(got) != args.repeats:
        raise RuntimeError(f"{PEERS[peer]} failed (exit status {done.returncode}):\n{done.stdout[-3000:]}")
    ppl = judge(model, Path(got[-1]["weights"]), tokens["evaluation"].long())
    return {"seconds": [g["seconds"] for g in got], "ppl": ppl}


def version_of(peer: str) -> str:
    code = f"from importlib.metadata import version; print(version({peer!r}))"
    return subprocess.run([str(python_of(peer)), "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def python_of(peer: str) -> Path:
    """The interpreter of a peer's environment."""
    return HERE.parent / ".foreign" / peer / "bin" / "python"


def judge(model: nn.Module, weights: Path, windows: Tensor) -> float:
    """Perplexity of the model with a peer's weights, a file of dense ones or a checkpoint that ctp reads.

    Raises ValueError where a linear is missing or unknown.
    """
    if weights.is_dir():
        return perplexity(open_checkpoint(weights, "float32").model(), windows).ppl
    small, found = copy.deepcopy(model), load_file(weights)
    linears = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}
    if found.keys() != linears:
        raise ValueError(f"{weights.name}: not the linears of the model: {sorted(found.keys() ^ linears)[:3]}")
    small.load_state_dict(found, strict=False)
    return perplexity(small, windows).ppl


def number(x: float) -> str:
    return f"{x:.1e}" if x >= 1e4 else f"{x:.1f}"


def middle(seconds: list[float]) -> str:
    """The median, and the spread of several."""
    spread = f" ({min(seconds):.1f}-{max(seconds):.1f})" if len(seconds) > 1 else ""
    return f"{statistics.median(seconds):.1f}{spread}"


def line(row: dict[str, Any], mine: dict[str, Any], others: dict[str, dict[str, Any]], authors: bool) -> str:
    """One row of the table, in markdown; others: the peers' runs of this row."""
    settings = ", ".join(n if v is True else f"{n} {v}" for n, v in row["settings"].items())
    cells = [row["name"], f"{row['method']}: {settings}", middle(mine["seconds"])]
    cells += [middle(others[p]["seconds"]) if p in others else "-" for p in PEERS]
    cells += [f"{ratio(mine, others[p]):.2f}" if p in others else "-" for p in PEERS]
    cells += [number(mine["ppl"]), *(number(others[p]["ppl"]) if p in others else "-" for p in PEERS)]
    cells += [number(row["authors"]) if "authors" in row else "-"] * authors
    cells += [f"{mine['sparsity']:.1%}", f"{mine['bits_per_weight']:.2f}"]
    return f"| {' | '.join(cells)} |"


def ratio(mine: dict[str, Any], other: dict[str, Any]) -> float:
    """ctp's median seconds over another's."""
    return statistics.median(mine["seconds"]) / statistics.median(other["seconds"])


def broken(name: str, mine: dict[str, Any], others: dict[str, dict[str, Any]], limits: dict[str, Any]) -> list[str]:
    """The claims that do not hold in a row."""
    out = [
        f"{name}: {ratio(mine, other):.2f} of {PEERS[peer]}'s seconds"
        for peer, other in others.items()
        if ratio(mine, other) > limits["seconds_ratio"]
    ]
    best = min((o["ppl"] for o in others.values()), default=float("inf"))
    if mine["ppl"] > best * (1 + limits["tolerance"]):
        out.append(f"{name}: perplexity {number(mine['ppl'])} against {number(best)}")
    return out


def head(authors: bool) -> str:
    names = list(PEERS.values())
    cells = ["row", "settings", "ctp s", *(f"{n} s" for n in names), *(f"ctp / {n}" for n in names), "ctp ppl"]
    cells += [*(f"{n} ppl" for n in names), *["authors ppl"] * authors, "zeros", "bits per weight"]
    return f"| {' | '.join(cells)} |\n|{'---|' * len(cells)}"


def warm_up(model: nn.Module, tokens: dict[str, Tensor]) -> float:
    """Seconds until the kernels are compiled, or read from numba's cache: paid once a machine, once a process."""
    from ctp.compression.settle import Block
    from ctp.compression.solver import settle

    begun = time.perf_counter()
    settle(Block(torch.ones(4, 4), torch.eye(4), torch.ones(4, 4)))
    return time.perf_counter() - begun


def arguments(reference: dict[str, Any]) -> argparse.Namespace:
    names = [row["name"] for row in reference["rows"]]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plain", action="store_true", help="without refitting the scales")
    parser.add_argument("--rows", nargs="+", choices=[*names, "all"], default=reference["default"], metavar="NAME",
                        help=f"{', '.join(names)}, or all (default: {', '.join(reference['default'])})")  # fmt: skip
    parser.add_argument("--peers", nargs="*", choices=list(PEERS), default=list(PEERS), help="default: both")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of everybody (default: all cores)")
    parser.add_argument("--windows", type=int, default=8, help="of the 64 to judge by (default 8)")
    parser.add_argument("--repeats", type=int, default=1, help="timings of each (default 1)")
    args = parser.parse_args()
    if "all" in args.rows:
        args.rows = names
    missing = [PEERS[p] for p in args.peers if not python_of(p).exists()]
    if missing:
        parser.error(f"{' and '.join(missing)} not installed beside the project: make foreign")
    return args


def main() -> int:
    reference = yaml.safe_load(REFERENCE.read_text())
    args = arguments(reference)
    torch.set_num_threads(args.threads)
    _, revision, location = locate("smollm2-135m")
    model, tokenizer = load_model(location, revision, "float32", "cpu")
    tokens = load_file(TOKENS)
    tokens["evaluation"] = tokens["evaluation"][: args.windows]
    rows = [row for row in reference["rows"] if row["name"] in args.rows]
    compiled = warm_up(model, tokens)
    versions = [f"{PEERS[p]} {version_of(p)}" for p in args.peers]
    print(f"{platform.machine()}, {os.cpu_count()} cores, {args.threads} threads, float32", end="; ")
    print(f"torch {torch.__version__}", *versions, sep=", ", end=f"; judged on {args.windows} windows of 256 tokens; ")
    print(f"ctp's kernels were ready after {compiled:.1f} s, which are in no number below.\n")
    authors, wrong = args.windows == 64, []
    print(head(authors), flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with quiet():
            model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        for row in rows:
            who = [p for p in args.peers if p in row.get("peers", ())]
            # ctp between the peers: a machine's speed drifts within minutes.
            others = {p: run_peer(p, model, folder, row, tokens, args) for p in who[:1]}
            mine = run_ctp(model, row, tokens, args)
            others |= {p: run_peer(p, model, folder, row, tokens, args) for p in who[1:]}
            print(line(row, mine, others, authors), flush=True)
            wrong += broken(row["name"], mine, others, reference)
    claim = (
        f"At most {reference['seconds_ratio']} of each peer's seconds, perplexity within {reference['tolerance']:.0%}"
    )
    print(f"\n{claim} of the best peer's: {'; '.join(wrong) or 'holds in every row'}.")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
