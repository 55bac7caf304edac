"""GPTQ checkpoints by GPTQModel itself, each with the logits it gives: what ctp reads must mean the same.

    python write_gptqmodel.py BASE OUT

Runs in the environment of gptqmodel.txt, not in ctp's. BASE is a folder with a small Llama and its tokenizer. Every
variant is quantized, saved to OUT/gptqmodel-NAME, loaded back on the plain torch backend and run; its folder then holds
logits.safetensors with input_ids (int64) and logits (float32).
"""

import os
import sys
from pathlib import Path

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # by default one on two cores, which its loader refuses

import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from safetensors.torch import save_file
from transformers import AutoTokenizer

VARIANTS = {
    "4bit-g32": ({"bits": 4, "group_size": 32}, torch.float16),
    "4bit-asym-act-g32-v1": ({"bits": 4, "group_size": 32, "sym": False, "desc_act": True}, torch.float16),
    "4bit-asym-act-g32-v2": (
        {"bits": 4, "group_size": 32, "sym": False, "desc_act": True, "format": "gptq_v2"},
        torch.float16,
    ),
    "3bit": ({"bits": 3, "group_size": -1, "act_group_aware": False}, torch.float16),
    "3bit-asym-g32-v2": ({"bits": 3, "group_size": 32, "sym": False, "format": "gptq_v2"}, torch.float16),
    "2bit-g32": ({"bits": 2, "group_size": 32}, torch.float16),
    "8bit-g32-bf16": ({"bits": 8, "group_size": 32}, torch.bfloat16),
}
# These stay in memory while quantizing: otherwise the name of a temporary folder goes into the saved config.
COMMON = {"offload_to_disk": False}


def main(base: str, out: Path) -> None:
    vocab = len(AutoTokenizer.from_pretrained(base))
    ids = torch.randint(vocab, (33, 32), generator=torch.Generator().manual_seed(0))
    calibration = [{"input_ids": row, "attention_mask": [1] * 32} for row in ids[1:].tolist()]
    for name, (settings, dtype) in VARIANTS.items():
        config = QuantizeConfig(**settings, **COMMON)
        model = GPTQModel.load(base, config, device="cpu", backend=BACKEND.GPTQ_TORCH, dtype=dtype)
        model.quantize(calibration, batch_size=8)
        folder = out / f"gptqmodel-{name}"
        model.save(str(folder))
        (folder / "quant_log.csv").unlink(missing_ok=True)
        loaded = GPTQModel.load(str(folder), device="cpu", backend=BACKEND.GPTQ_TORCH, dtype=dtype)
        with torch.no_grad():
            logits = loaded.model(ids[:1]).logits.float()
        save_file({"input_ids": ids[:1], "logits": logits}, folder / "logits.safetensors")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
