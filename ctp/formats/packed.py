"""Linears that stay packed in memory and are unpacked every time they are used."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from ctp.architectures.experts import Matrix, matrices, put
from ctp.formats.pack import group_bits, unpack
from ctp.machine import triton


class _Linear(Function):
    """x W^T + b, with W unpacked for the product and again for the gradient: neither waits for the other."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: "PackedLinear", dtype: torch.dtype) -> Tensor:
        ctx.linear, ctx.dtype = linear, dtype
        return F.linear(x, linear.dense(dtype), linear.offset(dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0] @ ctx.linear.dense(ctx.dtype), None, None


class PackedLinear(nn.Module):
    """A frozen linear layer of the bits that its artifact stores; computes what the unpacked one does, bit for bit.

    packed: its fields as `ctp.formats.pack` names them. bias: (outputs,) or None. dtype: of the unpacked weight.
    """

    bias: Tensor | None

    def __init__(self, packed: Mapping[str, Tensor], bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.shape = packed["shape"]  # read by the CPU at every use
        self.fields = [n for n in packed if n != "shape"]
        for name in self.fields:
            self.register_buffer(name, packed[name])
        self.register_buffer("bias", None if bias is None else bias.detach())
        self.dtype = dtype
        self.rounded: torch.dtype | None = None  # to which the unpacked weight is rounded before it is used

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedLinear":
        """Goes where the model goes; what is packed keeps its type, whatever the model's becomes."""
        module: PackedLinear = super()._apply(lambda t: fn(t).to(t.dtype), recurse)
        return module

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight (outputs, inputs) in the model's dtype, rounded where it is to be, then in `dtype`."""
        parts = {name: getattr(self, name) for name in self.fields}
        weight = _by_kernel(self.shape.tolist(), parts, self.dtype)
        if weight is None:
            named = {f"w.{name}": part for name, part in parts.items()}
            weight = unpack({"w.shape": self.shape, **named})["w"].dense(self.dtype)
        return weight.to(self.rounded or self.dtype).to(dtype)

    @property
    def weight(self) -> Tensor:
        """The unpacked weight, for models that read it themselves."""
        return self.dense(self.dtype)

    def offset(self, dtype: torch.dtype) -> Tensor | None:
        """The bias, rounded as the weight is, in `dtype`; None without one."""
        return None if self.bias is None else self.bias.to(self.rounded or self.bias.dtype).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        device = x.device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        with torch.autocast(device, enabled=False):
            return _Linear.apply(x, self, x.dtype)


def _by_kernel(shape: list[int], parts: dict[str, Tensor], dtype: torch.dtype) -> Tensor | None:
    """The weight by one launch on a GPU; None without Triton and for what the kernel does not know: pruned weights,
    scales of older artifacts, codes of other tools' formats.
    """
    plain = len(shape) == 5 and "codes" in parts and not {"mask", "table", "shift"} & parts.keys()
    if not (plain and parts["codes"].is_cuda and triton.works()):
        return None
    from ctp.formats.unpack import dense

    rows, columns, bits, groups, kind = shape
    return dense((rows, columns), bits, groups, kind, dtype, **parts, index_bits=group_bits(groups, "g_idx" in parts))


class PackedExperts(nn.Module):
    """Frozen experts of a mixture, each matrix of the bits that its artifact stores; all are unpacked for one use of
    the layer, once for its output and once for the gradient, and computed with as the layer itself does.

    experts: the layer, whose parameters are taken away. found: where each of `linears` is stored in them.
    """

    def __init__(self, experts: nn.Module, found: Sequence[Matrix], linears: Sequence[PackedLinear]) -> None:
        super().__init__()
        self.found, self.linears = list(found), nn.ModuleList(linears)
        self.shapes = {m.part.parameter: experts.get_parameter(m.part.parameter).shape for m in found}
        for name in self.shapes:
            module, _, parameter = name.rpartition(".")
            delattr(experts.get_submodule(module), parameter)
        self.experts = experts
        self.register_buffer("like", torch.empty(0, dtype=linears[0].dtype), persistent=False)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        if not torch.is_grad_enabled():
            return self._computed(*args, **kwargs)
        out: Tensor = checkpoint(self._computed, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
        return out

    def _computed(self, *args: Any, **kwargs: Any) -> Tensor:
        out: Tensor = functional_call(self.experts, self._unpacked(), args, kwargs)
        return out

    @torch.no_grad()
    def _unpacked(self) -> dict[str, Tensor]:
        like: Any = self.like
        out = {name: like.new_empty(shape) for name, shape in self.shapes.items()}
        for m, linear in zip(self.found, self.linears, strict=True):
            assert isinstance(linear, PackedLinear)
            m.of(out[m.part.parameter]).copy_(linear.dense(like.dtype))
        return out


def put_packed(model: nn.Module, packed: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Replace the linears and experts that `packed` has (tensors by `name.field`) by packed ones, in place."""
    fields: dict[str, dict[str, Tensor]] = {}
    for key, tensor in packed.items():
        name, _, field = key.rpartition(".")
        fields.setdefault(name, {})[field] = tensor
    layers: dict[str, list[Matrix]] = {}
    for m in matrices(model).values():
        layers.setdefault(m.layer, []).append(m)
    for path, found in layers.items():
        linears = [PackedLinear(fields.pop(m.name), None, dtype) for m in found]
        put(model, path, PackedExperts(model.get_submodule(path), found, linears))
    for name, parts in fields.items():
        linear: Any = model.get_submodule(name)
        put(model, name, PackedLinear(parts, linear.bias, dtype))
