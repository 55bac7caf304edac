"""Learning LoRA through a compressed model, on the query and value projections (appendix A.5 of the paper).

A projection W becomes W + (alpha / r) B A with A (r, in) and B (out, r); W stays frozen, B starts at 0. BLOOM's fused
matrix of queries, keys and values is split into three while A and B are learned; the two adapters are then saved as one
of rank 2r for the fused matrix.
"""

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

import torch
from peft import LoraConfig, TaskType, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from ctp.architectures import families
from ctp.architectures.blocks import decoder_blocks
from ctp.architectures.families import FUSED, QUERY, VALUE
from ctp.architectures.linears import linears
from ctp.cells import LoRA
from ctp.learning.run import Trainable
from ctp.learning.train import How, train
from ctp.machine.random import generator
from ctp.models.adapters import ADAPTER
from ctp.prompts.adapter import restored
from ctp.prompts.attach import frozen
from ctp.prompts.files import Outcome

NAME = "learned"  # of the adapter, while it is inside the model
Weights = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class LearnedLoRA(Outcome):
    """LoRA at the step with the lowest validation loss.

    weights: by PEFT's names, fp32 on the CPU. trained: how many numbers were learned; fewer than `weights` has for
    BLOOM, where keys have zeros. settings: of PEFT's LoraConfig.
    """

    weights: dict[str, Tensor]
    settings: dict[str, Any]
    trained: int

    @property
    def trainable_parameters(self) -> int:
        return self.trained

    def save(self, folder: str | Path, base_model_name: str) -> None:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self.weights, folder / ADAPTER, metadata={"format": "pt"})
        config = LoraConfig(**self.settings, base_model_name_or_path=base_model_name, inference_mode=True)
        config.target_modules = self.settings["target_modules"]  # PEFT's set has no stable order in the file
        config.save_pretrained(str(folder))
        self.write_history(folder)


def learn_lora(
    model: PreTrainedModel, windows: Tensor, validation: Tensor, spec: LoRA, **how: Unpack[How]
) -> LearnedLoRA:
    """Learn LoRA on the token windows (n, s); keep the step with the lowest validation loss.

    The model moves to runtime.device (unless accelerate has spread it out) and is otherwise left as it was.
    how, errors: see `ctp.learning.train.train`. Also raises ValueError if the model is refused,
    has no query and value projections that ctp knows, or fewer blocks than spec.layers.
    """
    families.check(model.config, "lora")
    state = train(model, lambda: injected(model, spec), windows, validation, spec, **how)
    trained = sum(t.numel() for t in state.best.values())
    weights, settings = _as_saved(model, spec, state.best)
    return LearnedLoRA(weights, settings, trained, **state.outcome())


@contextmanager
def injected(model: PreTrainedModel, spec: LoRA) -> Iterator[Trainable]:
    """The model with LoRA inside, in evaluation mode; modules, flags and weights are restored on the way out.

    The parameters are fp32: `MODULE.lora_A` (r, in) drawn as by PEFT (Kaiming's uniform) from spec.seed,
    `MODULE.lora_B` (out, r) zero. Raises ValueError as `learn_lora` does.
    """
    with restored(model), frozen(model):
        names = _projections(model, spec.layers)
        with torch.random.fork_rng(devices=[]):  # PEFT draws weights of its own
            inject_adapter_in_model(LoraConfig(**_settings(model, spec)), model, NAME)
        layers = {n: m for n, m in model.named_modules() if isinstance(m, LoraLayer)}
        if sorted(layers) != sorted(names):  # the saved configuration would not mean the same layers
            odd = sorted(layers.keys() ^ set(names))
            raise ValueError(f"{type(model).__name__}: {odd[0]} is a projection outside the decoder blocks")
        model.eval()
        yield _trainable(model, layers, spec)


def _trainable(model: PreTrainedModel, layers: dict[str, LoraLayer], spec: LoRA) -> Trainable:
    parameters: dict[str, nn.Parameter] = {}
    dropout: list[nn.Module] = []
    for name, layer in layers.items():
        a, b = layer.lora_A[NAME].float().weight, layer.lora_B[NAME].float().weight
        draw = generator("lora", spec.seed, name)
        start = nn.init.kaiming_uniform_(torch.empty(a.shape), math.sqrt(5), generator=draw)
        with torch.no_grad():
            a.copy_(start)
            b.zero_()
        parameters |= {f"{name}.lora_A": a.requires_grad_(), f"{name}.lora_B": b.requires_grad_()}
        dropout += [m for m in layer.lora_dropout.values() if isinstance(m, nn.Dropout)]
    return Trainable(model, parameters, dropout=dropout)


