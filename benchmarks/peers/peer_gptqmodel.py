"""GPTQModel on the rows of benchmarks.compression; runs in its own environment (`make foreign`), not in ctp's.

    python peer_gptqmodel.py JOB.json

JOB is that of peer_llmcompressor.py. Every row is one call of `quantize` on a freshly loaded model; the call alone is
timed. Prints "ROW {name, seconds, weights}" for each: weights is the folder that GPTQModel saved.
"""

import json
import sys
import time
from pathlib import Path

import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from safetensors.torch import load_file


def config(s: dict) -> QuantizeConfig:
    """ctp's settings `s` of gptq in GPTQModel's words; group-aware order, which ctp does not have, is off."""
    return QuantizeConfig(
        bits=s["bits"],
        group_size=s.get("group_size") or -1,
        sym=s.get("sym", False),
        desc_act=s.get("act_order", False),
        act_group_aware=False,
        true_sequential=s.get("true_sequential", False),
        static_groups=s.get("static_groups", False),
        mse=2.4 if s.get("scale") == "mse" else 0.0,
        damp_percent=0.01,
        offload_to_disk=False,
    )


def main(job: dict) -> None:
    torch.set_num_threads(job["threads"])
    ids = load_file(job["tokens"])["calibration"].tolist()
    calibration = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in ids]
    for row in job["rows"]:
        model = GPTQModel.load(
            job["model"], config(row["settings"]), device="cpu", backend=BACKEND.GPTQ_TORCH, dtype=torch.float32
        )
        begun = time.perf_counter()
        model.quantize(calibration, batch_size=job["batch"])
        seconds = time.perf_counter() - begun
        folder = str(Path(job["out"]) / f"gptqmodel-{row['name']}")
        model.save(folder)
        result = {"name": row["name"], "seconds": seconds, "weights": folder}
        print("ROW " + json.dumps(result), flush=True)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
