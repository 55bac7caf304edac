"""A frozen decoder block of LLaMA's kind as one function, with the order and the memory of its steps its own.

Between two blocks' kept tensors nothing else is allocated: freed in between, it would stay in the heap as holes, as
much again as what is kept. The parts that are short to compute are computed again.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.graph import get_gradient_edge

from ctp.formats.packed import PackedLinear
from ctp.kernels import llama
from ctp.kernels.attention import Layout, Scratch, packed_attention

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
GATE, UP, PRODUCT, GRADIENT, NARROW, WIDE, OTHER = range(7)  # numbers of buffers; attention has 0 to 2
Linear = nn.Linear | PackedLinear


@dataclass(frozen=True, eq=False)
class _Block:
    """The modules of one block, and what it needs besides its input."""

    attention: Any
    mlp: Any
    norms: tuple[Any, Any]
    layout: Layout
    cos: Tensor
    sin: Tensor
    dtype: torch.dtype

    @property
    def scratch(self) -> Scratch:
        return self.layout.scratch


def forward_of(module: Any) -> Callable[..., Tensor] | None:
    """What computes the block `module` instead of its own forward; None where it is not built of these parts.

    Whether it computes the same is the caller's to check: blocks are told by the names of their parts.
    """
    norms = ("input_layernorm", "post_attention_layernorm")
    parts = dict(module.named_children())
    if set(parts) != {"self_attn", "mlp", *norms}:
        return None
    inner = [dict(parts[n].named_children()) for n in ("self_attn", "mlp")]
    if set(inner[0]) != set(LINEARS[0]) or set(inner[1]) - {"act_fn"} != set(LINEARS[1]):
        return None
    linears = [known[n] for known, names in zip(inner, LINEARS, strict=True) for n in names]
    plain = all(map(_is_frozen, linears)) and all(x.bias is None for x in linears[3:])
    usual = is_silu(parts["mlp"]) and all(is_norm(parts[n]) for n in norms)
    if not (plain and usual and "forward" not in vars(module) and all(map(_untouched, list(module.modules())[1:]))):
        return None
    return partial(_forward, module, (parts[norms[0]], parts[norms[1]]))


def is_norm(module: Any) -> bool:
    """Is it an RMSNorm with the usual names?"""
    return type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon")


def is_silu(mlp: Any) -> bool:
    """Is the gate's function SiLU?"""
    return type(getattr(mlp, "act_fn", None)).__name__ in ("SiLU", "SiLUActivation")


def _untouched(module: nn.Module) -> bool:
    """Does the module do what its class does, for all that is known?"""
    return not ("forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks)


def _is_frozen(linear: Any) -> bool:
    return type(linear) in (nn.Linear, PackedLinear) and not any(p.requires_grad for p in linear.parameters())


def _forward(
    module: Any, norms: tuple[Any, Any], hidden_states: Tensor, attention_mask: Tensor | None = None, *,
    position_embeddings: tuple[Tensor, Tensor], layout: Layout, **other: Any,
) -> Tensor:  # fmt: skip
    """As transformers calls a block: hidden states (1, n, d). Raises NotImplementedError where there is a mask."""
    if attention_mask is not None:
        raise NotImplementedError(f"{type(module).__name__}: attention with a mask")
    if hidden_states.is_cuda and llama.available():
        return llama.forward(module, norms, hidden_states, position_embeddings, layout)
    h, device = hidden_states[0], hidden_states.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else h.dtype
    cos, sin = (x[0, :, None].to(dtype) for x in position_embeddings)
    block = _Block(module.self_attn, module.mlp, norms, layout, cos, sin, dtype)
    with torch.autocast(device, enabled=False):
        return _Function.apply(h, block)[None]


class _Function(Function):
    """x + attention(norm(x)), then the same with the gated MLP: hidden states (n, d) of all positions."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, block: _Block) -> Tensor:
        keep = ctx.needs_input_grad[0]
        heads = [x.requires_grad_(keep) for x in _rotated_heads(h, block)]
        with torch.set_grad_enabled(keep):
            attended = _attend(heads, block)
        o = _weight(block.attention.o_proj, block)
        middle = h + torch.mm(attended.detach().flatten(1), o.T, out=_take(NARROW, h, block))
        factors = _factors(middle, block, block.layout.keep)
        a, b = factors
        product = torch.ops.aten.silu.out(a, out=_take(PRODUCT, a, block)).mul_(b)
        out = middle + torch.mm(product, _weight(block.mlp.down_proj, block).T, out=_take(NARROW, h, block))
        if keep:
            for x in heads:
                x.data = x.new_empty(0)  # attention keeps what it needs, in an order of its own
            ctx.block, ctx.heads, ctx.attended = block, heads, get_gradient_edge(attended)
            ctx.save_for_backward(h, middle, *(factors if block.layout.keep else ()))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        block: _Block = ctx.block
        h, middle, *factors = ctx.saved_tensors
        with torch.autocast(h.device.type, enabled=False):
            inner = _mlp_gradient(grads[0], middle, factors or _factors(middle, block, False), block)
            grad = _norm_gradient(inner, middle, block.norms[1], grads[0], block)
            outer = grad.to(block.dtype) @ _weight(block.attention.o_proj, block)
            outer = outer.unflatten(1, (-1, block.attention.head_dim))
            heads = torch.autograd.grad([ctx.attended], ctx.heads, [outer])
            inner = _heads_gradient(heads, h, block)
            return _norm_gradient(inner, h, block.norms[0], grad, block), None


def _take(which: int, like: Tensor, block: _Block, dtype: torch.dtype | None = None) -> Tensor:
    return block.scratch.take(which, like.shape, like.device, dtype or block.dtype)


def _weight(linear: Linear, block: _Block) -> Tensor:
    return linear.dense(block.dtype) if isinstance(linear, PackedLinear) else linear.weight.to(block.dtype)


def _bias(linear: Linear, block: _Block) -> Tensor | None:
    if isinstance(linear, PackedLinear):
        return linear.offset(block.dtype)
    return None if linear.bias is None else linear.bias.to(block.dtype)


def _normed(x: Tensor, norm: Any, block: _Block) -> Tensor:
    """w x / sqrt(mean(x^2) + eps) in the block's dtype, in the narrow buffer."""
    y = _take(NARROW, x, block, x.dtype)
    return torch.mul(x, inverse_rms(x, norm.variance_epsilon), out=y).mul_(norm.weight).to(block.dtype)


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x^2) + eps) over the last dimension, which stays with length 1; in fp32."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    return length.square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def _norm_gradient(grad: Tensor, x: Tensor, norm: Any, base: Tensor, block: _Block) -> Tensor:
    """The gradient for x of the norm's output's, plus base; a new tensor in x's dtype."""
    inverse = inverse_rms(x, norm.variance_epsilon)
    g = torch.mul(grad, norm.weight, out=_take(WIDE, x, block, torch.float32))
    unit = torch.mul(x, inverse, out=_take(OTHER, x, block, torch.float32))
    mean = torch.linalg.vecdot(g, unit)[:, None].div_(x.shape[-1])
    return g.addcmul_(unit, mean, value=-1).mul_(inverse).to(x.dtype, copy=True).add_(base)


