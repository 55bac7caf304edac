"""Learned prompts and their histories on disk: PEFT's format, safetensors and JSON only."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ctp.models.adapters import ADAPTER

HISTORY, KEY = "history.json", "prompt_embeddings"


@dataclass(frozen=True, eq=False, kw_only=True)
class Outcome:
    """How learning went. Losses are nats per scored token: exp gives a perplexity.

    history: one entry per validation with step, val_loss, loss (mean training loss since the last one), lr (both None
    at step 0), and at_once if memory allowed fewer windows a micro-batch than the spec says. seconds: of all
    interrupted runs together.
    """

    best_step: int
    best_val_loss: float
    history: list[dict[str, Any]]
    seconds: float

    @property
    def trainable_parameters(self) -> int:
        """How many numbers were learned."""
        raise NotImplementedError

    def save(self, folder: str | Path, base_model_name: str) -> None:
        """Write PEFT's two files, which `PeftModel.from_pretrained(model, folder)` reads, and history.json."""
        raise NotImplementedError

    def write_history(self, folder: str | Path) -> None:
        """Write history.json."""
        write_plain(Path(folder) / HISTORY, {n: getattr(self, n) for n in Outcome.__dataclass_fields__})


@dataclass(frozen=True, eq=False)
class LearnedPrompt(Outcome):
    """The prompt (k, d) in fp32 on the CPU at the step with the lowest validation loss."""

    embeddings: Tensor

    @property
    def trainable_parameters(self) -> int:
        return self.embeddings.numel()

    def save(self, folder: str | Path, base_model_name: str) -> None:
        save_prompt(folder, self.embeddings, base_model_name)
        self.write_history(folder)


def save_prompt(folder: str | Path, rows: Tensor, base_model_name: str) -> None:
    """Write the rows (k, d) of a prompt as PEFT's two files, fp32; d is the width of the model's embedding.

    Raises ValueError unless they are k > 0 rows of finite numbers.
    """
    from peft import PromptTuningConfig, TaskType  # heavy, and needed here only

    if rows.dim() != 2 or rows.numel() == 0 or not rows.is_floating_point() or not bool(torch.isfinite(rows).all()):
        raise ValueError(f"a prompt is k > 0 rows (k, d) of finite numbers; got {rows.dtype} {tuple(rows.shape)}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    k, d = rows.shape
    stored = rows.detach().to("cpu", torch.float32).contiguous()
    save_file({KEY: stored}, folder / ADAPTER, metadata={"format": "pt"})
    PromptTuningConfig(
        task_type=TaskType.CAUSAL_LM,
        num_virtual_tokens=k,
        token_dim=d,
        num_transformer_submodules=1,
        base_model_name_or_path=base_model_name,
        inference_mode=True,
    ).save_pretrained(str(folder))


def load_prompt(folder: str | Path) -> Tensor:
    """The prompt (k, d), fp32, of an adapter in PEFT's format. Raises FileNotFoundError, KeyError or ValueError."""
    prompt = load_file(Path(folder) / ADAPTER)[KEY]
    if prompt.dim() != 2:
        raise ValueError(f"{KEY} in {folder} has shape {tuple(prompt.shape)}, not (k, d)")
    return prompt.to(torch.float32)


def write_plain(path: Path, data: object) -> None:
    """Write JSON. Raises ValueError on a number that is not finite."""
    path.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n")
