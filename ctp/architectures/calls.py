"""The arguments that a model calls a decoder block with, kept so that the block can be run again on its own."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten


class _Stop(Exception):
    """Ends a forward pass early."""


@contextmanager
def stopping() -> Iterator[None]:
    """Runs a forward pass that `stop` may end."""
    with suppress(_Stop):
        yield


def stop() -> None:
    """Ends the pass inside `stopping()`."""
    raise _Stop


def _is_leaf(value: Any) -> bool:
    return not isinstance(value, tuple)


@dataclass(frozen=True, eq=False)
class Call:
    """All arguments of a block but the hidden states.

    keyword: the name of the hidden states' argument, None where they come first by position.
    """

    keyword: str | None = None
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def split(cls, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, "Call"]:
        """(hidden states, the other arguments)."""
        if args:
            return args[0], cls(None, args[1:], dict(kwargs))
        rest = dict(kwargs)
        return rest.pop("hidden_states"), cls("hidden_states", (), rest)

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """The hidden states after `block`."""
        if self.keyword is None:
            return hidden_of(block(hidden, *self.args, **self.kwargs))
        return hidden_of(block(*self.args, **{self.keyword: hidden}, **self.kwargs))

    def leaves(self) -> list[Any]:
        """All arguments, those in tuples one by one."""
        return tree_leaves((*self.args, *self.kwargs.values()), is_leaf=_is_leaf)

    def tensors(self) -> list[Tensor]:
        """The tensors among them."""
        return [value for value in self.leaves() if isinstance(value, Tensor)]


@dataclass
class Batch:
    """Hidden states (windows, tokens, width) on their way through the blocks, and the arguments of each block.

    A block may keep what later ones read (shared keys and values) in an argument: every batch has its own.
    """

    hidden: Tensor
    calls: Mapping[nn.Module, Call]

    def run(self, block: nn.Module) -> Tensor:
        """The hidden states after `block`."""
        return self.calls[block].run(block, self.hidden)


def hidden_of(out: Any) -> Tensor:
    """The hidden states in what a block returns."""
    hidden: Tensor = out[0] if isinstance(out, tuple | list) else out
    return hidden


def share_tensors(call: Call, others: Sequence[Call], known: dict[int, tuple[Tensor, Tensor]]) -> Call:
    """The call with tensors of `others` instead of equal ones in the same place, so that masks are in memory once.

    known: by id, a tensor and what replaces it; filled here.
    """
    values, form = tree_flatten((*call.args, *call.kwargs.values()), is_leaf=_is_leaf)
    candidates = [other.leaves() for other in others]
    for i, value in enumerate(values):
        if isinstance(value, Tensor):
            if id(value) not in known:
                found = (c[i] for c in candidates if i < len(c) and isinstance(c[i], Tensor) and same(c[i], value))
                known[id(value)] = value, next(found, value)
            values[i] = known[id(value)][1]
    arguments = tree_unflatten(values, form)
    n = len(call.args)
    return Call(call.keyword, arguments[:n], dict(zip(call.kwargs, arguments[n:], strict=True)))


def same(a: Tensor, b: Tensor) -> bool:
    """Equal tensors? On the meta device, which has no values: one and the same?"""
    if a is b or a.is_meta or b.is_meta:
        return a is b
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)


def alike(a: Call, b: Call) -> bool:
    """Do two calls have the same arguments, as far as values without a state tell?"""
    left, right = a.leaves(), b.leaves()
    return len(left) == len(right) and a.keyword == b.keyword and all(map(_alike, left, right))


def _alike(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return same(a, b)
    return type(a) is type(b) and (holds_state(a) or a is b or bool(a == b))


def holds_state(value: Any) -> bool:
    """Could a block leave something in this argument?"""
    return not isinstance(value, Tensor | str | int | float | torch.dtype | torch.device | slice | None)
