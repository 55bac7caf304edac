"""What a decoder block is called with, kept so that it can be run again on its own."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


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


@dataclass(frozen=True, eq=False)
class Call:
    """What a block is called with, the hidden states apart.

    keyword: the name under which the hidden states are handed over, None where they come first by position.
    """

    keyword: str | None = None
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def split(cls, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, "Call"]:
        """(hidden states, the rest)."""
        if args:
            return args[0], cls(None, args[1:], dict(kwargs))
        rest = dict(kwargs)
        return rest.pop("hidden_states"), cls("hidden_states", (), rest)

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """The hidden states after `block`."""
        if self.keyword is None:
            return hidden_of(block(hidden, *self.args, **self.kwargs))
        return hidden_of(block(*self.args, **{self.keyword: hidden}, **self.kwargs))

    def parts(self) -> tuple[Any, ...]:
        """All arguments, in an order of their own."""
        return self.keyword, *self.args, *(self.kwargs[n] for n in sorted(self.kwargs))


@dataclass
class Batch:
    """Hidden states (windows, tokens, width) on their way through the blocks, and how each block is called with them.

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


def merged(call: Call, others: Sequence[Call], known: dict[int, tuple[Any, Any]]) -> Call:
    """The call with the tensors of others in place of equal ones."""
    args = tuple(_kept(a, [o.args[i] for o in others if i < len(o.args)], known) for i, a in enumerate(call.args))
    kwargs = {n: _kept(a, [o.kwargs[n] for o in others if n in o.kwargs], known) for n, a in call.kwargs.items()}
    return Call(call.keyword, args, kwargs)


def _kept(value: Any, others: Sequence[Any], known: dict[int, tuple[Any, Any]]) -> Any:
    if isinstance(value, tuple) and type(value) is tuple:
        inside = [o for o in others if isinstance(o, tuple) and len(o) == len(value)]
        return tuple(_kept(v, [o[i] for o in inside], known) for i, v in enumerate(value))
    if not isinstance(value, Tensor):
        return value
    if id(value) not in known:
        known[id(value)] = value, next((o for o in others if isinstance(o, Tensor) and same(o, value)), value)
    return known[id(value)][1]


def same(a: Tensor, b: Tensor) -> bool:
    """One tensor, or two that are equal; what has no values is equal to itself only."""
    if a is b or a.is_meta or b.is_meta:
        return a is b
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)


def alike(a: Any, b: Any) -> bool:
    """Are these the same arguments, as far as values without a state tell?"""
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(alike, a, b))
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return same(a, b)
    return type(a) is type(b) and (holds_state(a) or a is b or bool(a == b))


def holds_state(value: Any) -> bool:
    """Could a block leave something in this argument?"""
    if isinstance(value, tuple):
        return any(map(holds_state, value))
    return not isinstance(value, Tensor | str | int | float | torch.dtype | torch.device | slice | None)
