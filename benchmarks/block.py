"""Seconds to compress one block of LLaMA's shape, its Hessians given: ctp next to llm-compressor's functions.

    python -m benchmarks.block [--device cuda] [--threads N]

On a GPU the block is LLaMA-7B's (4096, 11008), on a CPU a quarter of it in each direction. Weights and inputs are
random and the same for both. ctp factorises a Hessian once for the linears that share it. Errors are the squared output
error over the squared output, the mean of the 7 linears. llm-compressor needs `make foreign`; without it its columns
are empty.
"""

import argparse
import os
import sys
import time
from typing import Any

import torch

from benchmarks.compression import python_of, rows_of
from benchmarks.peers.synthetic import block, error, wait
from benchmarks.report import environment, head, row
from ctp.cells import GPTQ, Solver, SparseGPT
from ctp.compression import solver

GRID: dict[str, Any] = {"bits": 4, "group_size": 128, "sym": True, "static_groups": True}
SPECS: dict[str, Solver] = {
    "sparsegpt": SparseGPT(sparsity=0.5),
    "gptq": GPTQ(**GRID),
    "joint": SparseGPT(sparsity=0.5, **GRID),
}
SHAPES = {"cuda": (4096, 11008), "cpu": (1024, 2816)}


def compress(spec: Solver, shape: tuple[int, int], device: str) -> tuple[float, float]:
    """(seconds, mean error) of a block."""
    groups = block(*shape, device)
    wait(device)
    begun = time.perf_counter()
    solved = []
    for hessian, weights in groups:
        inverse = solver.factorise(hessian, spec.damping, spec.act_order)
        solved.append([solver.solve(w, inverse, spec)[0] for w in weights])
    wait(device)
    seconds = time.perf_counter() - begun
    errors = [error(w, s, h) for (h, ws), ss in zip(groups, solved, strict=True) for w, s in zip(ws, ss, strict=True)]
    return seconds, sum(errors) / len(errors)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="default: all cores")
    args = parser.parse_args()
    shape = SHAPES[args.device]
    torch.set_num_threads(args.threads)
    with torch.no_grad():
        for spec in SPECS.values():  # kernels are compiled, or read from their caches, here
            compress(spec, (256, 512), args.device)
        mine = {name: compress(spec, shape, args.device) for name, spec in SPECS.items()}
    others: dict[str, Any] = {}
    if python_of("llmcompressor").exists():
        found = rows_of("llmcompressor", "block_llmcompressor.py", (*shape, args.device, args.threads), args.threads)
        others = {f["name"]: f for f in found}
    gpu = f"{torch.cuda.get_device_name()}, " if args.device == "cuda" else ""
    print(f"{gpu}{environment('torch')}; {args.threads} threads; hidden {shape[0]}, inner {shape[1]}, float32\n")
    print(head(["block", "ctp", "llm-compressor", "ctp / it", "error: ctp, llm-compressor"]))
    for name, (seconds, wrong) in mine.items():
        cells = ["-", "-", f"{wrong:.4f}, -"]
        if other := others.get(name):
            ratio = seconds / other["seconds"]
            cells = [f"{other['seconds']:.2f} s", f"{ratio:.2f}", f"{wrong:.4f}, {other['error']:.4f}"]
        print(row([name, f"{seconds:.2f} s", *cells]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
