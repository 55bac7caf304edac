"""What calibration needs of a decoder block: which linears share an input, and linears that run faster."""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ctp.architectures.calls import Batch
from ctp.architectures.linears import linears

_LINEAR = "_linear_pointwise"


@contextmanager
def packed_linears(block: nn.Module) -> Iterator[None]:
    """Runs float32 linears on a CPU with weights laid out once for oneDNN: an eighth faster than torch's own call,
    which lays them out anew for every batch. Where torch has no such operators, or a linear its own forward, all stays.
    """
    changed: list[nn.Linear] = []
    ops = torch.ops.mkldnn
    usable = torch.backends.mkldnn.is_available() and all(hasattr(ops, n) for n in ("_reorder_linear_weight", _LINEAR))
    try:
        for linear in [m for m in block.modules() if type(m) is nn.Linear and "forward" not in m.__dict__] * usable:
            if linear.weight.device.type == "cpu" and linear.weight.dtype == torch.float32:
                linear.forward = _packed(linear)  # type: ignore[method-assign, assignment]
                changed.append(linear)
        yield
    finally:
        for linear in changed:
            del linear.forward


def _packed(linear: nn.Linear) -> Callable[[Tensor], Tensor]:
    weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach().contiguous())
    bias, run = None if linear.bias is None else linear.bias.detach(), getattr(torch.ops.mkldnn, _LINEAR)
    return lambda x: run(x, weight, bias, "none", [], "")


def shared_inputs(block: nn.Module, batch: Batch, idle: Collection[str] = ()) -> list[list[str]]:
    """The block's linears by name, in execution order, those that are handed the same tensors together.

    Raises ValueError where a linear that is not in `idle` is not run: it would have no Hessian.
    """
    found = {n: m for n, m in linears(block).items() if n not in idle}
    inputs: list[Tensor] = []
    handed: dict[str, list[int]] = {}  # by linear: the numbers of its inputs

    def record(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            at = next((i for i, tensor in enumerate(inputs) if tensor is args[0]), len(inputs))
            inputs.extend([args[0]] * (at == len(inputs)))
            handed.setdefault(name, []).append(at)

        return hook

    handles = [m.register_forward_pre_hook(record(n)) for n, m in found.items()]
    try:
        batch.run(block)
    finally:
        for handle in handles:
            handle.remove()
    if unseen := set(found) - set(handed):
        raise ValueError(f"these linears saw no input in calibration: {', '.join(sorted(unseen))}")
    groups: dict[tuple[int, ...], list[str]] = {}
    for name, numbers in handed.items():
        groups.setdefault(tuple(numbers), []).append(name)
    return list(groups.values())
