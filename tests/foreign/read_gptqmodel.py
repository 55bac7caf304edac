"""The logits that transformers and GPTQModel give for a GPTQ checkpoint, such as ctp writes.

    python read_gptqmodel.py DIR IDS.safetensors OUT.safetensors

Runs in the environment of gptqmodel.txt. IDS holds input_ids (int64); OUT gets, in float32:
transformers: AutoModelForCausalLM.from_pretrained(DIR) with nothing else said, so with the kernel and dtype it picks.
exact: the same in float32 with the plain torch kernel, which computes with each weight rounded to float16.
gptqmodel: GPTQModel.load on its plain torch backend in float16 (by default it takes bfloat16 on a CPU, and there
rounds the scales to bfloat16 too).
"""

import os
import sys

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # by default one on two cores, which its loader refuses

import torch
from gptqmodel import BACKEND, GPTQModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPTQConfig


def main(folder: str, ids: str, out: str) -> None:
    input_ids = load_file(ids)["input_ids"]
    plain = GPTQConfig(bits=4, backend="gptq_torch")  # only the backend counts: the rest is the folder's
    loaders = {
        "transformers": lambda: AutoModelForCausalLM.from_pretrained(folder),
        "exact": lambda: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=plain),
        "gptqmodel": lambda: (
            GPTQModel.load(folder, device="cpu", backend=BACKEND.GPTQ_TORCH, dtype=torch.float16).model
        ),
    }
    logits = {}
    for name, load in loaders.items():
        model = load()
        print(f"{name}: {model.dtype}, {type(model.model.layers[0].self_attn.q_proj).__name__}")
        with torch.no_grad():
            logits[name] = model(input_ids).logits.float()
    save_file(logits, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
