"""Settings to compress with, and whether what was packed is the same model unpacked."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from ctp.cells import GPTQ, SparseGPT
from ctp.formats.checkpoint import open_checkpoint

SPECS = {
    "4bit": GPTQ(bits=4, group_size=16),
    "4bit-sym": GPTQ(bits=4, group_size=16, sym=True),
    "3bit-channel": GPTQ(bits=3),
    "2bit": GPTQ(bits=2, group_size=32),
    "8bit-sym": GPTQ(bits=8, sym=True),
    "static": GPTQ(bits=4, group_size=16, act_order=True, static_groups=True),
    "joint": SparseGPT(sparsity=0.5, bits=4),
}


def same_weights(a, b) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


def assert_opens(folder: Path) -> None:
    """The model in `folder`, unpacked by ctp, has the library's weights and gives the logits beside it.

    Weights are products of two numbers, the same bits on every processor: llm-compressor's are unpacked by its own
    library here, GPTQModel's are known by their logits alone. Logits are another processor's, rounded in half precision
    after every operation: they may be as far from the exact ones of these weights, in float64, as the logits computed
    here are. That distance hardly depends on the order of sums: over AVX-512, AVX2 and SSE the two differ by 10 %. The
    factor of 2 is for GPTQModel, which rounds scales to bfloat16 before it uses them; a zero point of a single group
    that is off by one adds 3 to 200 times the distance in float16.
    """
    model, expected = open_checkpoint(folder).model(), load_file(folder / "logits.safetensors")
    with torch.no_grad():
        if folder.name.startswith("llmcompressor"):
            theirs = AutoModelForCausalLM.from_pretrained(folder)
            theirs(expected["input_ids"])  # unpacks what is packed
            unpacked = theirs.state_dict()
            assert all(torch.equal(t, unpacked[n]) for n, t in model.state_dict().items())
        here = model(expected["input_ids"]).logits
        exact = model.double()(expected["input_ids"]).logits
    assert (expected["logits"] - exact).norm() <= 2 * (here - exact).norm()
