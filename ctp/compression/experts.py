"""Experts of a mixture: matrices that lie side by side in 3-D parameters, as linears that can be compressed one by one.

transformers marks such modules alike (`use_experts_implementation`): `gate_up_proj` or `up_proj`, and `down_proj`, with
an expert to every index of their first dimension, and attributes that say how a matrix lies there.
"""

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ctp.compression.names import as_original

_MARKS = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "has_post_expert_norm", "_apply_gate")


@dataclass(frozen=True)
class Matrix:
    """One weight (outputs, inputs) of one expert.

    name: of the linear in artifacts and exports. original: do the model's original checkpoints have it by that name?
    parameter: the 3-D one that it lies in, by its name in the model. rows: its outputs, where gate and up share a
    parameter. transposed: does the parameter hold inputs before outputs?
    """

    name: str
    original: bool
    parameter: str
    expert: int
    rows: slice
    transposed: bool

    def of(self, parameter: Tensor) -> Tensor:
        """The matrix, a view of the 3-D parameter."""
        own = parameter[self.expert]
        return (own.T if self.transposed else own)[self.rows]


def is_experts(module: nn.Module) -> bool:
    """Is it the experts of a mixture, as 3-D parameters that this module knows how to read?"""
    first = getattr(module, "gate_up_proj" if getattr(module, "has_gate", True) else "up_proj", None)
    both = (first, getattr(module, "down_proj", None))
    return all(hasattr(module, n) for n in _MARKS) and all(isinstance(p, nn.Parameter) and p.ndim == 3 for p in both)


def _parts(module: Any) -> dict[str, tuple[str, slice]]:
    """An expert's linears by name: the parameter that each lies in, and its outputs there."""
    if not module.has_gate:
        return {"up_proj": ("up_proj", slice(None)), "down_proj": ("down_proj", slice(None))}
    half = module.gate_up_proj.shape[2 if module.is_transposed else 1] // 2
    gate, up = (slice(0, half), slice(half, None)) if module.is_concatenated else (slice(0, None, 2), slice(1, None, 2))
    first = "gate_up_proj"
    return {"gate_proj": (first, gate), "up_proj": (first, up), "down_proj": ("down_proj", slice(None))}


def matrices(model: nn.Module) -> dict[str, Matrix]:
    """Every expert's weights of a model of transformers, by the name of the linear that each would be in it."""
    found: dict[str, Matrix] = {}
    for path, module in model.named_modules():
        if is_experts(module):
            for expert in range(len(module.down_proj)):
                for own, (parameter, rows) in _parts(module).items():
                    name = f"{path}.{expert}.{own}"
                    where = f"{path}.{parameter}"
                    found[name] = Matrix(name, False, where, expert, rows, bool(module.is_transposed))
    named = _original_names(model, found)
    return {n: replace(m, name=named[n], original=True) if n in named else m for n, m in found.items()}


def _original_names(model: Any, found: Mapping[str, Matrix]) -> dict[str, str]:
    """The names in the model's original checkpoints, where those have one linear for every matrix; {} elsewhere.

    transformers is asked what it would save for parameters whose numbers tell which matrix they are.
    """
    if not found:
        return {}
    numbers = dict(enumerate(found))
    marked: dict[str, list[list[int]]] = {}
    for number, m in enumerate(found.values()):
        of_expert = marked.setdefault(m.parameter, [])
        of_expert.extend([] for _ in range(m.expert + 1 - len(of_expert)))
        of_expert[m.expert].append(number)
    saved = as_original(model, {n: torch.tensor(rows).unsqueeze(2) for n, rows in marked.items()})
    if any(t.numel() != 1 or not n.endswith(".weight") for n, t in saved.items()):
        return {}
    return {numbers[int(t)]: n.removesuffix(".weight") for n, t in saved.items()}


def routers(root: nn.Module, prefix: str = "") -> set[str]:
    """Names of the modules that choose among the experts or weigh shared ones, and of all inside them: left alone.

    They stand beside the experts, have an output for each, and do not lead back to the model's width as an MLP does.
    """
    found: set[str] = set()
    for path, module in root.named_modules():
        experts = module.experts if isinstance(module, SplitExperts) else module
        if not is_experts(experts):
            continue
        at = path.rpartition(".")[0]
        for own, child in root.get_submodule(at).named_children():
            if child is not module and _routes(child, experts):
                name = f"{at}.{own}" if at else own
                found |= {n for n, _ in child.named_modules(prefix=f"{prefix}.{name}" if prefix else name)}
    return found


def _routes(module: nn.Module, experts: Any) -> bool:
    count, size = len(experts.down_proj), experts.down_proj.shape
    width = size[2] if experts.is_transposed else size[1]
    if isinstance(module, nn.Linear):
        return module.out_features in (1, count)
    if any(isinstance(m, nn.Linear) and m.out_features == width for m in module.modules()):
        return False
    return any(p.ndim == 2 and len(p) >= count for p in module.parameters())


