"""The logits that transformers, through GPTQModel, gives for every GPTQ checkpoint in a folder.

    python read_zoo.py PARENT IDS.safetensors OUT.safetensors

Runs in the environment of gptqmodel.txt. IDS holds input_ids (int64); OUT gets the logits by the name of the folder, in
float32 with the plain torch kernel, or under the name of the folder and what went wrong, nothing.
"""

import os
import sys
from pathlib import Path

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # by default one on two cores, which its loader refuses

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPTQConfig


def main(parent: str, ids: str, out: str) -> None:
    input_ids = load_file(ids)["input_ids"]
    plain = GPTQConfig(bits=4, backend="gptq_torch")  # only the backend counts: the rest is the folder's
    found = {}
    for folder in sorted(Path(parent).iterdir()):
        try:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=plain).eval()
            with torch.no_grad():
                found[folder.name] = model(input_ids=input_ids, use_cache=False).logits.contiguous()
        except Exception as e:
            found[f"{folder.name}: {type(e).__name__}: {' '.join(str(e).split())[:300]}"] = torch.zeros(1)
    save_file(found, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
