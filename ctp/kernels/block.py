"""A frozen decoder block of LLaMA's kind as one autograd function, which fixes the order and the memory of its steps.

Shapes: n positions, hidden size d, heads of e numbers (H for queries, fewer for keys and values), MLP width f.

Between the tensors that two blocks keep for the backward pass, nothing else is allocated: freed later, it would leave
holes in the heap, as much again as what is kept. Intermediate results go into shared buffers, and what is quick to
compute is computed again in the backward pass.
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
from ctp.kernels.attention import Layout, packed_attention

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
NORMS = ("input_layernorm", "post_attention_layernorm")
# Numbers of the scratch buffers. Attention uses 0 to 2 as well, when nothing else is in them.
GATE, UP, PRODUCT, GRADIENT, NARROW, WIDE, OTHER = range(7)


def forward_of(block: Any) -> Callable[..., Tensor] | None:
    """The function that computes `block` faster than its own forward; None if it has other parts than LLaMA's.

    Parts are recognised by name: the caller must check that the results agree.
    """
    parts = dict(block.named_children())
    if set(parts) != {"self_attn", "mlp", *NORMS}:
        return None
    attention, mlp = (dict(parts[name].named_children()) for name in ("self_attn", "mlp"))
    if set(attention) != set(LINEARS[0]) or set(mlp) - {"act_fn"} != set(LINEARS[1]):
        return None
    linears = [attention[n] for n in LINEARS[0]] + [mlp[n] for n in LINEARS[1]]
    plain = all(map(_is_frozen, linears)) and all(x.bias is None for x in linears[3:])
    usual = is_silu(parts["mlp"]) and all(is_norm(parts[n]) for n in NORMS)
    if not (plain and usual and "forward" not in vars(block) and all(map(_untouched, list(block.modules())[1:]))):
        return None
    return partial(_forward, block)


def is_norm(module: Any) -> bool:
    """Is it an RMSNorm with the usual names?"""
    return type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon")


def is_silu(mlp: Any) -> bool:
    """Is the gate's function SiLU?"""
    return type(getattr(mlp, "act_fn", None)).__name__ in ("SiLU", "SiLUActivation")


