"""The compressed form of one weight, and the check that it is what was requested."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ctp.architectures.linears import all_finite
from ctp.cells import Solver
from ctp.formats.bits import INTEGERS, chunk


@dataclass(frozen=True, eq=False)
class Layer:
    """One compressed weight of shape (outputs, inputs); its tensors are on one device.

    mask: bool (outputs, inputs), True where a weight is kept; None where nothing is pruned.
    Not quantized: bits, codes, scale, zero and g_idx are None; values holds the kept weights (kept,), row by row.
    Quantized to 1 to 8 bits: codes uint8 (outputs, inputs), 0 where pruned; scale float16, bfloat16 or float32
    (outputs, groups), of any sign; zero uint8 (outputs, groups), None on a symmetric grid (zero point 2^(bits - 1));
    g_idx int32 (inputs,) is the group of each input, None where groups are runs of inputs / groups inputs.
    Formats of others, whose codes have no zero point: table float32 (2^bits,), the numbers that codes stand for; shift
    float32 (outputs, groups), what is added in the end.
    """

    shape: tuple[int, int]
    bits: int | None = None
    codes: Tensor | None = None
    scale: Tensor | None = None
    zero: Tensor | None = None
    g_idx: Tensor | None = None
    mask: Tensor | None = None
    values: Tensor | None = None
    table: Tensor | None = None
    shift: Tensor | None = None

    @property
    def kept(self) -> int:
        """Number of weights that are not pruned."""
        return self.shape[0] * self.shape[1] if self.mask is None else int(self.mask.count_nonzero())

    def to(self, device: torch.device | str) -> "Layer":
        """The same with its tensors on another device."""
        moved = {n: value.to(device) for n, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **moved)  # type: ignore[arg-type]

    def groups(self) -> Tensor:
        """The group of each input, int64 (inputs,)."""
        assert self.scale is not None
        if self.g_idx is not None:
            return self.g_idx.long()
        return torch.arange(self.shape[1], device=self.scale.device) // (self.shape[1] // self.scale.shape[1])

    def zero_points(self) -> Tensor:
        """The zero points (outputs, groups), uint8, of a symmetric grid too."""
        assert self.bits is not None
        assert self.scale is not None
        if self.zero is not None:
            return self.zero
        return torch.full_like(self.scale, 2 ** (self.bits - 1), dtype=torch.uint8)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight as the model computes with it, (outputs, inputs), bit for bit: (code - zero) * scale in float32
        (table[code] * scale, code * scale + shift), 0 where pruned, rounded once to dtype.
        """
        if self.codes is None:
            assert self.values is not None
            values = self.values.to(dtype)
            return values.reshape(self.shape) if self.mask is None else scatter_kept(values, self.mask)
        assert self.scale is not None
        assert self.bits is not None
        weight = torch.empty(self.shape, dtype=dtype, device=self.codes.device)
        rows = max(1, chunk(weight.numel(), weight.device) // max(1, self.shape[1]))
        for at in range(0, self.shape[0], rows):
            part = slice(at, at + rows)
            scale = self.spread(self.scale[part])
            steps = self._steps(part, scale.shape[1]).mul_(scale)
            if self.shift is not None:
                steps.add_(self.spread(self.shift[part]))
            weight[part] = steps.flatten(1)
            if self.mask is not None:  # times 0 or 1 as integers: masked_fill_ takes ten times as long on a CPU
                weight[part].view(INTEGERS[dtype.itemsize]).mul_(self.mask[part])
        return weight

    def _steps(self, part: slice, runs: int) -> Tensor:
        """code - zero, or what the table has for it, of some rows: float32 (rows, runs, inputs / runs)."""
        assert self.codes is not None
        assert self.bits is not None
        if self.table is not None:
            return self.table[self.codes[part].int()].unflatten(1, (runs, -1))
        if self.shift is not None:
            return self.codes[part].float().unflatten(1, (runs, -1))
        zero = 2 ** (self.bits - 1) if self.zero is None else self.spread(self.zero[part])
        return self.codes[part].float().unflatten(1, (runs, -1)).sub_(zero)

    def spread(self, per_group: Tensor) -> Tensor:
        """Scales or zero points (n, groups) as float32 (n, runs, 1), one for each run of inputs / runs inputs."""
        per_run = per_group.float()
        if self.g_idx is not None:
            per_run = per_run.index_select(1, self.groups())  # on a CPU faster than indexing by [:, groups]
        return per_run.unsqueeze(2)


def gather_kept(weight: Tensor, mask: Tensor) -> Tensor:
    """weight[mask]: the kept ones (kept,) of (outputs, inputs), row by row."""
    step = chunk(mask.numel(), mask.device)
    pieces = zip(weight.reshape(-1).split(step), mask.reshape(-1).split(step), strict=True)
    return torch.cat([piece[_kept(kept)] for piece, kept in pieces])


def scatter_kept(values: Tensor, mask: Tensor) -> Tensor:
    """The inverse: a weight of the mask's shape, 0 where it is False. Raises ValueError if the counts differ."""
    if len(values) != mask.count_nonzero():
        raise ValueError(f"{len(values)} values for {int(mask.count_nonzero())} weights that are kept")
    weight = torch.zeros(mask.numel(), dtype=values.dtype, device=values.device)
    step, begin = chunk(mask.numel(), mask.device), 0
    for piece, kept in zip(weight.split(step), mask.reshape(-1).split(step), strict=True):
        at = _kept(kept)
        piece.index_copy_(0, at, values[begin : begin + len(at)])
        begin += len(at)
    return weight.view(mask.shape)


def _kept(mask: Tensor) -> Tensor:
    """Where a mask (n,) is True, int64."""
    if mask.device.type == "cpu":  # several times as fast as torch's own, and as indexing by a mask
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return mask.nonzero().squeeze(1)


def check(layer: Layer, weight: Tensor, compression: Solver) -> None:
    """Raises ArithmeticError unless `weight`, as the model has it, is what `compression` promises.

    Weight equals the layer's dense form; pruned weights are exactly zero and as many as requested; codes and zero
    points fit into the bits, so that every kept weight is on its grid.
    """
    weight = weight.detach()
    if not torch.equal(layer.dense(weight.dtype), weight):
        raise ArithmeticError("the model's weight differs from the compressed form")
    if not all_finite(weight):
        raise ArithmeticError("a compressed weight is not finite")
    _check_pruned(layer, weight, compression)
    bits = getattr(compression, "bits", None)
    if layer.bits != bits:
        raise ArithmeticError(f"compressed to {layer.bits} bits, not {bits}")
    tops = [int(t.max()) for t in (layer.codes, layer.zero) if t is not None and t.numel()]
    if bits is not None and any(top >= 2**bits for top in tops):
        raise ArithmeticError(f"code or zero point {max(tops)} does not fit into {bits} bits")


def _check_pruned(layer: Layer, weight: Tensor, compression: Solver) -> None:
    sparsity, pattern = getattr(compression, "sparsity", None), getattr(compression, "pattern", None)
    if (layer.mask is not None) != (sparsity is not None or pattern is not None):
        raise ArithmeticError("mask and spec disagree about pruning")
    if layer.mask is None:
        return
    if bool(((weight != 0) & ~layer.mask).any()):
        raise ArithmeticError("a pruned weight is not zero")
    if sparsity is not None and weight.numel() - layer.kept != round(sparsity * weight.numel()):
        raise ArithmeticError(f"{weight.numel() - layer.kept} of {weight.numel()} weights pruned, not {sparsity:.2%}")
    if pattern is not None:
        n, m = (int(v) for v in pattern.split(":"))
        if not (layer.mask.reshape(len(weight), -1, m).sum(-1) == m - n).all():
            raise ArithmeticError(f"a group of {m} inputs does not have {n} zeros")
