"""The linears of a block: nn.Linear, and the Conv1D of GPT-2, whose weight is stored transposed."""

from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ctp.architectures.experts import routers


def all_finite(x: Tensor) -> bool:
    """Is every number of x finite? One pass without a copy: a NaN is both the least and the largest of all."""
    return not x.numel() or bool(torch.isfinite(torch.stack(x.aminmax())).all())


SMALL = 1 / 4  # of the linears' weights: what the other matrices of a block may hold together


def linears(module: nn.Module, prefix: str = "") -> dict[str, nn.Module]:
    """The linears inside a module by name, each once; those of routers not, those of experts if they are split."""
    left = routers(module, prefix)
    return {n: m for n, m in module.named_modules(prefix=prefix) if is_linear(m) and n not in left}


def is_linear(module: nn.Module) -> bool:
    """Is it W x + b? Some classes made of nn.Linear compute something else, as grouped products."""
    kind: Any = type(module)
    plain = kind.forward in (nn.Linear.forward, Conv1D.forward)
    return plain or (isinstance(module, nn.Linear) and _computes_the_same(kind))


@cache
def _computes_the_same(kind: Any) -> bool:
    """Does a class made of nn.Linear compute W x + b in a way of its own (Falcon's)? Tried on a small one."""
    with torch.random.fork_rng(devices=[]):
        try:
            made = kind(3, 2, device="cpu", dtype=torch.float32)
            x = torch.arange(12.0, device="cpu").view(4, 3)
            return bool(torch.allclose(made(x), F.linear(x, made.weight, made.bias)))
        except Exception:  # it takes other settings
            return False


def matrix(linear: nn.Module) -> Tensor:
    """The weight of a linear as (outputs, inputs), sharing the parameter's memory."""
    weight = linear.weight
    assert isinstance(weight, Tensor)
    return weight.T if isinstance(linear, Conv1D) else weight


def as_stored(linear: nn.Module | None, weight: Tensor) -> Tensor:
    """A weight (outputs, inputs) laid out as the linear's own parameter, contiguous; its own inverse."""
    return weight.T.contiguous() if isinstance(linear, Conv1D) else weight


def not_linear(block: nn.Module, prefix: str) -> str:
    """The name of a matrix of a block that is no linear's weight and no side matter either; "" if there is none.

    Depthwise convolutions, embeddings and whatever is small beside the linears (state matrices, gates) is left as it
    is. Experts in 3-D parameters are not small: a walk over linears would leave most of the model as it is, unless they
    are split (`ctp.architectures.experts`). Their routers are side matter, whatever their size.
    """
    sizes: dict[str, int] = {}
    left = routers(block, prefix)
    for name, module in block.named_modules(prefix=prefix):
        if name in left or is_linear(module) or isinstance(module, nn.Embedding) or _depthwise(module):
            continue
        for field, parameter in module.named_parameters(recurse=False):
            if parameter.ndim == 3 and len(parameter) == getattr(module, "num_experts", None):
                return f"{name}.{field}"
            if parameter.squeeze().ndim >= 2:
                sizes[f"{name}.{field}"] = parameter.numel()
    known = sum(matrix(m).numel() for m in linears(block).values())
    return max(sizes, key=sizes.__getitem__) if sum(sizes.values()) > SMALL * known else ""


def _depthwise(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv1d) and module.groups == module.in_channels


def large(left: Iterable[str], found: Mapping[str, nn.Module]) -> bool:
    """Would a walk that leaves these of the linears as they are leave more than side matters?"""
    sizes = {n: matrix(m).numel() for n, m in found.items()}
    idle = sum(sizes[n] for n in left)
    return idle > SMALL * (sum(sizes.values()) - idle)


def shared_weight(model: nn.Module, found: Mapping[str, nn.Module]) -> tuple[str, str] | None:
    """Two names of one parameter of which at least one is the weight of a linear in `found`; None if there is none.

    found: linears of the model by their names in it.
    """
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for linear in found.values():
        if len(same := names.get(id(linear.weight), [])) > 1:
            return same[0], same[1]
    return None
