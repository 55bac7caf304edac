"""compressed-tensors checkpoints by llm-compressor itself, each with the logits it gives: what ctp must read equally.

    python write_llmcompressor.py BASE OUT

Runs in the environment of llmcompressor.txt, not in ctp's. BASE is a folder with a small Llama and its tokenizer. Every
variant is compressed, saved to OUT/llmcompressor-NAME, loaded back by transformers and run; its folder then holds
logits.safetensors with input_ids (int64) and logits (float32).
"""

import sys
from pathlib import Path

import torch
from compressed_tensors.quantization import QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.pruning import SparseGPTModifier
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def gptq(bits: int, group_size: int | None = None, symmetric: bool = True, actorder: str | None = None, **rest):
    """A weight-only GPTQ recipe; without a group size per channel."""
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "group" if group_size else "channel",
        "group_size": group_size,
    }
    scheme = QuantizationScheme(targets=["Linear"], weights=weights, **rest)
    return GPTQModifier(config_groups={"group_0": scheme}, ignore=["lm_head"], actorder=actorder)


VARIANTS = {
    "4bit-g32": (lambda: gptq(4, 32), torch.float16),
    "4bit-asym-g32": (lambda: gptq(4, 32, symmetric=False), torch.float32),
    "4bit-act-g32": (lambda: gptq(4, 32, actorder="static"), torch.float16),
    "3bit": (lambda: gptq(3), torch.float16),
    "3bit-asym-g32": (lambda: gptq(3, 32, symmetric=False), torch.bfloat16),
    "2bit-g32": (lambda: gptq(2, 32), torch.bfloat16),
    "8bit": (lambda: gptq(8), torch.bfloat16),
    "8bit-int": (lambda: gptq(8, format="int-quantized"), torch.float16),
    "sparsegpt-50": (lambda: SparseGPTModifier(sparsity=0.5, ignore=["lm_head"]), torch.bfloat16),
    "sparsegpt-2of4": (
        lambda: SparseGPTModifier(sparsity=0.5, mask_structure="2:4", ignore=["lm_head"]),
        torch.float16,
    ),
}


def main(base: str, out: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    ids = torch.randint(len(tokenizer), (33, 32), generator=torch.Generator().manual_seed(0))
    calibration = Dataset.from_dict({"input_ids": ids[1:].tolist(), "attention_mask": [[1] * 32] * 32})
    for name, (recipe, dtype) in VARIANTS.items():
        model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
        oneshot(
            model=model,
            dataset=calibration,
            recipe=recipe(),
            max_seq_length=32,
            num_calibration_samples=32,
            processor=tokenizer,
        )
        folder = out / f"llmcompressor-{name}"
        model.save_pretrained(folder, save_compressed=True)
        tokenizer.save_pretrained(folder)
        loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
        with torch.no_grad():
            logits = loaded(ids[:1]).logits.float()
        save_file({"input_ids": ids[:1], "logits": logits}, folder / "logits.safetensors")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