def _rotated_heads(h: Tensor, block: _Block) -> list[Tensor]:
    """Queries, keys and values (n, heads, d) of the positions."""
    attention, heads = block.attention, []
    x = _normed(h, block.norms[0], block)
    for i, linear in enumerate((attention.q_proj, attention.k_proj, attention.v_proj)):
        w, bias = _weight(linear, block), _bias(linear, block)
        if i == 2:
            heads.append(F.linear(x, w, bias).view(len(x), -1, attention.head_dim))
            continue
        y = torch.mm(x, w.T, out=block.scratch.take(PRODUCT, (len(x), len(w)), x.device, x.dtype))
        y = (y if bias is None else y.add_(bias)).view(len(x), -1, attention.head_dim)
        heads.append(_rotate(y, block.cos, block.sin, torch.empty_like(y)))
    return heads


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor, back: bool = False) -> Tensor:
    """Rotary embedding of x (n, heads, d) by cos and sin (n, 1, d), halves against each other; back: its transpose."""
    half, sign = x.shape[-1] // 2, 1 if back else -1
    torch.mul(x, cos, out=out)
    first, last = (sin[..., half:], sin[..., :half]) if back else (sin[..., :half], sin[..., half:])
    out[..., :half].addcmul_(x[..., half:], first, value=sign)
    out[..., half:].addcmul_(x[..., :half], last, value=-sign)
    return out


def _attend(heads: list[Tensor], block: _Block) -> Tensor:
    """Attention's output (n, heads, d) for queries, keys and values like that."""
    attention = block.attention
    window = getattr(attention, "sliding_window", None)
    q, k, v = (x.transpose(0, 1)[None] for x in heads)
    out, _ = packed_attention(
        attention, q, k, v, None, scaling=attention.scaling, layout=block.layout, sliding_window=window
    )
    return out[0]


def _factors(x: Tensor, block: _Block, keep: bool) -> tuple[Tensor, Tensor]:
    """gate(norm(x)) and up(norm(x)); keep: in memory of their own."""
    x = _normed(x, block.norms[1], block)
    made = []
    for which, linear in ((GATE, block.mlp.gate_proj), (UP, block.mlp.up_proj)):
        w = _weight(linear, block)
        shape = (len(x), len(w))
        out = x.new_empty(shape) if keep else block.scratch.take(which, shape, x.device, x.dtype)
        made.append(torch.mm(x, w.T, out=out))
    return made[0], made[1]


def _mlp_gradient(grad: Tensor, middle: Tensor, factors: Any, block: _Block) -> Tensor:
    """The gradient for the MLP's input, in the narrow buffer."""
    a, b = factors
    g = torch.mm(grad.to(block.dtype), _weight(block.mlp.down_proj, block), out=_take(PRODUCT, a, block))
    silu = torch.ops.aten.silu.out(a, out=_take(GRADIENT, a, block)).mul_(g)
    dx = torch.mm(silu, _weight(block.mlp.up_proj, block), out=_take(NARROW, middle, block))
    da = torch.ops.aten.silu_backward.grad_input(g.mul_(b), a, grad_input=silu)
    return dx.addmm_(da, _weight(block.mlp.gate_proj, block))


def _heads_gradient(heads: tuple[Tensor, ...], h: Tensor, block: _Block) -> Tensor:
    """The gradient for the attention's input of that for its queries, keys and values; in the narrow buffer."""
    attention, out = block.attention, _take(NARROW, h, block)
    for i, (g, linear) in enumerate(zip(heads, (attention.q_proj, attention.k_proj, attention.v_proj), strict=True)):
        if i < 2:
            g = _rotate(g, block.cos, block.sin, _take(PRODUCT, g, block), back=True)
        flat, w = g.flatten(1), _weight(linear, block)
        out = out.addmm_(flat, w) if i else torch.mm(flat, w, out=out)
    return out
