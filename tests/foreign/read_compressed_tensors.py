"""The logits that transformers gives for a compressed-tensors checkpoint, such as ctp writes.

    python read_compressed_tensors.py DIR IDS.safetensors OUT.safetensors

Runs in the environment of llmcompressor.txt, or in any other with transformers and compressed-tensors. IDS holds
input_ids (int64); OUT gets, in float32, `transformers`: what AutoModelForCausalLM.from_pretrained(DIR) gives with
nothing else said, and `dequantized`: the same with CompressedTensorsConfig(dequantize=True), unless DIR is dense.
"""

import sys

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, CompressedTensorsConfig


def main(folder: str, ids: str, out: str) -> None:
    input_ids = load_file(ids)["input_ids"]
    options = {"transformers": {}}
    if hasattr(AutoConfig.from_pretrained(folder), "quantization_config"):
        options["dequantized"] = {"quantization_config": CompressedTensorsConfig(dequantize=True)}
    logits = {}
    with torch.no_grad():
        for name, option in options.items():
            model = AutoModelForCausalLM.from_pretrained(folder, **option)
            print(f"{name}: {model.dtype}, {type(model.model.layers[0].self_attn.q_proj).__name__}")
            logits[name] = model(input_ids).logits.float()
    save_file(logits, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
