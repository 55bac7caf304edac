"""The compressed form of one weight, and the check that it is what was asked for."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ctp.methods import Solver


@dataclass(frozen=True, eq=False)
class Layer:
    """One compressed weight of shape (outputs, inputs); tensors lie on the CPU.

    mask: bool (outputs, inputs), True where a weight is kept; None where nothing is pruned.
    Not quantized: bits, codes, scale, zero and g_idx are None; values holds the kept weights (kept,), row by row.
    Quantized: codes uint8 (outputs, inputs), 0 where pruned; scale float16 (outputs, groups); zero uint8
    (outputs, groups), None on a symmetric grid (zero point 2^(bits - 1)); g_idx int32 (inputs,) is the group of each
    input, None where groups are runs of inputs / groups inputs.
    """

    shape: tuple[int, int]
    bits: int | None = None
    codes: Tensor | None = None
    scale: Tensor | None = None
    zero: Tensor | None = None
    g_idx: Tensor | None = None
    mask: Tensor | None = None
    values: Tensor | None = None

    @property
    def kept(self) -> int:
        """Number of weights that are not pruned."""
        return self.shape[0] * self.shape[1] if self.mask is None else int(self.mask.sum())

    def groups(self) -> Tensor:
        """The group of each input, int64 (inputs,)."""
        assert self.scale is not None
        if self.g_idx is not None:
            return self.g_idx.long()
        return torch.arange(self.shape[1]) // (self.shape[1] // self.scale.shape[1])

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight as the model computes with it, (outputs, inputs), bit for bit."""
        if self.codes is None:
            assert self.values is not None
            if self.mask is None:
                return self.values.reshape(self.shape).to(dtype)
            weight = torch.zeros(self.shape, dtype=dtype)
            return weight.masked_scatter_(self.mask, self.values.to(dtype))
        assert self.scale is not None
        assert self.bits is not None
        zero = 2 ** (self.bits - 1) if self.zero is None else self.spread(self.zero).float()
        weight = (self.codes.float() - zero) * self.spread(self.scale).float()
        if self.mask is not None:
            weight.masked_fill_(~self.mask, 0)
        return weight.to(dtype)

    def spread(self, per_group: Tensor) -> Tensor:
        return per_group if per_group.shape[1] == 1 else per_group[:, self.groups()]


def check(layer: Layer, weight: Tensor, compression: Solver) -> None:
    """Raises ArithmeticError unless `weight`, as it lies in the model, is what `compression` promises.

    Weight equals the layer's dense form; pruned weights are exactly zero and as many as asked for; codes and zero
    points fit into the bits; every kept weight is on its grid.
    """
    weight = weight.detach().cpu()
    if not torch.equal(layer.dense(weight.dtype), weight):
        raise ArithmeticError("the model's weight differs from the compressed form")
    if not torch.isfinite(weight).all():
        raise ArithmeticError("a compressed weight is not finite")
    _check_pruned(layer, weight, compression)
    bits = getattr(compression, "bits", None)
    if layer.bits != bits:
        raise ArithmeticError(f"compressed to {layer.bits} bits, not {bits}")
    if bits is not None:
        _check_grid(layer, weight, bits)


def _check_pruned(layer: Layer, weight: Tensor, compression: Solver) -> None:
    sparsity, pattern = getattr(compression, "sparsity", None), getattr(compression, "pattern", None)
    if (layer.mask is not None) != (sparsity is not None or pattern is not None):
        raise ArithmeticError("mask and spec disagree about pruning")
    if layer.mask is None:
        return
    if torch.count_nonzero(weight[~layer.mask]):
        raise ArithmeticError("a pruned weight is not zero")
    if sparsity is not None and weight.numel() - layer.kept != round(sparsity * weight.numel()):
        raise ArithmeticError(f"{weight.numel() - layer.kept} of {weight.numel()} weights pruned, not {sparsity:.2%}")
    if pattern is not None:
        n, m = (int(v) for v in pattern.split(":"))
        if not (layer.mask.reshape(len(weight), -1, m).sum(-1) == m - n).all():
            raise ArithmeticError(f"a group of {m} inputs does not have {n} zeros")


def _check_grid(layer: Layer, weight: Tensor, bits: int) -> None:
    assert layer.codes is not None
    assert layer.scale is not None
    tops = [int(t.max()) for t in (layer.codes, layer.zero) if t is not None and t.numel()]
    if any(top >= 2**bits for top in tops):
        raise ArithmeticError(f"code or zero point {max(tops)} does not fit into {bits} bits")
    scale = layer.spread(layer.scale).float()
    zero = torch.full_like(scale, 2 ** (bits - 1)) if layer.zero is None else layer.spread(layer.zero).float()
    steps = weight.float() / scale
    # The model's dtype may round a grid point: bfloat16 by 2^-9 of its value.
    slack = 1e-6 if weight.dtype == torch.float32 else torch.finfo(weight.dtype).eps
    off = (steps - steps.round()).abs() > slack * steps.abs().clamp(min=1)
    code = steps.round() + zero
    if bool((off | (code < 0) | (code >= 2**bits)).any()):
        raise ArithmeticError("a weight is not on its quantization grid")
