"""A causal language model as a chain of decoder blocks, each run on its own."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ctp.compression.experts import linears_of


def decoder_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The module name of the list of decoder blocks, and the list: e.g. ("model.layers", ...).

    It is the one ModuleList with as many members as the config has layers. Raises ValueError if there is none or more.
    """
    config: Any = model.config
    count = config.num_hidden_layers
    found = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    found = [(n, m) for n, m in found if not any(n.startswith(f"{other}.") for other, _ in found)]
    if len(found) != 1:
        names = [n for n, _ in found]
        raise ValueError(f"{type(model).__name__}: no single list of {count} decoder blocks; candidates: {names}")
    return found[0]


def not_linear(modules: Iterable[tuple[str, nn.Module]]) -> str:
    """The name of the first parameter of 2 or more dimensions that is not the weight of an nn.Linear; "" if none.

    Experts of a mixture are such, 3-D parameters, unless they are split (`ctp.compression.experts`).
    """
    for name, module in modules:
        for own, parameter in module.named_parameters(recurse=False):
            if parameter.ndim >= 2 and not (isinstance(module, nn.Linear) and own == "weight"):
                return f"{name}.{own}"
    return ""


_LINEAR = "_linear_pointwise"


class _Stop(Exception):
    """Ends a forward pass early, once what it was run for has been seen."""


@contextmanager
def stopping() -> Iterator[None]:
    """Runs a forward pass that `stop` may end."""
    with suppress(_Stop):
        yield


def stop() -> None:
    """Ends the pass inside `stopping()`."""
    raise _Stop


@dataclass
class Batch:
    """What a block is called with: hidden states (windows, tokens, width) and all other arguments.

    keyword: the name under which the hidden states are handed over, None where they come first by position.
    """

    hidden: Tensor
    keyword: str | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, block: nn.Module) -> Tensor:
        """The hidden states after `block`."""
        if self.keyword is None:
            out = block(self.hidden, *self.args, **self.kwargs)
        else:
            out = block(*self.args, **{self.keyword: self.hidden}, **self.kwargs)
        return out[0] if isinstance(out, tuple) else out


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


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    return a is b


def capture(model: nn.Module, windows: Tensor, size: int) -> list[Batch]:
    """What the first block is called with, for `windows` (n, tokens) in batches of `size`.

    Arguments that are alike in all batches (masks, positions) are kept once.
    """
    batches: list[Batch] = []

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kwargs = dict(kwargs)
        keyword = None if args else "hidden_states"
        hidden, args = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), args)
        if batches:
            last = batches[-1]
            args = last.args if _same(args, last.args) else args
            kwargs |= {n: last.kwargs[n] for n, v in kwargs.items() if n in last.kwargs and _same(v, last.kwargs[n])}
        batches.append(Batch(hidden.detach(), keyword, args, kwargs))
        stop()

    first = decoder_blocks(model)[1][0]
    device = next(model.parameters()).device
    handle = first.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        for some in windows.split(size):
            with stopping():
                model(input_ids=some.to(device), use_cache=False)
    finally:
        handle.remove()
    return batches


def check_chain(model: nn.Module, window: Tensor, tolerance: float = 1e-3) -> None:
    """Raises RuntimeError unless running the blocks one after the other gives what the whole model's forward gives,
    ValueError where that is not finite.

    window: (1, tokens). Catches a model, or a release of transformers, that hands blocks other arguments than the
    first one's, or works between blocks. tolerance: largest difference relative to the largest value.
    """
    blocks = decoder_blocks(model)[1]
    seen: list[Tensor] = []

    def keep(_: nn.Module, args: Any, out: Any) -> None:
        seen.append((out[0] if isinstance(out, tuple) else out).detach())
        stop()

    handle = blocks[-1].register_forward_hook(keep)
    try:
        with stopping():
            model(input_ids=window.to(next(model.parameters()).device), use_cache=False)
    finally:
        handle.remove()
    if not bool(torch.isfinite(seen[0]).all()):
        bad = next((n for n, p in model.named_parameters() if not bool(torch.isfinite(p).all())), None)
        why = "an activation overflows" if bad is None else f"{bad} holds numbers that are not finite"
        raise ValueError(f"{type(model).__name__} computes no finite numbers: {why}")
    batch = capture(model, window, 1)[0]
    for block in blocks:
        batch.hidden = batch.run(block)
    difference = float((batch.hidden.detach() - seen[0]).abs().max() / seen[0].abs().max().clamp(min=1e-30))
    if not difference <= tolerance:
        raise RuntimeError(
            f"{type(model).__name__}: the blocks one by one differ from the whole model by {difference:.1e} of the "
            f"largest value: this model does not run as a plain chain of blocks, or transformers changed"
        )


def shared_inputs(block: nn.Module, batch: Batch) -> list[list[str]]:
    """The block's linears by name, in execution order, those that are handed the same tensor together.

    Raises ValueError where a linear is not run: it would have no Hessian.
    """
    linears = linears_of(block)
    calls: list[tuple[Tensor, list[str]]] = []

    def record(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            for tensor, names in calls:
                if tensor is args[0]:
                    names.append(name)
                    return
            calls.append((args[0], [name]))

        return hook

    handles = [m.register_forward_pre_hook(record(n)) for n, m in linears.items()]
    try:
        batch.run(block)
    finally:
        for handle in handles:
            handle.remove()
    groups = [list(dict.fromkeys(names)) for _, names in calls]
    idle = set(linears) - {n for names in groups for n in names}
    if idle:
        raise ValueError(f"these linears saw no input in calibration: {', '.join(sorted(idle))}")
    return groups
