"""What learning a soft prompt leaves on disk: a checkpoint to go on from, and the prompt. safetensors and JSON only."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ctp.recover.adapter import ADAPTER

TENSORS, PROGRESS = "state.safetensors", "state.json"
HISTORY, KEY = "history.json", "prompt_embeddings"


@dataclass
class TrainState:
    """All that a run needs to go on to the same bytes.

    Batches and learning rates are functions of the step, so that no sampler or scheduler appears here. identity: names
    spec and text, compared on resume. prompt, best (k, d): now, and at the lowest validation loss. moments: AdamW's,
    empty before the first update. scaler: of the fp16 loss, else empty. loss_sum over loss_count updates: training loss
    since the last validation. seconds: spent so far, all interrupted runs together.
    """

    identity: str
    prompt: Tensor
    best: Tensor
    best_loss: float = float("inf")
    best_step: int = 0
    step: int = 0
    loss_sum: float = 0.0
    loss_count: int = 0
    seconds: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)
    moments: dict[str, Tensor] = field(default_factory=dict)
    scaler: dict[str, float] = field(default_factory=dict)

    def save(self, folder: str | Path) -> None:
        """Write the state into `folder`, the JSON file last."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {"prompt": self.prompt, "best": self.best, **{f"adamw.{n}": t for n, t in self.moments.items()}}
        save_file({n: t.detach().cpu().clone() for n, t in tensors.items()}, folder / TENSORS)
        _write(folder / PROGRESS, {n: getattr(self, n) for n in _PLAIN})

    @classmethod
    def load(cls, folder: str | Path) -> "TrainState":
        """The state that `save` wrote. Raises FileNotFoundError where there is none."""
        plain = json.loads((Path(folder) / PROGRESS).read_text())
        tensors = load_file(Path(folder) / TENSORS)
        moments = {n.removeprefix("adamw."): t for n, t in tensors.items() if n.startswith("adamw.")}
        return cls(prompt=tensors["prompt"], best=tensors["best"], moments=moments, **plain)


_PLAIN = [n for n in TrainState.__dataclass_fields__ if n not in ("prompt", "best", "moments")]


@dataclass(frozen=True, eq=False)
class LearnedPrompt:
    """The prompt (k, d) in fp32 on the CPU at the step with the lowest validation loss.

    best_val_loss and the losses in `history` are nats per scored token: exp(best_val_loss) is a perplexity. history:
    one entry per validation with step, val_loss, loss (mean training loss since the one before, None at step 0), lr.
    """

    embeddings: Tensor
    best_step: int
    best_val_loss: float
    history: list[dict[str, Any]]
    seconds: float

    def save(self, folder: str | Path, base_model_name: str) -> None:
        """Write PEFT's two files, which `PeftModel.from_pretrained(model, folder)` reads, and history.json."""
        from peft import PromptTuningConfig, TaskType  # heavy, and needed here only

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        k, d = self.embeddings.shape
        save_file({KEY: self.embeddings.contiguous()}, folder / ADAPTER, metadata={"format": "pt"})
        PromptTuningConfig(
            task_type=TaskType.CAUSAL_LM,
            num_virtual_tokens=k,
            token_dim=d,
            num_transformer_submodules=1,
            base_model_name_or_path=base_model_name,
            inference_mode=True,
        ).save_pretrained(str(folder))
        _write(folder / HISTORY, {n: v for n, v in asdict(self).items() if n != "embeddings"})


def load_prompt(folder: str | Path) -> Tensor:
    """The prompt (k, d), fp32, of an adapter in PEFT's format. Raises FileNotFoundError, KeyError or ValueError."""
    prompt = load_file(Path(folder) / ADAPTER)[KEY]
    if prompt.dim() != 2:
        raise ValueError(f"{KEY} in {folder} has shape {tuple(prompt.shape)}, not (k, d)")
    return prompt.to(torch.float32)


def _write(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n")
