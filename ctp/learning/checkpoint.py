"""The state of a training run, exact to resume. safetensors and JSON only."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from ctp.prompts.files import write_plain

TENSORS, PROGRESS = "state.safetensors", "state.json"


@dataclass
class TrainState:
    """All that a run needs to resume to the same bytes. Batches, dropout and rates are functions of the step.

    identity: of spec and text, compared on resume. values, best: the trainable parameters by name, as of the last
    checkpoint and at the lowest validation loss. moments: AdamW's by parameter and name. scaler: of the fp16 loss.
    loss_sum over loss_count updates: training loss since the last validation. seconds: of all interrupted runs.
    at_once: windows a micro-batch, fewer than the spec's if memory ran out; 0 before the first update.
    """

    identity: str
    values: dict[str, Tensor] = field(default_factory=dict)
    best: dict[str, Tensor] = field(default_factory=dict)
    moments: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    best_loss: float = float("inf")
    best_step: int = 0
    step: int = 0
    loss_sum: float = 0.0
    loss_count: int = 0
    seconds: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)
    scaler: dict[str, float] = field(default_factory=dict)
    at_once: int = 0

    def save(self, folder: str | Path) -> None:
        """Write the state into `folder`, the JSON file last."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"{kind}:{n}": t for kind in ("values", "best") for n, t in getattr(self, kind).items()}
        tensors |= {f"{stat}:{n}": t for n, each in self.moments.items() for stat, t in each.items()}
        save_file({n: t.detach().cpu().clone() for n, t in tensors.items()}, folder / TENSORS)
        write_plain(folder / PROGRESS, {n: getattr(self, n) for n in _PLAIN})

    @classmethod
    def load(cls, folder: str | Path) -> "TrainState":
        """The state that `save` wrote. Raises FileNotFoundError where there is none."""
        state = cls(**json.loads((Path(folder) / PROGRESS).read_text()))
        for name, tensor in load_file(Path(folder) / TENSORS).items():
            kind, _, parameter = name.partition(":")
            if kind in ("values", "best"):
                getattr(state, kind)[parameter] = tensor
            else:
                state.moments.setdefault(parameter, {})[kind] = tensor
        return state

    def outcome(self) -> dict[str, Any]:
        """The fields of an `Outcome`."""
        best = {"best_step": self.best_step, "best_val_loss": self.best_loss}
        return {**best, "history": self.history, "seconds": self.seconds}


_PLAIN = [n for n in TrainState.__dataclass_fields__ if n not in ("values", "best", "moments")]
