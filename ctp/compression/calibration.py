"""What calibration needs of a decoder block: which linears share an input, and linears that run faster."""

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ctp.architectures.calls import Batch
from ctp.architectures.linears import linears

_REORDER, _LINEAR = "_reorder_linear_weight", "_linear_pointwise"  # operators of torch.ops.mkldnn


@contextmanager
def packed_linears(block: nn.Module) -> Iterator[None]:
    """Runs float32 linears on a CPU with weights laid out once for oneDNN: an eighth faster than torch's own call,
    which lays them out anew for every batch. No change where torch has no such operators or a linear its own forward.
    """
    ops = torch.ops.mkldnn
    usable = torch.backends.mkldnn.is_available() and all(hasattr(ops, n) for n in (_REORDER, _LINEAR))
    changed: list[nn.Linear] = []
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
    weight = getattr(torch.ops.mkldnn, _REORDER)(linear.weight.detach().contiguous())
    bias, run = None if linear.bias is None else linear.bias.detach(), getattr(torch.ops.mkldnn, _LINEAR)
    return lambda x: run(x, weight, bias, "none", [], "")


def shared_inputs(block: nn.Module, batch: Batch, idle: Collection[str] = ()) -> list[list[str]]:
    """The block's linears by name in execution order, those with the same input tensors together.

    Raises ValueError where a linear that is not in `idle` is not called: it would have no Hessian.
    """
    found = {n: m for n, m in linears(block).items() if n not in idle}
    inputs: dict[str, list[Tensor]] = {}  # by linear; all are kept, so that each has an id of its own

    def record(name: str, _: nn.Module, args: tuple[Any, ...]) -> None:
        inputs.setdefault(name, []).append(args[0])

    with ExitStack() as stack:
        for name, linear in found.items():
            stack.callback(linear.register_forward_pre_hook(partial(record, name)).remove)
        batch.run(block)
    if unseen := found.keys() - inputs.keys():
        raise ValueError(f"these linears saw no input in calibration: {', '.join(sorted(unseen))}")
    groups: dict[tuple[int, ...], list[str]] = {}
    for name, tensors in inputs.items():
        groups.setdefault(tuple(map(id, tensors)), []).append(name)
    return list(groups.values())
