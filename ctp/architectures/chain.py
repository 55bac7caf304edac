"""The inputs of a model's decoder blocks, found without running them, and the check that blocks can be run one by one.

Compression runs one block after the other. `check_chain` raises unless that is what the model itself does; `capture`
then gives the first block's hidden states and every block's other arguments.
"""

import inspect
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ctp.architectures.blocks import decoder_blocks
from ctp.architectures.calls import Batch, Call, alike, hidden_of, holds_state, same, share_tensors, stop, stopping
from ctp.architectures.experts import experts_in, silent, split
from ctp.architectures.linears import all_finite, large, linears
from ctp.common.messages import brief

DEPENDS = "block {} is called with what depends on the blocks before it"


@dataclass
class _Step:
    """A call of a block in the model's own forward pass."""

    block: nn.Module
    hidden: Tensor
    call: Call
    out: Any = None


@dataclass(frozen=True, eq=False)
class Chain:
    """What `check_chain` learned about the blocks.

    outs: what every block returns, with None for the hidden states and NaN for the rest, so that a later argument made
    of the rest is noticed. idle: names of the linears that the model does not call as such; they are left as they are.
    """

    outs: list[Any]
    idle: frozenset[str]


@torch.no_grad()
def capture(model: nn.Module, windows: Tensor, size: int, chain: Chain | None = None) -> list[Batch]:
    """The first block's hidden states and every block's other arguments, for `windows` (n, tokens), `size` at a time.

    chain: what `check_chain` gave; None checks the first window now. No block is run: each passes its input on.
    Arguments that are equal in several calls (masks, positions) are kept once.
    """
    chain = check_chain(model, windows[:1]) if chain is None else chain
    batches: list[Batch] = []
    for some in windows.split(size):
        batches.append(_arguments(model, some, chain.outs, batches[-1] if batches else None))
    return batches


@torch.no_grad()
def check_chain(model: nn.Module, window: Tensor) -> Chain:
    """Raises ValueError unless the model, on `window` (1, tokens), runs its blocks one after the other, each with its
    own arguments, with finite outputs, and calls their linears, small ones apart.
    """
    steps, idle = _observe(model, window)
    if steps and not all_finite(hidden_of(steps[-1].out)):
        bad = next((n for n, p in model.named_parameters() if not all_finite(p)), None)
        why = "an activation overflows" if bad is None else f"{bad} holds numbers that are not finite"
        raise ValueError(f"{_name(model)} computes no finite numbers: {why}")
    reason, outs = _refusal(model, steps, idle), []
    if not reason:
        outs = [_without_values(step.out) for step in steps]
        reason = _rerun(steps, _arguments(model, window, outs))
    if reason:
        raise ValueError(_no_chain(model, reason))
    return Chain(outs, frozenset(idle))


@torch.no_grad()
def foreseen(model: nn.Module) -> tuple[str, frozenset[str]]:
    """(why `check_chain` will refuse a model that is on the meta device; linears that the model will not call).

    "" and none where that is not known: the model cannot be run without weights.
    """
    for kwargs in {}, {"attention_mask": torch.zeros(1, 1, 2, 2, device="meta")}:  # most look into masks of their own
        try:
            with silent(model):
                steps, idle = _observe(model, torch.zeros(1, 2, dtype=torch.long), **kwargs)
                reason = _refusal(model, steps, idle)
                return reason and _no_chain(model, reason), frozenset(idle)
        except Exception:
            continue
    return "", frozenset()


def _no_chain(model: nn.Module, reason: str) -> str:
    return f"{_name(model)} is no chain of blocks that can be compressed one by one: {reason}"


def _name(model: nn.Module) -> str:
    return f"model type {getattr(model.config, 'model_type', '?')}: {type(model).__name__}"


