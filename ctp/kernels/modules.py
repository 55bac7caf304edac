"""Norms and gated MLPs of a frozen model as functions that keep little for the backward pass.

They have no gradients of weights. Results stay the same, up to rounding.
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
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from ctp.architectures.blocks import decoder_blocks
from ctp.formats.packed import PackedExperts, PackedLinear
from ctp.kernels import llama
from ctp.kernels.block import LINEARS, forward_of, inverse_rms, is_norm, is_silu


class _RMSNorm(Function):
    """w x / sqrt(mean(x^2) + eps) over the last dimension, in fp32; keeps x and one number a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        inverse = inverse_rms(x, eps)
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


def _norm(module: Any, x: Tensor) -> Tensor:
    if x.is_cuda and llama.available():
        return llama.rms_norm(x, module.weight, module.variance_epsilon)
    return _RMSNorm.apply(x, module.weight, module.variance_epsilon)


def _mlp(module: Any, x: Tensor) -> Tensor:
    if x.is_cuda and llama.available():
        return module.down_proj(llama.silu_mul(module.gate_proj(x), module.up_proj(x)))
    return module.down_proj(_SwiGLU.apply(module.gate_proj(x), module.up_proj(x)))


def _is_gated(module: Any) -> bool:
    linears = [getattr(module, n, None) for n in LINEARS[1]]
    return is_silu(module) and all(isinstance(x, nn.Module) for x in linears)


def text_model(model: Any) -> Any:
    """The part that has the decoder blocks, where a model reads images or sound as well."""
    return model.get_decoder() if hasattr(model.config, "text_config") else model


def _blocks(model: nn.Module) -> list[nn.Module]:
    """The decoder blocks; if they are in no single list, what transformers itself would compute again."""
    try:
        return list(decoder_blocks(text_model(model))[1])
    except ValueError:
        return [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]


def replacements(model: nn.Module, fused: bool, recompute: bool) -> dict[nn.Module, Callable[..., Any]]:
    """The forward that each module gets instead of its own.

    fused: blocks are one function (ctp.kernels.block) if possible, else their norms and gated MLPs are. Modules are
    recognised by the names of their parts: the caller must check the results. recompute: other blocks keep only their
    input for the backward pass.
    """
    found: dict[nn.Module, Callable[..., Any]] = {}
    if fused:
        found |= {m: partial(_norm, m) for m in model.modules() if is_norm(m)}
        found |= {m: partial(_mlp, m) for m in model.modules() if _is_gated(m)}
    for block in _blocks(model) if fused or recompute else ():
        whole = forward_of(block) if fused else None
        if whole is not None:
            found[block] = whole
        elif recompute:
            found[block] = partial(checkpoint, block.forward, use_reentrant=False)
    return found


@contextmanager
def replaced(forwards: dict[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """The modules have these forwards, and their own again on the way out."""
    before = {m: vars(m).get("forward") for m in forwards}
    try:
        for module, forward in forwards.items():
            module.forward = forward
        yield
    finally:
        for module, original in before.items():
            if original is None:
                vars(module).pop("forward", None)
            else:
                module.forward = original


@contextmanager
def rounded_weights(model: nn.Module, dtype: torch.dtype, held: torch.dtype) -> Iterator[None]:
    """Frozen linears are rounded once to `dtype`, as autocast would at every use, and stored as `held`.

    If that is another type, so that autocast is off, experts and other matrices are rounded too.
    """
    linears = [m for m in model.modules() if isinstance(m, nn.Linear) and not m.weight.requires_grad]
    others = [(m, n, p) for m in model.modules() for n, p in m.named_parameters(recurse=False)
              if held != dtype and not p.requires_grad and (p.ndim == 3 or isinstance(m, Conv1D))]  # fmt: skip
    left = {x for m in model.modules() if isinstance(m, PackedExperts) and held == dtype for x in m.linears}
    packed = [m for m in model.modules() if isinstance(m, PackedLinear) and m not in left]
    before = [(m, m.weight, m.bias) for m in linears]
    try:
        for p in packed:
            p.rounded = dtype
        for m, name, parameter in others:
            setattr(m, name, _rounded(parameter, dtype, held))
        for m, weight, bias in before:
            m.weight = _rounded(weight, dtype, held)
            if bias is not None:
                m.bias = _rounded(bias, dtype, held)
        yield
    finally:
        for m, weight, bias in before:
            m.weight, m.bias = weight, bias
        for p in packed:
            p.rounded = None
        for m, name, parameter in others:
            setattr(m, name, parameter)


def _rounded(parameter: Any, dtype: torch.dtype, held: torch.dtype) -> Any:
    """The parameter itself if rounding changes nothing: no second copy then."""
    value = parameter.detach().to(dtype).to(held)
    same = value.dtype == parameter.dtype and torch.equal(value, parameter)
    return parameter if same else nn.Parameter(value, requires_grad=False)
