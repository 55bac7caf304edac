"""Causal attention for learning: one row of positions holds k prompt rows, then b windows of t tokens.

The prompt attends to itself, every window to the prompt and to itself. The prompt is computed once, not b times.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.nn.attention.bias import causal_lower_right
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "ctp_packed"  # in transformers' registry of attention implementations
BLOCK = 128  # query rows that are computed together, without the keys after the last of them
OTHER = ("softcap", "s_aux", "position_bias")  # arguments of attention of another kind


class Scratch:
    """Buffers shared by all layers: allocated between tensors that are kept, they would leave holes in the heap."""

    def __init__(self) -> None:
        self._held: dict[tuple[int, torch.dtype, torch.device], Tensor] = {}

    def take(self, which: int, shape: Sequence[int], device: torch.device, dtype: torch.dtype) -> Tensor:
        """Buffer number `which` in this shape, uninitialised."""
        size, place = math.prod(shape), (which, dtype, device)
        held = self._held.get(place)
        if held is None or held.numel() < size:
            self._held[place] = held = torch.empty(size, dtype=dtype, device=device)
        return held[:size].view(shape)


@dataclass(frozen=True)
class Layout:
    """k prompt rows, then b windows of t tokens. keep: attention weights are kept for the backward pass.

    calls: the attention layers that have computed in this layout.
    """

    k: int
    b: int
    t: int
    keep: bool
    scratch: Scratch = field(repr=False, compare=False)
    calls: list[Any] = field(default_factory=list, repr=False, compare=False)

    def positions(self, device: torch.device) -> Tensor:
        """Position ids (1, k + b t): every window starts at k."""
        window = torch.arange(self.k, self.k + self.t, device=device)
        return torch.cat([torch.arange(self.k, device=device), window.repeat(self.b)])[None]


def packed_attention(
    module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *,
    scaling: float, layout: Layout, **other: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """As transformers calls it, with q (1, heads, n, d) and k, v (1, kv heads, n, d); returns (1, n, heads, d).

    Raises NotImplementedError for attention that is not plainly causal.
    """
    given = [n for n in OTHER if other.get(n) is not None]
    if (other.get("sliding_window") or layout.k + layout.t) < layout.k + layout.t:
        given.append("sliding_window")
    if given or mask is not None or other.get("dropout"):
        raise NotImplementedError(f"{type(module).__name__}: attention with {', '.join(given) or 'a mask or dropout'}")
    layout.calls.append(module)
    device = q.device.type
    if torch.is_autocast_enabled(device):
        q, k, v = (x.to(torch.get_autocast_dtype(device)) for x in (q, k, v))
    with torch.autocast(device, enabled=False):
        sizes = [layout.k, layout.b * layout.t]
        (qp, qw), (kp, kw), (vp, vw) = (x.split(sizes, 2) for x in (q, k, v))
        kw, vw = (torch.cat([p.expand(layout.b, -1, -1, -1), _windows(w, layout)], 2) for p, w in ((kp, kw), (vp, vw)))
        windows = causal_attention(_windows(qw, layout), kw, vw, scaling, layout.keep, layout.scratch)
        out = windows.transpose(1, 2).flatten(0, 1)[None]
        if layout.k:
            prompt = causal_attention(qp, kp, vp, scaling, layout.keep, layout.scratch)
            out = torch.cat([prompt.transpose(1, 2), out], 1)
    return out, None


def _windows(x: Tensor, layout: Layout) -> Tensor:
    """(1, heads, b t, d) as (b, heads, t, d)."""
    return x[0].unflatten(1, (layout.b, layout.t)).transpose(0, 1)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, keep: bool, scratch: Scratch) -> Tensor:
    """softmax(scale q k^T) v for q (b, heads, t, d), and k, v (b, kv heads, s, d) with s >= t: (b, heads, t, d).

    The last key is the last query's. keep: the b x heads x t x s weights are kept for the backward pass, on a CPU.
    """
    if q.device.type == "cpu":
        return _Attention.apply(q, k, v, scale, keep, scratch)
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=causal_lower_right(q.shape[2], k.shape[2]), scale=scale)


class _Attention(Function):
    """Matrix products over blocks of queries: torch's CPU kernel takes twice the time in bfloat16.

    Query heads that share keys are one matrix of (heads / kv heads) x rows. Scores and weights have q's dtype.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, keep: bool, scratch: Scratch) -> Tensor:
        b, _heads, t, d = q.shape
        # Contiguous: a view would keep all positions of the layer in memory.
        grouped = q.reshape(b * k.shape[1], -1, t, d).contiguous()
        keys, values = (x.reshape(-1, *x.shape[2:]).contiguous() for x in (k, v))
        out, weights = torch.empty_like(grouped), []
        for i in range(0, t, BLOCK):
            w = _weights(grouped, keys, i, scale, scratch, keep)
            out[:, :, i : i + BLOCK] = torch.bmm(w, values[:, : w.shape[2]]).view_as(grouped[:, :, i : i + BLOCK])
            weights.append(w)
        ctx.save_for_backward(grouped, keys, values, *(weights if keep else ()))
        ctx.scale, ctx.scratch, ctx.shapes = scale, scratch, (q.shape, k.shape)
        return out.view(q.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grouped, keys, values, *weights = ctx.saved_tensors
        take = ctx.scratch.take
        grad = grads[0].reshape(grouped.shape)
        dq, dk, dv = torch.empty_like(grouped), torch.empty_like(keys), torch.empty_like(values)
        for i in reversed(range(0, grouped.shape[2], BLOCK)):  # the last block sees all keys: it writes first
            w = weights[i // BLOCK] if weights else _weights(grouped, keys, i, ctx.scale, ctx.scratch, keep=False)
            some, seen, add = slice(i, i + BLOCK), w.shape[2], float(w.shape[2] < keys.shape[1])
            g, q = grad[:, :, some].flatten(1, 2), grouped[:, :, some].flatten(1, 2)
            dv[:, :seen].baddbmm_(w.transpose(1, 2), g, beta=add)
            dw = torch.bmm(g, values[:, :seen].transpose(1, 2), out=take(0, w.shape, w.device, w.dtype))
            ds = torch._softmax_backward_data(dw, w, -1, w.dtype, grad_input=take(2, w.shape, w.device, w.dtype))
            dk[:, :seen].baddbmm_(ds.transpose(1, 2), q, beta=add, alpha=ctx.scale)
            dq[:, :, some] = torch.bmm(ds, keys[:, :seen]).mul_(ctx.scale).view_as(dq[:, :, some])
        shape_q, shape_k = ctx.shapes
        return dq.view(shape_q), dk.view(shape_k), dv.view(shape_k), None, None, None


def _weights(grouped: Tensor, keys: Tensor, start: int, scale: float, scratch: Scratch, keep: bool) -> Tensor:
    """Attention weights (n, heads of a group x rows, keys seen) of the block of queries at `start`.

    keep: as a new tensor, not in buffer 1.
    """
    t, s = grouped.shape[2], keys.shape[1]
    stop = min(start + BLOCK, t)
    rows, seen = stop - start, s - t + stop
    q = grouped[:, :, start:stop].flatten(1, 2)
    shape = (*q.shape[:2], seen)
    scores = scratch.take(0, shape, q.device, q.dtype)
    out = q.new_empty(shape) if keep else scratch.take(1, shape, q.device, q.dtype)
    bias = torch.full((rows, seen), -torch.inf, dtype=grouped.dtype).triu_(seen - rows + 1).repeat(grouped.shape[1], 1)
    torch.baddbmm(bias, q, keys[:, :seen].transpose(1, 2), alpha=scale, out=scores)
    return torch.softmax(scores, -1, out=out)


ALL_ATTENTION_FUNCTIONS.register(NAME, packed_attention)