def fused(model: nn.Module, weights: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """The state of a model given by its linears' weights and other tensors, experts put into their 3-D parameters.

    weights: (name, tensor); of experts `NAME.weight`, NAME as in artifacts. model: of the architecture, whose own
    numbers are not looked at.
    """
    experts = {f"{m.name}.weight": m for m in matrices(model).values()}
    state: dict[str, Tensor] = {}
    for name, weight in weights:
        if (m := experts.get(name)) is None:
            state[name] = weight
            continue
        if m.parameter not in state:
            shape = model.get_parameter(m.parameter).shape
            state[m.parameter] = torch.empty(shape, dtype=weight.dtype, device=weight.device)
        place = m.of(state[m.parameter])
        if weight.shape != place.shape:
            raise ValueError(f"{name} has the shape {tuple(weight.shape)}, not {tuple(place.shape)}")
        place.copy_(weight)
    return state


class SplitExperts(nn.Module):
    """The same layer with one nn.Linear for every matrix; their weights are views of the experts' parameters.

    Every expert's linears are called in every pass, on no token where none is routed to it: all that come first, then
    all `down_proj`. all_tokens: experts that are called on all tokens instead, and no other, for what they would see
    then; what the layer gives is of no use in such a pass.
    """

    experts: Any

    def __init__(self, experts: Any) -> None:
        super().__init__()
        self.__dict__["experts"] = experts  # not a submodule: its parameters would be there twice
        self.all_tokens: frozenset[int] | None = None
        for e in range(len(experts.down_proj)):
            expert = nn.Module()
            for name, (parameter, rows) in _parts(experts).items():
                m = Matrix(name, False, parameter, e, rows, experts.is_transposed)
                bias = getattr(experts, f"{parameter}_bias")[e][rows] if experts.has_bias else None
                setattr(expert, name, _linear(m.of(getattr(experts, parameter)), bias))
            self.add_module(str(e), expert)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        hidden, index, weight = inspect.signature(self.experts.forward).bind(*args, **kwargs).args
        if self.all_tokens is not None:
            for expert, x in [(e, self._inner(e, hidden)) for e in self._linears(self.all_tokens)]:
                expert.down_proj(x)
            return torch.zeros_like(hidden)
        places = [(index == e).nonzero(as_tuple=True) for e in range(len(self._modules))]
        experts = list(self._linears())
        inner = [self._inner(e, hidden[tokens]) for e, (tokens, _) in zip(experts, places, strict=True)]
        out = torch.zeros_like(hidden)
        for expert, x, (tokens, slots) in zip(experts, inner, places, strict=True):
            y = expert.down_proj(x)
            if self.experts.has_post_expert_norm:
                y = self.experts.post_expert_norm(y)
            out.index_add_(0, tokens, (y * weight[tokens, slots, None]).to(out.dtype))
        return out

    def _linears(self, only: frozenset[int] | None = None) -> Iterator[Any]:
        return (m for n, m in self._modules.items() if only is None or int(n) in only)

    def _inner(self, expert: Any, x: Tensor) -> Tensor:
        """What goes into down_proj."""
        if not self.experts.has_gate:
            return self.experts.act_fn(expert.up_proj(x))
        both = expert.gate_proj(x), expert.up_proj(x)
        together = torch.cat(both, -1) if self.experts.is_concatenated else torch.stack(both, -1).flatten(-2)
        return self.experts._apply_gate(together)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().contiguous(), requires_grad=False)  # oneDNN reads no strides of it
    return linear


@contextmanager
def split(block: nn.Module) -> Iterator[None]:
    """The block's experts are linears meanwhile; what is written into them is written into the experts."""
    found = [(n, m) for n, m in block.named_modules() if is_experts(m)]
    for name, module in found:
        put(block, name, SplitExperts(module))
    try:
        yield
    finally:
        for name, module in found:
            put(block, name, module)


def check_split(whole: Tensor, parts: Tensor, name: str, tolerance: float = 1e-2) -> None:
    """Raises RuntimeError unless a block computes the same with its experts split, up to rounding.

    tolerance: largest difference relative to the largest value. Catches experts that do more than their marks say.
    """
    difference = float((whole - parts).abs().max() / whole.abs().max().clamp(min=1e-30))
    if not difference <= tolerance:
        raise RuntimeError(
            f"{name}: its experts one by one differ from the layer by {difference:.1e} of the largest value"
        )


def put(root: nn.Module, name: str, module: nn.Module) -> None:
    """The module by that name is another one from now on."""
    parent, _, own = name.rpartition(".")
    setattr(root.get_submodule(parent), own, module)
