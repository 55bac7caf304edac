"""llm-compressor on the rows of benchmarks.compression; runs in its own environment (`make foreign`), not in ctp's.

    python peer_llmcompressor.py JOB.json

JOB holds model (a folder), tokens (a safetensors file with `calibration`, (windows, tokens)), threads, batch, out (a
folder) and rows [{name, method, settings}]. Every row is one call of `oneshot` on a freshly loaded model; the call
alone is timed. Prints "ROW {name, seconds, weights}" for each: weights is a file with the dense weights.
"""

import json
import sys
import time
from pathlib import Path

import torch
from compressed_tensors.quantization import QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.pruning import SparseGPTModifier
from loguru import logger
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def recipe(method: str, s: dict) -> GPTQModifier | SparseGPTModifier:
    """The modifier with ctp's settings `s` of a method; damping 0.01 and blocks of 128 are the defaults of both."""
    if method == "sparsegpt":
        n, m = s.get("pattern", "0:0").split(":")
        return SparseGPTModifier(
            sparsity=s["sparsity"] if "sparsity" in s else int(n) / int(m),
            mask_structure=f"{n}:{m}",
            ignore=["lm_head"],
        )
    weights = {
        "num_bits": s["bits"],
        "type": "int",
        "symmetric": s.get("sym", False),
        "strategy": "group" if s.get("group_size") else "channel",
        "group_size": s.get("group_size"),
        "observer": "mse" if s.get("scale") == "mse" else "memoryless_minmax",
    }
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    actorder = "static" if s.get("act_order") else None
    return GPTQModifier(config_groups={"group_0": scheme}, ignore=["lm_head"], actorder=actorder)


def main(job: dict) -> None:
    torch.set_num_threads(job["threads"])
    logger.remove()
    ids = load_file(job["tokens"])["calibration"].long()
    calibration = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()})
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    for row in job["rows"]:
        model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
        modifier = recipe(row["method"], row["settings"])
        begun = time.perf_counter()
        oneshot(
            model=model,
            dataset=calibration,
            recipe=modifier,
            processor=tokenizer,
            max_seq_length=ids.shape[1],
            num_calibration_samples=len(ids),
            batch_size=job["batch"],
        )
        seconds = time.perf_counter() - begun
        file = str(Path(job["out"]) / f"llmcompressor-{row['name']}.safetensors")
        linears = {n: m.weight for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}
        save_file({f"{n}.weight": w.detach().contiguous() for n, w in linears.items()}, file)
        result = {"name": row["name"], "seconds": seconds, "weights": file}
        print("ROW " + json.dumps(result), flush=True)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
