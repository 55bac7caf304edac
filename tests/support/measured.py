"""A measure done by hand: what a grid gives it, without a plan or a store."""

import json
from types import SimpleNamespace

import torch

from ctp.cells.runtime import Runtime
from ctp.models import sources
from ctp.models.load import load_model

ARCHITECTURES = ("tiny-opt-1", "tiny-llama", "tiny-bloom")


def loaded(name):
    """(model, tokenizer) of a tiny model by name."""
    _, revision, location = sources.locate(name)
    return load_model(location, revision)


def rows_for(model, k, seed=1, scale=1.0):
    width = model.get_input_embeddings().embedding_dim
    return scale * torch.randn(k, width, generator=torch.Generator().manual_seed(seed))


def job_for(folder, model, tokenizer, prompt=None):
    """What `measure` functions use of an EvaluateJob."""

    def write_json(name, value):
        (folder / name).write_text(json.dumps(value, allow_nan=False))

    return SimpleNamespace(
        cell=SimpleNamespace(recovery=None), model=model, tokenizer=tokenizer, prompt=prompt, device="cpu",
        folder=folder, record={}, hard_prompt="",
        runtime=Runtime(device="cpu", batch=3), progress=lambda done, of: None, write_json=write_json,
    )  # fmt: skip


def read_json(path):
    return json.loads(path.read_text())
