"""llm-compressor's solver functions on the block of synthetic.py; runs in its environment (`make foreign`).

    python block_llmcompressor.py HIDDEN INNER DEVICE THREADS

Prints "ROW {name, seconds, error}" for sparsegpt and gptq; the mean error over the linears. Its joint mode loses the
mask and is left out. Hessians and weights are there before the clock starts.
"""

import json
import sys
import time

import torch
from compressed_tensors.quantization import QuantizationArgs
from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight
from llmcompressor.modifiers.pruning.sparsegpt.sgpt_sparsify import sparsify_weight
from synthetic import block, error, wait
from torch import Tensor

GROUP = 128
QUANTIZE = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=GROUP)


def gptq(weight: Tensor, hessian: Tensor) -> Tensor:
    """4 bits, symmetric, groups of 128."""
    scale = weight.unflatten(1, (-1, GROUP)).abs().amax(2) / 7.5
    zero = torch.zeros_like(scale, dtype=torch.int8)
    return quantize_weight(weight[None].clone(), hessian[None].clone(), scale[None], zero[None], None, QUANTIZE)[0][0]


def sparsegpt(weight: Tensor, hessian: Tensor) -> Tensor:
    """50 %."""
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = torch.nn.Parameter(weight, requires_grad=False)
    return sparsify_weight(linear, {linear: hessian.clone()}, 0.5, 0, 0, 128, 0.01, False)[1]


def main(hidden: int, inner: int, device: str, threads: int) -> None:
    torch.set_num_threads(threads)
    for name, solver in (("sparsegpt", sparsegpt), ("gptq", gptq)):
        with torch.no_grad():
            for hessian, weights in block(256, 512, device):  # what is compiled or set up once is paid here
                solver(weights[0], hessian)
            groups = block(hidden, inner, device)
            wait(device)
            begun = time.perf_counter()
            solved = [[solver(w, hessian) for w in weights] for hessian, weights in groups]
            wait(device)
            seconds = time.perf_counter() - begun
            errors = [
                error(w, s, h) for (h, ws), ss in zip(groups, solved, strict=True) for w, s in zip(ws, ss, strict=True)
            ]
        print("ROW " + json.dumps({"name": name, "seconds": seconds, "error": sum(errors) / len(errors)}), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
