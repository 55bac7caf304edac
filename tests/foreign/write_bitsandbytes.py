"""Checkpoints by bitsandbytes itself, each with the logits that it gives: what ctp reads must mean the same.

    python write_bitsandbytes.py BASE OUT

Runs in the environment of bitsandbytes.txt, not in ctp's. BASE is a folder with a small Llama and its tokenizer. Every
variant is quantized by transformers, saved to OUT/bitsandbytes-NAME, loaded back, its weights made ordinary ones by the
library, and run; its folder then holds logits.safetensors with input_ids (int64) and logits (float32).
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

VARIANTS = {
    "nf4-double": (
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
        torch.bfloat16,
    ),
    "fp4": ({"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, torch.float32),
    "int8": ({"load_in_8bit": True}, torch.float16),
}


def main(base: str, out: Path) -> None:
    vocab = len(AutoTokenizer.from_pretrained(base))
    ids = torch.randint(vocab, (1, 32), generator=torch.Generator().manual_seed(0))
    for name, (settings, dtype) in VARIANTS.items():
        config = BitsAndBytesConfig(**settings)
        model = AutoModelForCausalLM.from_pretrained(base, quantization_config=config, dtype=dtype, device_map="cpu")
        folder = out / f"bitsandbytes-{name}"
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(base).save_pretrained(folder)
        # What follows is weights alone: LLM.int8 rounds the inputs of its products to 8 bits as well.
        plain = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map="cpu").dequantize()
        with torch.no_grad():
            logits = plain(ids).logits.float()
        save_file({"input_ids": ids, "logits": logits}, folder / "logits.safetensors")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
