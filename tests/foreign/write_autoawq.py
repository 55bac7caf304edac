"""A checkpoint by AutoAWQ's own linear, with the logits that it gives: what ctp reads must mean the same.

    python write_autoawq.py BASE OUT

Runs in the environment of autoawq.txt, not in ctp's. BASE is a folder with a small Llama and its tokenizer. Linears of
its blocks are rounded to the nearest of 4 bits, packed by AutoAWQ's WQLinear_GEMM and run by it; OUT/autoawq-4bit-g32
then holds logits.safetensors with input_ids (int64) and logits (float32) too. AutoAWQ's search for scales, whose models
do not go with today's transformers, is left out: it changes the weights, and not how they are stored.
"""

import importlib.util
import json
import sys
import types
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

# Without its __init__, which imports the models.
awq = types.ModuleType("awq")
awq.__path__ = importlib.util.find_spec("awq").submodule_search_locations
sys.modules["awq"] = awq

from awq.modules.linear.gemm import WQLinear_GEMM  # noqa: E402

SIZE = 32


def rounded(linear: torch.nn.Linear) -> WQLinear_GEMM:
    """The linear in AutoAWQ's form, its weights on the grid of each group's least and largest."""
    rows, columns = linear.weight.shape
    groups = linear.weight.data.float().view(rows, -1, SIZE)
    low, high = groups.amin(2), groups.amax(2)
    scales = ((high - low) / 15).clamp(min=1e-5).half()
    zeros = (-low / scales.float()).round().clamp(0, 15)
    steps = (groups / scales.float()[..., None] + zeros[..., None]).round().clamp(0, 15)
    linear.weight.data = ((steps - zeros[..., None]) * scales.float()[..., None]).view(rows, columns).half()
    # It rounds (weight + zero * scale) / scale itself, so that both must be on its grid.
    return WQLinear_GEMM.from_linear(linear, 4, SIZE, scales=scales.T.contiguous(), zeros=zeros.T.contiguous())


def main(base: str, out: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float16)
    for name, module in list(model.model.layers.named_modules()):
        if isinstance(module, torch.nn.Linear):
            parent, _, own = name.rpartition(".")
            setattr(model.model.layers.get_submodule(parent), own, rounded(module))
    tokenizer = AutoTokenizer.from_pretrained(base)
    ids = torch.randint(len(tokenizer), (1, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(ids).logits.float()
    folder = out / "autoawq-4bit-g32"
    tokenizer.save_pretrained(folder)
    said = {"quant_method": "awq", "bits": 4, "group_size": SIZE, "zero_point": True, "version": "gemm"}
    config = model.config.to_dict() | {"quantization_config": {**said, "modules_to_not_convert": None}}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    save_file(
        {n: t.contiguous() for n, t in model.state_dict().items()}, folder / "model.safetensors", {"format": "pt"}
    )
    save_file({"input_ids": ids, "logits": logits}, folder / "logits.safetensors")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