def _observe(model: nn.Module, window: Tensor, **kwargs: Any) -> tuple[list[_Step], list[str]]:
    """The calls of the blocks in the model's own forward pass, and the names of their linears that it does not call.

    The pass ends where the head would begin, whose output nobody reads.
    """
    prefix, blocks = decoder_blocks(model)
    inside = linears(blocks, prefix)
    steps: list[_Step] = []
    called: set[nn.Module] = set()

    def before(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        steps.append(_Step(block, *Call.split(args, kwargs)))

    def after(_: nn.Module, args: Any, out: Any) -> None:
        steps[-1].out = out

    with ExitStack() as stack, stopping():
        for block in blocks:
            stack.callback(block.register_forward_pre_hook(before, with_kwargs=True).remove)
            stack.callback(block.register_forward_hook(after).remove)
        for linear in inside.values():
            stack.callback(linear.register_forward_pre_hook(lambda m, _: called.add(m)).remove)
        head: Any = getattr(model, "get_output_embeddings", lambda: None)()
        if head is not None:
            stack.callback(head.register_forward_pre_hook(lambda *_: stop()).remove)
        _forward(model, window, **kwargs)
    return steps, sorted(n for n, m in inside.items() if m not in called)


def _forward(model: nn.Module, windows: Tensor, **kwargs: Any) -> None:
    accepted = inspect.signature(model.forward).parameters.values()
    if any(p.name == "use_cache" or p.kind is inspect.Parameter.VAR_KEYWORD for p in accepted):
        kwargs["use_cache"] = False
    model(input_ids=windows.to(next(model.parameters()).device), **kwargs)


def _refusal(model: nn.Module, steps: Sequence[_Step], idle: Sequence[str]) -> str:
    """Why the model does more than pass each block's output to the next, or leaves linears out; "" if not."""
    prefix, blocks = decoder_blocks(model)
    if [s.block for s in steps] != list(blocks):
        runs = [sum(s.block is block for s in steps) for block in blocks]
        odd = next((f"block {i} runs {n} times in a pass" for i, n in enumerate(runs) if n != 1), "")
        return odd or "its blocks run in another order"
    for i, (one, two) in enumerate(pairwise(steps)):
        out = hidden_of(one.out)
        if not same(two.hidden.to(out.device), out):
            return f"it changes what block {i} gives before block {i + 1} gets it"
    made: set[int] = set()  # ids of what blocks return beside the hidden states; `steps` keeps them in memory
    for i, step in enumerate(steps):
        if any(id(tensor) in made for tensor in step.call.tensors()):
            return DEPENDS.format(i)
        made |= {id(o) for o in step.out[1:]} if isinstance(step.out, tuple | list) else set()
    if large(idle, linears(blocks, prefix)):
        return f"it does not run these linears on text, so they see no input: {', '.join(idle[:3])}"
    return ""


def _rerun(steps: Sequence[_Step], batch: Batch, tolerance: float = 1e-3) -> str:
    """Why the blocks, run one by one with the arguments in `batch`, differ from the model's pass; "" where they do not.

    tolerance: largest difference relative to the largest value.
    """
    for i, step in enumerate(steps):
        call = batch.calls[step.block]
        if not alike(step.call, call):
            return DEPENDS.format(i)
        tensors = [batch.hidden, *call.tensors()]
        versions = [t._version for t in tensors]
        try:
            for _ in range(1 + any(map(holds_state, call.leaves()))):  # twice: what it keeps there must not add up
                out = batch.run(step.block)
        except torch.OutOfMemoryError:
            raise
        except Exception as e:  # whatever a block raises that relies on more than its arguments
            return f"block {i} cannot be run on its own: {brief(e)}"
        if versions != [t._version for t in tensors]:
            return f"block {i} overwrites what it is called with"
        if not (difference := _difference(out, hidden_of(step.out))) <= tolerance:
            return f"block {i} on its own differs by {difference:.1e} of the largest value"
        batch.hidden = out
    return ""


def _difference(x: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest expected value."""
    return float((x - expected).abs().max() / expected.abs().max().clamp(min=1e-30))


def _arguments(model: nn.Module, windows: Tensor, outs: Sequence[Any], before: Batch | None = None) -> Batch:
    """The arguments of the blocks; none is run. before: a batch whose equal tensors are kept instead."""
    blocks = list(decoder_blocks(model)[1])
    calls: dict[nn.Module, Call] = {}
    first: list[Tensor] = []
    known: dict[int, tuple[Tensor, Tensor]] = {}

    def passing_on(block: nn.Module, out: Any) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden, call = Call.split(args, kwargs)
            if not calls:
                first.append(hidden)
            others = ([before.calls[block]] if before else []) + list(calls.values())[-1:]
            calls[block] = share_tensors(call, others, known)
            if len(calls) == len(blocks):
                stop()
            return (hidden, *out[1:]) if isinstance(out, tuple) else [hidden, *out[1:]] if out else hidden

        return forward

    with ExitStack() as stack, stopping():
        for block, out in zip(blocks, outs, strict=True):
            stack.callback(_restore, block, block.__dict__.get("forward"))
            block.forward = passing_on(block, out)
        _forward(model, windows)
    return Batch(first[0], calls)


def _restore(block: nn.Module, forward: Any) -> None:
    """Undoes the replacement of `forward`; libraries that spread a model over GPUs put their own into the module."""
    del block.forward
    if forward is not None:
        block.forward = forward


def _without_values(out: Any) -> Any:
    """What a block returned, with None for the hidden states and NaN for other floats; None for a mere tensor."""
    if isinstance(out, Tensor):
        return None
    if not isinstance(out, tuple | list):
        raise RuntimeError(
            f"a block returns a {type(out).__name__}, neither hidden states nor a tuple of them and more"
        )
    rest = [torch.full_like(o, torch.nan) if isinstance(o, Tensor) and o.is_floating_point() else None for o in out[1:]]
    return (None, *rest) if isinstance(out, tuple) else [None, *rest]


@torch.no_grad()
def check_experts(model: nn.Module, window: Tensor, chain: Chain, tolerance: float = 1e-2) -> None:
    """Raises ValueError unless every block computes the same on `window` (1, tokens) with its experts split into
    linears, up to rounding: they may do more than is known of them.

    tolerance: largest difference relative to the largest value.
    """
    prefix, blocks = decoder_blocks(model)
    if not experts_in(blocks):
        return
    batch = capture(model, window, 1, chain)[0]
    for i, block in enumerate(blocks):
        whole = batch.run(block)
        with split(block):
            difference = _difference(batch.run(block), whole)
        if not difference <= tolerance:
            raise ValueError(
                f"{_name(model)}: the experts of {prefix}.{i}, run one by one, differ from their layer by "
                f"{difference:.1e} of the largest value"
            )
        batch.hidden = whole
