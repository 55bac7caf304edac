"""Norms and gated MLPs of a frozen model, as functions that keep for the backward pass only what it cannot do without.

Nothing here computes a gradient of a weight. What a module computes stays what it was, up to rounding.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.utils.checkpoint import checkpoint

from ctp.compression.blocks import decoder_blocks


class _RMSNorm(Function):
    """w x / sqrt(mean(x^2) + eps) over the last dimension, in fp32; keeps x and one number a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        inverse = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return torch.mul(x, inverse).to(x.dtype) * weight

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        g, unit = grads[0] * weight, torch.mul(x, inverse)
        mean = (g * unit).mean(-1, keepdim=True)
        return unit.mul_(mean).sub_(g).mul_(inverse.neg()).to(x.dtype), None, None


class _SwiGLU(Function):
    """silu(gate) * up; keeps both factors."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        g = grads[0]
        return torch.ops.aten.silu_backward(g * up, gate), F.silu(gate).mul_(g)


class _GatedMLP(Function):
    """down(silu(gate(x)) * up(x)) that keeps x alone: gate and up are computed again, the last product is not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        ctx.save_for_backward(x, gate, up, down)
        return F.linear(F.silu(F.linear(x, gate)).mul_(F.linear(x, up)), down)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, gate, up, down = ctx.saved_tensors
        g, a, b = grads[0] @ down, F.linear(x, gate), F.linear(x, up)
        dx = (F.silu(a).mul_(g)) @ up
        return dx.add_(torch.ops.aten.silu_backward(g.mul_(b), a) @ gate), None, None, None


def _norm(module: nn.Module, x: Tensor) -> Tensor:
    return _RMSNorm.apply(x, module.weight, module.variance_epsilon)


def _mlp(module: Any, x: Tensor) -> Tensor:
    return module.down_proj(_SwiGLU.apply(module.gate_proj(x), module.up_proj(x)))


def _frugal_mlp(module: Any, x: Tensor) -> Tensor:
    device = x.device.type
    weights = [m.weight for m in (module.gate_proj, module.up_proj, module.down_proj)]
    if torch.is_autocast_enabled(device):
        x, *weights = (t.to(torch.get_autocast_dtype(device)) for t in (x, *weights))
    with torch.autocast(device, enabled=False):
        return _GatedMLP.apply(x, *weights)


def _is_norm(module: nn.Module) -> bool:
    return type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon")


def _is_gated(module: Any) -> bool:
    linears = [getattr(module, n, None) for n in ("gate_proj", "up_proj", "down_proj")]
    act = type(getattr(module, "act_fn", None)).__name__
    return act in ("SiLU", "SiLUActivation") and all(isinstance(x, nn.Module) for x in linears)


def _is_plain(module: Any) -> bool:
    """No bias, and linears of torch's own class and forward: nothing has been put around them."""
    linears = (module.gate_proj, module.up_proj, module.down_proj)
    return all(type(x) is nn.Linear and x.bias is None and "forward" not in vars(x) for x in linears)


def replacements(model: nn.Module, fused: bool, recompute: bool) -> dict[nn.Module, Callable[..., Any]]:
    """The forward that each module is to have instead of its own.

    fused: norms and gated MLPs as here; whether that computes the same is the caller's to check, as a module is known
    by the names of its parts. recompute: only the inputs of MLPs wait for the backward pass; where a block has no MLP
    that allows it, only the block's.
    """
    found: dict[nn.Module, Callable[..., Any]] = {}
    if fused:
        found |= {m: partial(_norm, m) for m in model.modules() if _is_norm(m)}
    for block in decoder_blocks(model)[1] if fused or recompute else ():
        gated = [m for m in block.modules() if fused and _is_gated(m)]
        frugal = recompute and bool(gated) and all(map(_is_plain, gated))
        found |= {m: partial(_frugal_mlp if frugal else _mlp, m) for m in gated}
        if recompute and not frugal:
            found[block] = partial(checkpoint, block.forward, use_reentrant=False)
    return found


@contextmanager
def replaced(forwards: dict[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """The modules have these forwards; their own again on the way out."""
    before = {m: vars(m).get("forward") for m in forwards}
    try:
        for module, forward in forwards.items():
            module.forward = forward
        yield
    finally:
        for module, own in before.items():
            if own is None:
                vars(module).pop("forward", None)
            else:
                module.forward = own


@contextmanager
def in_dtype(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Frozen linears hold their weights as `dtype`, to which autocast would round them at every use."""
    linears = [m for m in model.modules() if isinstance(m, nn.Linear) and not m.weight.requires_grad]
    before = [(m, m.weight, m.bias) for m in linears if m.weight.dtype != dtype]
    try:
        for m, weight, bias in before:
            m.weight = nn.Parameter(weight.detach().to(dtype), requires_grad=False)
            if bias is not None:
                m.bias = nn.Parameter(bias.detach().to(dtype), requires_grad=False)
        yield
    finally:
        for m, weight, bias in before:
            m.weight, m.bias = weight, bias
