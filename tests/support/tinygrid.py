"""A whole grid in seconds: a tiny random model in a folder, real text, a grid file."""

from pathlib import Path

import yaml
from support.tiny import tiny_bloom, tiny_llama, tiny_mixtral, tiny_opt
from transformers import PreTrainedTokenizerFast

from ctp.models import tiny

ARCHITECTURES = {"llama": tiny_llama, "opt": tiny_opt, "bloom": tiny_bloom, "mixtral": tiny_mixtral}
VOCAB = 257


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and an end-of-text token."""
    return tiny.byte_tokenizer(bos=False)


def model_folder(folder: Path, architecture: str = "llama", **fields) -> Path:
    """A Hugging Face folder with a tiny random model and a byte-level tokenizer."""
    ARCHITECTURES[architecture](vocab=VOCAB, **fields).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def grid(model: Path, **changes) -> dict:
    """A grid of 3 + 1 + 6 cells on one tiny model."""
    text = {"dataset": "pydoc", "split": "train", "seq_len": 24}
    return {
        "models": str(model),
        "compression": ["dense", {"method": "gptq", "bits": 3}, {"method": "sparsegpt", "sparsity": 0.5, "bits": 4}],
        "calibration": {**text, "count": 8, "sampling": "crops"},
        "sources": ["gptq-3bit"],
        "recovery": {
            "method": "soft_prompt", "k": 4, "text": {**text, "count": 32}, "validation": {"count": 4},
            "steps": 6, "validate_every": 2, "lr": 0.01,
        },
        "measures": {"method": "perplexity", "text": {**text, "split": "test", "count": 4}},
        **changes,
    }  # fmt: skip


def write_grid(path: Path, content: dict) -> Path:
    path.write_text(yaml.safe_dump(content))
    return path