def _projections(model: PreTrainedModel, layers: int | None) -> list[str]:
    """Names of the query and value projections in the last `layers` blocks, BLOOM's split first. Raises ValueError."""
    place, blocks = decoder_blocks(model)
    if layers is not None and layers > len(blocks):
        raise ValueError(f"layers = {layers}: the model has {len(blocks)} decoder blocks")
    if why := families.no_projections(model.config, blocks, layers):
        raise ValueError(why)
    fused, names = FUSED.get(model.config.model_type), []
    for i in range(len(blocks) - (layers or len(blocks)), len(blocks)):
        if fused:
            _split(blocks[i], fused, model.config.num_attention_heads)
        names += [f"{place}.{i}.{n}" for n in linears(blocks[i]) if n.split(".")[-1] in (QUERY, VALUE)]
    return names


class SplitProjection(nn.Module):
    """A fused linear, with rows (heads, [query, key, value], head size), as three: the same function."""

    def __init__(self, fused: nn.Linear, heads: int) -> None:
        super().__init__()
        self.heads = heads
        weights = fused.weight.detach().unflatten(0, (heads, 3, -1))
        biases = None if fused.bias is None else fused.bias.detach().unflatten(0, (heads, 3, -1))
        for i, name in enumerate((QUERY, "k_proj", VALUE)):
            weight = weights[:, i].flatten(0, 1)
            part = nn.Linear(weight.shape[1], weight.shape[0], bias=biases is not None, device="meta")
            part.weight = nn.Parameter(weight, requires_grad=False)
            if biases is not None:
                part.bias = nn.Parameter(biases[:, i].flatten(), requires_grad=False)
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) -> (…, 3 x width), in the order of the fused rows."""
        parts = [part(x).unflatten(-1, (self.heads, -1)) for part in self.children()]
        return torch.stack(parts, dim=-2).flatten(-3)


def _split(block: nn.Module, name: str, heads: int) -> None:
    """Replace the block's fused linear by a SplitProjection."""
    for path, module in list(block.named_modules()):
        parent, _, last = path.rpartition(".")
        if last == name and isinstance(module, nn.Linear):
            setattr(block.get_submodule(parent), last, SplitProjection(module, heads))


def _fuse(learned: dict[str, Tensor], heads: int) -> dict[str, Tensor]:
    """Adapters of query and value of rank r as one of rank 2r for the fused linear, whose key rows get zeros.

    A = [A_q; A_v] (2r, in). B (3 x width, 2r) has B_q left in its query rows and B_v right in its value rows.
    """
    out: dict[str, Tensor] = {}
    for module in dict.fromkeys(name.rsplit(".", 2)[0] for name in learned):
        (a_q, b_q), (a_v, b_v) = ([learned[f"{module}.{p}.lora_{x}"] for x in "AB"] for p in (QUERY, VALUE))
        r = len(a_q)
        b = torch.zeros(heads, 3, len(b_q) // heads, 2 * r)
        b[:, 0, :, :r] = b_q.unflatten(0, (heads, -1))
        b[:, 2, :, r:] = b_v.unflatten(0, (heads, -1))
        out |= {f"{module}.lora_A": torch.cat([a_q, a_v]), f"{module}.lora_B": b.flatten(0, 2)}
    return out


def _settings(model: PreTrainedModel, spec: LoRA) -> dict[str, Any]:
    """PEFT's settings of what is learned, before a fused projection is joined."""
    place, blocks = decoder_blocks(model)
    count = len(blocks)
    last = None if spec.layers is None else list(range(count - spec.layers, count))
    target: list[str] | str = [QUERY, VALUE]
    outside = (n for n in linears(model) if not n.startswith(f"{place}."))
    if any(n.split(".")[-1] in (QUERY, VALUE) for n in outside):  # in a tower for images: PEFT would match those too
        numbers = "|".join(map(str, last or range(count)))
        target, last = rf"{re.escape(place)}\.({numbers})\..*\b({QUERY}|{VALUE})", None
    return {
        "task_type": TaskType.CAUSAL_LM, "r": spec.r, "lora_alpha": spec.alpha, "lora_dropout": spec.dropout,
        "target_modules": target, "layers_to_transform": last,
    }  # fmt: skip


def _as_saved(model: PreTrainedModel, spec: LoRA, learned: Weights) -> tuple[Weights, dict[str, Any]]:
    """(weights by PEFT's names, settings of its LoraConfig) for the ordinary model."""
    settings, fused = _settings(model, spec), FUSED.get(model.config.model_type)
    if fused:
        learned = _fuse(learned, model.config.num_attention_heads)
        # Twice the rank and twice alpha: alpha / r, by which both are scaled, stays.
        settings |= {"r": 2 * spec.r, "lora_alpha": 2 * spec.alpha, "target_modules": [fused]}
    return {f"base_model.model.{n}.weight": t.contiguous() for n, t in learned.items()}, settings
