"""Seconds to compress one block of LLaMA's shape, its Hessians given: ctp, its plain loop, llm-compressor's functions.

    python -m benchmarks.block [--device cuda] [--hidden N] [--inner N] [--threads N] [--no-loop]

On a GPU the block is LLaMA-7B's (4096, 11008), on a CPU a quarter of it in each direction unless told otherwise.
Weights and inputs are random and the same for all. ctp factorises a Hessian once for the linears that share it. Errors
are the squared output error over the squared output, the mean of the 7 linears. llm-compressor needs `make foreign`;
without it its columns are empty.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from typing import Any

import torch

from benchmarks.compression import HERE, python_of
from benchmarks.peers.synthetic import block, error, wait
from ctp.cells import GPTQ, Solver, SparseGPT
from ctp.compression import solver
from ctp.compression.settle import settle_loop
from ctp.compression.solver import settle

GRID: dict[str, Any] = {"bits": 4, "group_size": 128, "sym": True, "static_groups": True}
SPECS: dict[str, Solver] = {
    "sparsegpt": SparseGPT(sparsity=0.5),
    "gptq": GPTQ(**GRID),
    "joint": SparseGPT(sparsity=0.5, **GRID),
}
LARGE, SMALL = (4096, 11008), (1024, 2816)


def compress(spec: Solver, shape: tuple[int, int], device: str, loop: bool) -> tuple[float, float]:
    """(seconds, mean error) of a block; loop: columns by the plain torch loop."""
    groups = block(*shape, device)
    solver.settle = settle_loop if loop else settle
    wait(device)
    begun = time.perf_counter()
    solved = []
    for hessian, weights in groups:
        inverse = solver.factorise(hessian, spec.damping, spec.act_order)
        solved.append([solver.solve(w, inverse, spec)[0] for w in weights])
    wait(device)
    seconds = time.perf_counter() - begun
    solver.settle = settle
    errors = [error(w, s, h) for (h, ws), ss in zip(groups, solved, strict=True) for w, s in zip(ws, ss, strict=True)]
    return seconds, sum(errors) / len(errors)


def peer(shape: tuple[int, int], device: str, threads: int) -> dict[str, Any]:
    """llm-compressor's rows by name, empty where it is not installed. Raises RuntimeError where it fails."""
    python = python_of("llmcompressor")
    if not python.exists():
        return {}
    command = [str(python), str(HERE / "peers" / "block_llmcompressor.py"), *map(str, (*shape, device, threads))]
    env = {**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode:
        raise RuntimeError(f"llm-compressor failed:\n{done.stderr[-3000:]}")
    rows = [json.loads(line.removeprefix("ROW ")) for line in done.stdout.splitlines() if line.startswith("ROW ")]
    return {row["name"]: row for row in rows}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--hidden", type=int, help="width of the block")
    parser.add_argument("--inner", type=int, help="width inside its MLP")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="default: all cores")
    parser.add_argument("--no-loop", action="store_true", help="leave the plain loop out")
    args = parser.parse_args()
    default = LARGE if args.device == "cuda" else SMALL
    shape = (args.hidden or default[0], args.inner or default[1])
    torch.set_num_threads(args.threads)
    with torch.no_grad():
        for spec in SPECS.values():  # kernels are compiled, or read from their caches, here
            compress(spec, (256, 512), args.device, False)
        mine = {name: compress(spec, shape, args.device, False) for name, spec in SPECS.items()}
        plain = {} if args.no_loop else {n: compress(spec, shape, args.device, True) for n, spec in SPECS.items()}
    others = peer(shape, args.device, args.threads)
    where = torch.cuda.get_device_name() if args.device == "cuda" else f"{platform.machine()}, {args.threads} threads"
    print(f"{where}; torch {torch.__version__}; hidden {shape[0]}, inner {shape[1]}, float32\n")
    print("| block | ctp s | plain loop s | llm-compressor s | ctp / loop | ctp / llm-compressor | ctp error | "
          f"loop error | llm-compressor error |\n|{'---|' * 9}")  # fmt: skip
    for name, (seconds, wrong) in mine.items():
        loop, other = plain.get(name), others.get(name)
        cells = [name, f"{seconds:.2f}", f"{loop[0]:.2f}" if loop else "-", f"{other['seconds']:.2f}" if other else "-"]
        cells += [f"{seconds / loop[0]:.2f}" if loop else "-", f"{seconds / other['seconds']:.2f}" if other else "-"]
        cells += [f"{wrong:.4f}", f"{loop[1]:.4f}" if loop else "-", f"{other['error']:.4f}" if other else "-"]
        print(f"| {' | '.join(cells)} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
