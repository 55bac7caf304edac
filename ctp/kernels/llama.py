"""A decoder block of LLaMA's kind on a GPU, with liger-kernel's Triton kernels for all but the matrix products."""

from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ctp.formats.packed import PackedLinear
from ctp.kernels.attention import Layout, packed_attention
from ctp.machine import triton


@cache
def available() -> bool:
    """Is liger-kernel installed (`pip install ctp[gpu]`), and does Triton run?"""
    try:
        import liger_kernel.ops  # noqa: F401
    except ImportError:
        return False
    return triton.works()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """w x / sqrt(mean(x^2) + eps) over the last dimension."""
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    return LigerRMSNormFunction.apply(x, weight, eps, 0.0, "llama", False)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return LigerSiLUMulFunction.apply(gate, up)


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary embedding of q and k (1, heads, n, d), which are overwritten, by cos and sin (1, n, d)."""
    from liger_kernel.ops.rope import LigerRopeFunction

    return LigerRopeFunction.apply(q, k, cos, sin)


def forward(
    module: Any, norms: tuple[Any, Any], hidden: Tensor, position_embeddings: tuple[Tensor, Tensor], layout: Layout
) -> Tensor:
    """The block `module` over hidden states (1, n, d): x + attention(norm(x)), then the same with the gated MLP.

    Without `layout.keep` the MLP is computed again in the backward pass; with packed weights, attention is too.
    """
    attend = partial(_attend, module.self_attn, norms[0], layout, *position_embeddings)
    mlp = partial(_mlp, module.mlp, norms[1])
    if layout.keep or not torch.is_grad_enabled():
        return mlp(attend(hidden))
    if isinstance(module.mlp.down_proj, PackedLinear):
        return checkpoint(lambda x: mlp(attend(x)), hidden, use_reentrant=False)
    return checkpoint(mlp, attend(hidden), use_reentrant=False)


def _attend(attention: Any, norm: Any, layout: Layout, cos: Tensor, sin: Tensor, hidden: Tensor) -> Tensor:
    x = rms_norm(hidden, norm.weight, norm.variance_epsilon)
    heads = [
        linear(x).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj)
    ]
    q, k = rotate(heads[0], heads[1], cos.to(x.dtype), sin.to(x.dtype))
    window = getattr(attention, "sliding_window", None)
    out, _ = packed_attention(
        attention, q, k, heads[2], None, scaling=attention.scaling, layout=layout, sliding_window=window
    )
    return hidden + attention.o_proj(out.flatten(2))


def _mlp(mlp: Any, norm: Any, hidden: Tensor) -> Tensor:
    x = rms_norm(hidden, norm.weight, norm.variance_epsilon)
    return hidden + mlp.down_proj(silu_mul(mlp.gate_proj(x), mlp.up_proj(x)))