def _untouched(module: nn.Module) -> bool:
    """Has the module neither hooks nor a forward of its own instance?"""
    return not ("forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks)


def _is_frozen(linear: Any) -> bool:
    return type(linear) in (nn.Linear, PackedLinear) and not any(p.requires_grad for p in linear.parameters())


def _forward(
    module: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, *,
    position_embeddings: tuple[Tensor, Tensor], layout: Layout, **other: Any,
) -> Tensor:  # fmt: skip
    """As transformers calls a block, on hidden states (1, n, d). Raises NotImplementedError for a mask."""
    if attention_mask is not None:
        raise NotImplementedError(f"{type(module).__name__}: attention with a mask")
    norms = module.input_layernorm, module.post_attention_layernorm
    if hidden_states.is_cuda and llama.available():
        return llama.forward(module, norms, hidden_states, position_embeddings, layout)
    h, device = hidden_states[0], hidden_states.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else h.dtype
    cos, sin = (x[0, :, None].to(dtype) for x in position_embeddings)
    block = _Block(module.self_attn, module.mlp, norms, layout, cos, sin, dtype)
    with torch.autocast(device, enabled=False):
        return _Function.apply(h, block)[None]


@dataclass(frozen=True, eq=False)
class _Block:
    """The modules of one block, and what it needs besides its input.

    cos, sin: of the rotary embedding, (n, 1, e). dtype: of all matrix products.
    """

    attention: Any
    mlp: Any
    norms: tuple[Any, Any]
    layout: Layout
    cos: Tensor
    sin: Tensor
    dtype: torch.dtype

    def buffer(self, which: int, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Scratch buffer number `which`, uninitialised; whatever was in it is overwritten."""
        return self.layout.scratch.take(which, shape, self.cos.device, dtype or self.dtype)

    def weight(self, linear: nn.Linear | PackedLinear) -> Tensor:
        """(outputs, inputs) in the block's dtype; unpacked at every call if it is packed."""
        return linear.dense(self.dtype) if isinstance(linear, PackedLinear) else linear.weight.to(self.dtype)

    def bias(self, linear: nn.Linear | PackedLinear) -> Tensor | None:
        """(outputs,) in the block's dtype; None without one."""
        if isinstance(linear, PackedLinear):
            return linear.offset(self.dtype)
        return None if linear.bias is None else linear.bias.to(self.dtype)


class _Function(Function):
    """h -> m = h + attention(norm(h)), then m + MLP(norm(m)), for the hidden states h (n, d) of all positions."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, block: _Block) -> Tensor:
        learning, (n, d) = ctx.needs_input_grad[0], h.shape
        attention, mlp = block.attention, block.mlp

        heads = [x.requires_grad_(learning) for x in _heads(h, block)]  # queries, keys, values: (n, heads, e) each
        with torch.set_grad_enabled(learning):  # attention's own graph is kept for the backward pass
            attended = _attend(heads, block)  # (n, H, e)
        w_out = block.weight(attention.o_proj)  # (d, H e)
        projected = torch.mm(attended.detach().flatten(1), w_out.T, out=block.buffer(NARROW, n, d))  # (n, d)
        middle = h + projected  # (n, d)

        gate, up = _gate_and_up(middle, block, block.layout.keep)  # (n, f) each
        product = torch.ops.aten.silu.out(gate, out=block.buffer(PRODUCT, *gate.shape)).mul_(up)  # (n, f)
        down = torch.mm(product, block.weight(mlp.down_proj).T, out=block.buffer(NARROW, n, d))  # (n, d)
        out = middle + down

        if learning:
            for x in heads:
                x.data = x.new_empty(0)  # attention keeps what it needs, in an order of its own
            ctx.block, ctx.heads, ctx.attended = block, heads, get_gradient_edge(attended)
            ctx.save_for_backward(h, middle, *((gate, up) if block.layout.keep else ()))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        block: _Block = ctx.block
        h, middle, *kept = ctx.saved_tensors
        (d_out,) = grads  # (n, d), as are all gradients below but those of the heads
        with torch.autocast(h.device.type, enabled=False):
            gate, up = kept or _gate_and_up(middle, block, keep=False)
            d_normed = _mlp_gradient(d_out, gate, up, block)
            d_middle = _norm_gradient(d_normed, middle, block.norms[1], d_out, block)
            d_attended = d_middle.to(block.dtype) @ block.weight(block.attention.o_proj)  # (n, H e)
            d_attended = d_attended.unflatten(1, (-1, block.attention.head_dim))
            d_heads = torch.autograd.grad([ctx.attended], ctx.heads, [d_attended])
            d_normed = _heads_gradient(d_heads, h, block)
            return _norm_gradient(d_normed, h, block.norms[0], d_middle, block), None


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x^2) + eps) over the last dimension, which stays with length 1; in fp32."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    return length.square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def _normed(x: Tensor, norm: Any, block: _Block) -> Tensor:
    """w x / sqrt(mean(x^2) + eps) for x (n, d), in the block's dtype; it uses the narrow buffer."""
    y = block.buffer(NARROW, *x.shape, dtype=x.dtype)
    return torch.mul(x, inverse_rms(x, norm.variance_epsilon), out=y).mul_(norm.weight).to(block.dtype)


def _norm_gradient(grad: Tensor, x: Tensor, norm: Any, base: Tensor, block: _Block) -> Tensor:
    """base + the gradient for the norm's input x, given that for its output; all (n, d). A new tensor in x's dtype."""
    inverse = inverse_rms(x, norm.variance_epsilon)  # (n, 1)
    g = torch.mul(grad, norm.weight, out=block.buffer(WIDE, *x.shape, dtype=torch.float32))
    unit = torch.mul(x, inverse, out=block.buffer(OTHER, *x.shape, dtype=torch.float32))
    mean = torch.linalg.vecdot(g, unit)[:, None].div_(x.shape[-1])
    return g.addcmul_(unit, mean, value=-1).mul_(inverse).to(x.dtype, copy=True).add_(base)


def _heads(h: Tensor, block: _Block) -> list[Tensor]:
    """Queries, keys (both rotated) and values (n, heads, e) of the hidden states h (n, d)."""
    attention = block.attention
    x = _normed(h, block.norms[0], block)
    q, k = (_rotated_head(x, linear, block) for linear in (attention.q_proj, attention.k_proj))
    v = F.linear(x, block.weight(attention.v_proj), block.bias(attention.v_proj))
    return [q, k, v.view(len(x), -1, attention.head_dim)]


def _rotated_head(x: Tensor, linear: nn.Linear | PackedLinear, block: _Block) -> Tensor:
    """linear(x) for x (n, d) as heads (n, heads, e), rotated: a new tensor."""
    w, bias = block.weight(linear), block.bias(linear)
    y = torch.mm(x, w.T, out=block.buffer(PRODUCT, len(x), len(w)))
    y = (y if bias is None else y.add_(bias)).view(len(x), -1, block.attention.head_dim)
    return _rotate(y, block, torch.empty_like(y))


def _rotate(x: Tensor, block: _Block, out: Tensor, back: bool = False) -> Tensor:
    """Rotary embedding of x (n, heads, e): each first half against its second. back: the transposed rotation."""
    half, sign, sin = x.shape[-1] // 2, 1 if back else -1, block.sin
    torch.mul(x, block.cos, out=out)
    first, last = (sin[..., half:], sin[..., :half]) if back else (sin[..., :half], sin[..., half:])
    out[..., :half].addcmul_(x[..., half:], first, value=sign)
    out[..., half:].addcmul_(x[..., :half], last, value=-sign)
    return out


def _attend(heads: list[Tensor], block: _Block) -> Tensor:
    """Attention's output (n, H, e) for queries, keys and values (n, heads, e)."""
    attention = block.attention
    window = getattr(attention, "sliding_window", None)
    q, k, v = (x.transpose(0, 1)[None] for x in heads)
    out, _ = packed_attention(
        attention, q, k, v, None, scaling=attention.scaling, layout=block.layout, sliding_window=window
    )
    return out[0]


def _gate_and_up(x: Tensor, block: _Block, keep: bool) -> tuple[Tensor, Tensor]:
    """gate(norm(x)) and up(norm(x)), each (n, f), of x (n, d). keep: as new tensors, not in the buffers."""
    normed = _normed(x, block.norms[1], block)

    def product(which: int, linear: nn.Linear | PackedLinear) -> Tensor:
        w = block.weight(linear)  # (f, d)
        out = normed.new_empty(len(x), len(w)) if keep else block.buffer(which, len(x), len(w))
        return torch.mm(normed, w.T, out=out)

    return product(GATE, block.mlp.gate_proj), product(UP, block.mlp.up_proj)


def _mlp_gradient(d_out: Tensor, gate: Tensor, up: Tensor, block: _Block) -> Tensor:
    """The gradient (n, d) for the MLP's input, in the narrow buffer, given that for its output."""
    d_product = torch.mm(
        d_out.to(block.dtype), block.weight(block.mlp.down_proj), out=block.buffer(PRODUCT, *gate.shape)
    )
    d_up = torch.ops.aten.silu.out(gate, out=block.buffer(GRADIENT, *gate.shape)).mul_(d_product)
    d_in = torch.mm(d_up, block.weight(block.mlp.up_proj), out=block.buffer(NARROW, *d_out.shape))
    d_gate = torch.ops.aten.silu_backward.grad_input(d_product.mul_(up), gate, grad_input=d_up)
    return d_in.addmm_(d_gate, block.weight(block.mlp.gate_proj))


def _heads_gradient(d_heads: tuple[Tensor, ...], h: Tensor, block: _Block) -> Tensor:
    """The gradient (n, d) for the attention's input, in the narrow buffer, given those for queries, keys and values."""
    attention, d_in = block.attention, block.buffer(NARROW, *h.shape)
    for i, (grad, linear) in enumerate(
        zip(d_heads, (attention.q_proj, attention.k_proj, attention.v_proj), strict=True)
    ):
        turned = grad if i == 2 else _rotate(grad, block, block.buffer(PRODUCT, *grad.shape), back=True)
        flat, w = turned.flatten(1), block.weight(linear)
        d_in = d_in.addmm_(flat, w) if i else torch.mm(flat, w, out=d_in)
    return d_in
