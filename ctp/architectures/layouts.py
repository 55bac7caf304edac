"""How the experts of a mixture are stored in a module's parameters, and what a layer of them computes.

transformers marks most such modules alike (`use_experts_implementation`): 3-D parameters `gate_up_proj` or `up_proj`,
and `down_proj`, whose first dimension is the expert, and attributes that describe the layout of a matrix. DBRX has 2-D
parameters in which the experts' matrices follow one another.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

_MARKS = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "has_post_expert_norm", "_apply_gate")
_ALL = slice(None)


@dataclass(frozen=True)
class Part:
    """Where one linear of every expert is. parameter: its name in the module. rows: the linear's outputs there.
    transposed: does it hold inputs before outputs? bias: likewise the parameter (experts, outputs), "" without one.
    """

    parameter: str
    rows: slice = field(default_factory=lambda: slice(None))
    transposed: bool = False
    bias: str = ""


@dataclass(frozen=True)
class Layout:
    """count: of experts. width: of what they read and give. parts: an expert's linears by name, `down_proj` the last.

    inner: what goes into down_proj, of what the other linears give, by name. outer: what is made of down_proj's output
    before the experts of a token are added up.
    """

    count: int
    width: int
    parts: Mapping[str, Part]
    inner: Callable[[Mapping[str, Tensor]], Tensor]
    outer: Callable[[Tensor], Tensor]


def layout_of(module: Any) -> Layout | None:
    """None where the module holds no experts, or holds them in a way that is not known here."""
    return _marked(module) or _stacked(module)


def _marked(module: Any) -> Layout | None:
    first = "gate_up_proj" if getattr(module, "has_gate", True) else "up_proj"
    both: list[Any] = [getattr(module, n, None) for n in (first, "down_proj")]
    if not all(hasattr(module, n) for n in _MARKS) or not all(_is_matrix(p, 3) for p in both):
        return None
    flipped, biases = bool(module.is_transposed), [f"{n}_bias" * module.has_bias for n in (first, "down_proj")]
    count, half = len(module.down_proj), both[0].shape[2 if flipped else 1] // 2
    gate, up = (slice(half), slice(half, None)) if module.is_concatenated else (slice(0, None, 2), slice(1, None, 2))
    cut = {"gate_proj": gate, "up_proj": up} if module.has_gate else {"up_proj": _ALL}
    parts = {n: Part(first, rows, flipped, biases[0]) for n, rows in cut.items()}
    parts["down_proj"] = Part("down_proj", _ALL, flipped, biases[1])

    def inner(out: Mapping[str, Tensor]) -> Tensor:
        if not module.has_gate:
            return module.act_fn(out["up_proj"])
        pair = out["gate_proj"], out["up_proj"]
        together = torch.cat(pair, -1) if module.is_concatenated else torch.stack(pair, -1).flatten(-2)
        return module._apply_gate(together)

    outer = module.post_expert_norm if module.has_post_expert_norm else _as_it_is
    return Layout(count, module.down_proj.shape[2 if flipped else 1], parts, inner, outer)


def _stacked(module: Any) -> Layout | None:
    mlp: Any = getattr(module, "mlp", None)
    count = getattr(module, "num_experts", 0)
    if not count or not all(_is_matrix(getattr(mlp, n, None), 2) for n in ("w1", "v1", "w2")):
        return None
    parts = {"gate_proj": Part("mlp.w1"), "up_proj": Part("mlp.v1"), "down_proj": Part("mlp.w2", transposed=True)}
    act: Any = mlp.activation_fn
    return Layout(count, mlp.w2.shape[1], parts, lambda out: act(out["gate_proj"]) * out["up_proj"], _as_it_is)


def _is_matrix(p: Any, dimensions: int) -> bool:
    return isinstance(p, nn.Parameter) and p.ndim == dimensions


def _as_it_is(x: Tensor) -> Tensor:
    return x
