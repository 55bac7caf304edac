"""Experts of a mixture: matrices side by side in a few parameters, as linears that are compressed one by one."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ctp.architectures.layouts import Layout, Part, layout_of
from ctp.architectures.names import as_original


@dataclass(frozen=True)
class Matrix:
    """One weight (outputs, inputs) of one expert.

    name: of the linear in artifacts and exports. original: do the model's original checkpoints have it by that name?
    layer: name of the module of the experts. part: where it is stored in there; count: of experts.
    """

    name: str
    original: bool
    layer: str
    part: Part
    expert: int
    count: int

    @property
    def parameter(self) -> str:
        """The name in the model of the parameter that holds it."""
        return f"{self.layer}.{self.part.parameter}"

    def of(self, parameter: Tensor) -> Tensor:
        """The matrix, a view of the parameter."""
        return _view(parameter, self.part, self.expert, self.count)


def _view(parameter: Tensor, part: Part, expert: int, count: int) -> Tensor:
    stored = (parameter if parameter.ndim == 3 else parameter.unflatten(0, (count, -1)))[expert]
    return (stored.T if part.transposed else stored)[part.rows]


def matrices(model: nn.Module) -> dict[str, Matrix]:
    """Every expert's weights of a model of transformers, by the name of the linear that each would be in it."""
    found = {
        (name := f"{path}.{expert}.{linear}"): Matrix(name, False, path, part, expert, layout.count)
        for path, _, layout in experts_in(model)
        for expert in range(layout.count)
        for linear, part in layout.parts.items()
    }
    named = _original_names(model, found)
    return {n: replace(m, name=named[n], original=True) if n in named else m for n, m in found.items()}


def experts_in(root: nn.Module) -> list[tuple[str, nn.Module, Layout]]:
    """The modules that hold experts, split or not, by name."""
    found = []
    for name, module in root.named_modules():
        if isinstance(module, nn.Linear):  # most of the modules where experts are split
            continue
        layout = module.layout if isinstance(module, SplitExperts) else layout_of(module)
        if layout is not None:
            found.append((name, module, layout))
    return found


def _original_names(model: Any, found: Mapping[str, Matrix]) -> dict[str, str]:
    """The names in the model's original checkpoints, where those have one linear for every matrix; {} elsewhere.

    Found by letting transformers convert parameters whose values number the matrices.
    """
    if not found:
        return {}
    numbers = dict(enumerate(found))
    marked: dict[str, list[list[int]]] = {}
    for number, m in enumerate(found.values()):
        marked.setdefault(m.parameter, [[] for _ in range(m.count)])[m.expert].append(number)
    saved = as_original(model, {n: torch.tensor(rows).unsqueeze(2) for n, rows in marked.items()})
    if any(t.numel() != 1 or not n.endswith(".weight") for n, t in saved.items()):
        return {}
    return {numbers[int(t)]: n.removesuffix(".weight") for n, t in saved.items()}


def routers(root: nn.Module, prefix: str = "") -> set[str]:
    """Names of the modules that choose among the experts or weigh shared ones, and of all inside them: left alone.

    They stand beside the experts, have an output for each, and do not lead back to the model's width as an MLP does.
    """
    found: set[str] = set()
    for path, module, layout in experts_in(root):
        at = path.rpartition(".")[0]
        for last, child in root.get_submodule(at).named_children():
            if child is not module and _routes(child, layout):
                name = f"{at}.{last}" if at else last
                found |= {n for n, _ in child.named_modules(prefix=f"{prefix}.{name}" if prefix else name)}
    return found


def _routes(module: nn.Module, layout: Layout) -> bool:
    if isinstance(module, nn.Linear):
        return module.out_features in (1, layout.count)
    if any(isinstance(m, nn.Linear) and m.out_features == layout.width for m in module.modules()):
        return False
    return any(p.ndim == 2 and len(p) >= layout.count for p in module.parameters())


def fused(model: nn.Module, weights: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """The state of a model given by its linears' weights and other tensors, experts put into their parameters.

    weights: (name, tensor); of experts `NAME.weight`, NAME as in artifacts. model: gives names and shapes only.
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
    all `down_proj`. all_tokens: if set, only these experts are called, on all tokens; the layer's output is then zeros.
    """

    experts: Any
    layout: Layout

    def __init__(self, experts: nn.Module, layout: Layout) -> None:
        super().__init__()
        self.__dict__["experts"] = experts  # not a submodule: its parameters would be there twice
        self.layout = layout
        self.all_tokens: frozenset[int] | None = None
        for e in range(layout.count):
            expert = nn.Module()
            for name, part in layout.parts.items():
                bias = experts.get_parameter(part.bias)[e][part.rows] if part.bias else None
                weight = _view(experts.get_parameter(part.parameter), part, e, layout.count)
                setattr(expert, name, _linear(weight, bias))
            self.add_module(str(e), expert)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        given, index, weight = inspect.signature(self.experts.forward).bind(*args, **kwargs).args
        hidden: Tensor = given.flatten(0, -2)
        experts: list[Any] = list(self._modules.values())
        if self.all_tokens is not None:
            for expert, x in [(e, self._inner(e, hidden)) for n, e in enumerate(experts) if n in self.all_tokens]:
                expert.down_proj(x)
            return torch.zeros_like(given)
        places = [(index == e).nonzero(as_tuple=True) for e in range(len(experts))]
        inner = [self._inner(e, hidden[tokens]) for e, (tokens, _) in zip(experts, places, strict=True)]
        out = torch.zeros_like(hidden)
        for expert, x, (tokens, slots) in zip(experts, inner, places, strict=True):
            y = self.layout.outer(expert.down_proj(x)) * weight[tokens, slots, None]
            out.index_add_(0, tokens, y.to(out.dtype))
        return out.view(given.shape)

    def _inner(self, expert: Any, x: Tensor) -> Tensor:
        """What goes into down_proj."""
        return self.layout.inner({n: getattr(expert, n)(x) for n in self.layout.parts if n != "down_proj"})


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    linear = nn.Linear.__new__(nn.Linear)  # made by hand: its own way would initialise thousands of weights first
    nn.Module.__init__(linear)
    linear.out_features, linear.in_features = weight.shape
    linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    flat = None if bias is None else bias.detach().contiguous()  # oneDNN reads no strides of it
    linear.register_parameter("bias", None if flat is None else nn.Parameter(flat, requires_grad=False))
    return linear


def split(root: nn.Module) -> AbstractContextManager[None]:
    """The experts in `root` are linears meanwhile; what is written into them is written into the experts."""
    return _replaced(root, SplitExperts)


def silent(root: nn.Module) -> AbstractContextManager[None]:
    """The experts in `root` return zeros meanwhile, whatever they are given, on the meta device too."""
    return _replaced(root, lambda *_: _Silent())


class _Silent(nn.Module):
    def forward(self, hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        return torch.zeros_like(hidden)


@contextmanager
def _replaced(root: nn.Module, by: Callable[[nn.Module, Layout], nn.Module]) -> Iterator[None]:
    found = [(n, m, layout) for n, m, layout in experts_in(root) if not isinstance(m, SplitExperts)]
    for name, module, layout in found:
        put(root, name, by(module, layout))
    try:
        yield
    finally:
        for name, module, _ in found:
            put(root, name, module)


def put(root: nn.Module, name: str, module: nn.Module) -> None:
    """The module by that name is another one from now on."""
    parent, _, last = name.rpartition(".")
    setattr(root.get_submodule(parent), last, module)
