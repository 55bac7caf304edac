"""Perplexity and seconds of ctp's compression next to other people's code, at equal settings on the same token ids.

    python -m benchmarks.compression [--rows NAME ...] [--plain] [--threads N]

Prints a markdown table; `ratio` is ctp over the best reference, below 1 is better. ctp fits the scales anew when all
codes are settled; --plain leaves that out, and the algorithms are the papers' to the letter. Exit status 1 if any row
is worse than the best reference by more than 3 %: running the same code twice moves as much. The references and how
they were measured are in compression_reference.yaml.
"""

import argparse
import copy
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from safetensors.torch import load_file
from torch import Tensor, nn

from ctp.compression import compress_model, pack, stats
from ctp.evaluate.perplexity import perplexity
from ctp.methods import Compression, Solver
from ctp.models import load, locate

TOKENS = Path(__file__).with_name("smollm2_wikitext2_256.safetensors")
REFERENCE = Path(__file__).with_name("compression_reference.yaml")
HEAD = "| row | settings | ctp | authors | llm-compressor | GPTQModel | ratio | zeros | bits per weight | seconds |"


def measure(model: nn.Module, row: dict[str, Any], tokens: dict[str, Tensor], plain: bool) -> dict[str, float]:
    """Compresses a copy of the model as the row says: perplexity, seconds of compression, zeros, bits per weight."""
    quantizes = row["method"] == "gptq" or "bits" in row["settings"]
    settings = {**row["settings"], "refit": False} if plain and quantizes else row["settings"]
    compression = Compression.registry[row["method"]](**settings)
    assert isinstance(compression, Solver)
    model = copy.deepcopy(model)
    start = time.perf_counter()
    layers = compress_model(model, tokens["calibration"].long(), compression)
    seconds = time.perf_counter() - start
    ppl = perplexity(model, tokens["evaluation"].long()).ppl
    return {"ppl": ppl, "seconds": seconds, **stats(pack(layers), {}, torch.float32)}


def best(row: dict[str, Any], columns: dict[str, str]) -> float | None:
    """The least reference perplexity of a row, None where no reference has these settings."""
    return min((row[c] for c in columns if c in row), default=None)


def line(row: dict[str, Any], got: dict[str, float], columns: dict[str, str]) -> str:
    """One row of the table, in markdown."""

    def number(x: float | None) -> str:
        return "-" if x is None else f"{x:.1e}" if x >= 1e4 else f"{x:.1f}"

    reference = best(row, columns)
    settings = ", ".join(n if v is True else f"{n} {v}" for n, v in row["settings"].items())
    ratio = "-" if reference is None else f"{got['ppl'] / reference:.3f}"
    cells = [row["name"], f"{row['method']}: {settings}", number(got["ppl"]), *(number(row.get(c)) for c in columns)]
    cells += [ratio, f"{got['sparsity']:.1%}", f"{got['bits_per_weight']:.2f}", f"{got['seconds']:.0f}"]
    return f"| {' | '.join(cells)} |"


def main() -> int:
    reference = yaml.safe_load(REFERENCE.read_text())
    names = [row["name"] for row in reference["rows"]]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plain", action="store_true", help="without refitting the scales")
    parser.add_argument("--rows", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch (default 1)")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    _, revision, location = locate("smollm2-135m")
    model, _ = load(location, revision, "float32", device)
    tokens = load_file(TOKENS)
    dense = perplexity(model, tokens["evaluation"].long()).ppl
    print(f"{platform.machine()}, {device}, {args.threads} threads; torch {torch.__version__}", end=", ")
    print(f"transformers {transformers.__version__}; dense {dense:.2f}. References: ", end="")
    print("; ".join(f"{v}, {reference['seconds'][n]} s" for n, v in reference["columns"].items()), end=" ")
    print(
        f"(one thread, plain settings; {reference['machine']})",
        end=f".\n\n{HEAD}\n|{'---|' * (HEAD.count('|') - 1)}\n",
        flush=True,
    )
    worse = []
    for row in reference["rows"]:
        if row["name"] not in args.rows:
            continue
        got = measure(model, row, tokens, args.plain)
        print(line(row, got, reference["columns"]), flush=True)
        limit = best(row, reference["columns"])
        if limit is not None and got["ppl"] > limit * (1 + reference["tolerance"]):
            worse.append(row["name"])
    print(f"\nWorse than the best reference by more than {reference['tolerance']:.0%}: {', '.join(worse) or 'none'}.")
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
