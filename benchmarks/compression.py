"""Seconds and perplexity of ctp's compression next to llm-compressor and GPTQModel, all measured in one run.

    python -m benchmarks.compression [--rows NAME ... | all] [--threads N] [--windows N]

Needs `make foreign`: the peers run in environments of their own (benchmarks/peers), each by itself, on the same
model in float32, the same calibration tokens and as many threads. Timed is the compression call alone, without imports
and loading; ctp's includes packing, as GPTQModel's does. ctp's perplexity judges every result on the same windows.

Prints a markdown table; ratios are ctp over the peer, below 1 is better. Exit status 1 where ctp takes more than 0.6 of
a peer's seconds, or its perplexity is worse than the best peer's by more than 3 % (running the same code twice moves as
much); 2 where a peer is not installed.
"""

import argparse
import copy
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks.report import environment, head, row
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
Run = dict[str, Any]  # of a row: seconds, perplexity and, of ctp, sparsity and bits_per_weight


def run_ctp(model: nn.Module, row: Run, tokens: dict[str, Tensor]) -> Run:
    """ctp on a row."""
    compression = Compression.registry[row["method"]](**row["settings"])
    assert isinstance(compression, Solver)
    small = copy.deepcopy(model)
    begun = time.perf_counter()
    packed = pack(compress_model(small, tokens["calibration"].long(), compression))
    seconds = time.perf_counter() - begun
    ppl = perplexity(small, tokens["evaluation"].long()).ppl
    return {"seconds": seconds, "ppl": ppl, **stats(packed, {}, torch.float32)}


def rows_of(peer: str, script: str, args: Sequence[object], threads: int, folder: Path | None = None) -> list[Run]:
    """What a peer's script prints as "ROW {...}". Raises RuntimeError with the end of its output if it fails."""
    env = {**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": str(threads)}
    env["GPTQMODEL_CPU_WORKERS"] = str(max(2, threads))  # on two cores it starts one, and then asks for two
    command = [str(python_of(peer)), str(HERE / "peers" / script), *map(str, args)]
    done = subprocess.run(
        command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    if done.returncode:
        raise RuntimeError(f"{PEERS[peer]} failed (exit status {done.returncode}):\n{done.stdout[-3000:]}")
    return [json.loads(line.removeprefix("ROW ")) for line in done.stdout.splitlines() if line.startswith("ROW ")]


def run_peer(peer: str, model: nn.Module, folder: Path, row: Run, tokens: dict[str, Tensor], threads: int) -> Run:
    """A peer on a row."""
    job = {"model": str(folder), "tokens": str(TOKENS), "threads": threads, "batch": 4, "out": str(folder)}
    (folder / "job.json").write_text(json.dumps({**job, "rows": [row]}))
    (got,) = rows_of(peer, f"peer_{peer}.py", [folder / "job.json"], threads, folder)
    return {"seconds": got["seconds"], "ppl": judge(model, Path(got["weights"]), tokens["evaluation"].long())}


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


def line(given: Run, mine: Run, others: dict[str, Run], authors: bool) -> str:
    """One row of the table, in markdown; others: the peers' runs of this row."""
    settings = ", ".join(n if v is True else f"{n} {v}" for n, v in given["settings"].items())
    cells = [given["name"], f"{given['method']}: {settings}", f"{mine['seconds']:.1f}"]
    cells += [f"{others[p]['seconds']:.1f}" if p in others else "-" for p in PEERS]
    cells += [f"{mine['seconds'] / others[p]['seconds']:.2f}" if p in others else "-" for p in PEERS]
    cells += [number(mine["ppl"]), *(number(others[p]["ppl"]) if p in others else "-" for p in PEERS)]
    cells += [number(given["authors"]) if "authors" in given else "-"] * authors
    return row([*cells, f"{mine['sparsity']:.1%}", f"{mine['bits_per_weight']:.2f}"])


def broken(name: str, mine: Run, others: dict[str, Run], limits: dict[str, Any]) -> list[str]:
    """The claims that do not hold in a row."""
    ratios = {peer: mine["seconds"] / other["seconds"] for peer, other in others.items()}
    out = [f"{name}: {r:.2f} of {PEERS[p]}'s seconds" for p, r in ratios.items() if r > limits["seconds_ratio"]]
    best = min((o["ppl"] for o in others.values()), default=float("inf"))
    if mine["ppl"] > best * (1 + limits["tolerance"]):
        out.append(f"{name}: perplexity {number(mine['ppl'])} against {number(best)}")
    return out


def columns(authors: bool) -> list[str]:
    names = list(PEERS.values())
    ratios = [f"ctp / {n}" for n in names]
    perplexities = ["ctp ppl", *(f"{n} ppl" for n in names), *["authors ppl"] * authors]
    return ["row", "settings", "ctp s", *(f"{n} s" for n in names), *ratios, *perplexities, "zeros", "bits per weight"]


def warm_up() -> float:
    """Seconds until the kernels are compiled, or read from numba's cache: paid once a machine, once a process."""
    from ctp.compression.settle import Block
    from ctp.compression.solver import settle

    begun = time.perf_counter()
    settle(Block(torch.ones(4, 4), torch.eye(4), torch.ones(4, 4)))
    return time.perf_counter() - begun


def arguments(reference: dict[str, Any]) -> argparse.Namespace:
    names = [given["name"] for given in reference["rows"]]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=[*names, "all"], default=reference["default"], metavar="NAME",
                        help=f"{', '.join(names)}, or all (default: {', '.join(reference['default'])})")  # fmt: skip
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of everybody (default: all cores)")
    parser.add_argument("--windows", type=int, default=8, help="of the 64 to judge by (default 8)")
    args = parser.parse_args()
    if "all" in args.rows:
        args.rows = names
    missing = [PEERS[p] for p in PEERS if not python_of(p).exists()]
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
    rows = [given for given in reference["rows"] if given["name"] in args.rows]
    compiled = warm_up()
    print(environment("torch"), *(f"{PEERS[p]} {version_of(p)}" for p in PEERS), sep=", ", end="; ")
    print(f"{args.threads} threads, float32; judged on {args.windows} windows of 256 tokens;", end=" ")
    print(f"ctp's kernels were ready after {compiled:.1f} s, which are in no number below.\n")
    authors, wrong = args.windows == 64, []
    print(head(columns(authors)), flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with quiet():
            model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        for given in rows:
            peers = given.get("peers", ())
            # ctp between the peers: a machine's speed drifts within minutes.
            others = {p: run_peer(p, model, folder, given, tokens, args.threads) for p in peers[:1]}
            mine = run_ctp(model, given, tokens)
            others |= {p: run_peer(p, model, folder, given, tokens, args.threads) for p in peers[1:]}
            print(line(given, mine, others, authors), flush=True)
            wrong += broken(given["name"], mine, others, reference)
    claim = (
        f"At most {reference['seconds_ratio']} of each peer's seconds, perplexity within {reference['tolerance']:.0%}"
    )
    print(f"\n{claim} of the best peer's: {'; '.join(wrong) or 'holds in every row'}.")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
