"""What a model calls its decoder blocks with, found without running them, and the proof that nothing more is needed."""

import inspect
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ctp.architectures.blocks import decoder_blocks
from ctp.architectures.calls import Batch, Call, alike, hidden_of, holds_state, merged, same, stop, stopping
from ctp.architectures.experts import experts_in, silent, split
from ctp.architectures.linears import all_finite, large, linears
from ctp.common.messages import brief


@dataclass
class _Step:
    """A call of a block in the model's own forward pass."""

    block: nn.Module
    hidden: Tensor
    call: Call
    out: Any = None


@dataclass(frozen=True, eq=False)
class Chain:
    """What is known of a chain of blocks that has been checked.

    outs: what every block returns, the hidden states None, all else worthless, so that arguments made of it are found
    out. idle: names of the linears that the model does not run as such; they are left as they are.
    """

    outs: list[Any]
    idle: frozenset[str]


@torch.no_grad()
def capture(model: nn.Module, windows: Tensor, size: int, chain: Chain | None = None) -> list[Batch]:
    """What the first block is handed, and how every block is called, for `windows` (n, tokens) in batches of `size`.

    chain: what `check_chain` gave, for which the first window is taken where it is None. No block is run: each hands
    on what it gets. Arguments that are alike in several calls (masks, positions) are kept once.
    """
    chain = check_chain(model, windows[:1]) if chain is None else chain
    blocks = list(decoder_blocks(model)[1])
    batches: list[Batch] = []
    for some in windows.split(size):
        batches.append(_called(model, blocks, some, chain.outs, batches[-1] if batches else None))
    return batches


@torch.no_grad()
def check_chain(model: nn.Module, window: Tensor) -> Chain:
    """Raises ValueError unless running the blocks one after the other, each with its own arguments, is what the model
    does with `window` (1, tokens), with finite outputs, and runs the linears in them, small ones apart.
    """
    blocks = list(decoder_blocks(model)[1])
    steps, idle = _observed(model, blocks, window)
    if steps and not all_finite(hidden_of(steps[-1].out)):
        bad = next((n for n, p in model.named_parameters() if not all_finite(p)), None)
        why = "an activation overflows" if bad is None else f"{bad} holds numbers that are not finite"
        raise ValueError(f"{_name(model)} computes no finite numbers: {why}")
    if reason := _broken(model, steps, idle):
        raise ValueError(reason)
    outs = [_worthless(step.out) for step in steps]
    if reason := _differing(steps, _called(model, blocks, window, outs)):
        raise ValueError(_no_chain(model, reason))
    return Chain(outs, frozenset(idle))


@torch.no_grad()
def foreseen(model: nn.Module) -> tuple[str, frozenset[str]]:
    """(why `check_chain` will refuse the model, "" where nothing speaks against it; linears that will not be run), of a
    model without weights, on the meta device. Nothing speaks against one that cannot be run there.
    """
    blocks = list(decoder_blocks(model)[1])
    for kwargs in {}, {"attention_mask": torch.zeros(1, 1, 2, 2, device="meta")}:  # most look into masks of their own
        try:
            with silent(model):
                steps, idle = _observed(model, blocks, torch.zeros(1, 2, dtype=torch.long), **kwargs)
                return _broken(model, steps, idle), frozenset(idle)
        except Exception:
            continue
    return "", frozenset()


def _name(model: nn.Module) -> str:
    return f"model type {getattr(model.config, 'model_type', '?')}: {type(model).__name__}"


def _no_chain(model: nn.Module, reason: str) -> str:
    return f"{_name(model)} is no chain of blocks that can be compressed one by one: {reason}"


def _depends(i: int) -> str:
    return f"block {i} is called with what depends on the blocks before it"


def _observed(
    model: nn.Module, blocks: Sequence[nn.Module], window: Tensor, **kwargs: Any
) -> tuple[list[_Step], list[str]]:
    """The calls of the blocks in the model's own forward pass, and the names of their linears that it does not run.

    The pass ends where the head would begin, whose output nobody reads.
    """
    prefix, found = decoder_blocks(model)
    inside = linears(found, prefix)
    steps: list[_Step] = []
    run: set[nn.Module] = set()

    def before(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        steps.append(_Step(block, *Call.split(args, kwargs)))

    def after(_: nn.Module, args: Any, out: Any) -> None:
        steps[-1].out = out

    def end(*_: Any) -> None:
        stop()

    with ExitStack() as stack, stopping():
        for block in blocks:
            stack.callback(block.register_forward_pre_hook(before, with_kwargs=True).remove)
            stack.callback(block.register_forward_hook(after).remove)
        for linear in inside.values():
            stack.callback(linear.register_forward_pre_hook(lambda m, _: run.add(m)).remove)
        head: Any = getattr(model, "get_output_embeddings", lambda: None)()
        if head is not None:
            stack.callback(head.register_forward_pre_hook(end).remove)
        _forward(model, window, **kwargs)
    return steps, sorted(n for n, m in inside.items() if m not in run)


def _forward(model: nn.Module, windows: Tensor, **kwargs: Any) -> None:
    device = next(model.parameters()).device
    accepted = inspect.signature(model.forward).parameters.values()
    cached = any(p.name == "use_cache" or p.kind is inspect.Parameter.VAR_KEYWORD for p in accepted)
    model(input_ids=windows.to(device), **({"use_cache": False} if cached else {}), **kwargs)


def _broken(model: nn.Module, steps: Sequence[_Step], idle: Sequence[str]) -> str:
    """Why the model does more than hand each block's output to the next, or less than run it; "" where it does not."""
    prefix, blocks = decoder_blocks(model)
    if [s.block for s in steps] != list(blocks):
        runs = [sum(s.block is block for s in steps) for block in blocks]
        odd = next((i for i, n in enumerate(runs) if n != 1), None)
        return _no_chain(
            model, "its blocks run in another order" if odd is None else f"block {odd} runs {runs[odd]} times in a pass"
        )
    for i, (one, two) in enumerate(pairwise(steps)):
        out = hidden_of(one.out)
        if not same(two.hidden.to(out.device), out):
            return _no_chain(model, f"it changes what block {i} gives before block {i + 1} gets it")
    made: set[int] = set()  # what blocks give beside the hidden states; the steps keep it alive
    for i, step in enumerate(steps):
        if any(id(p) in made for p in step.call.parts() if isinstance(p, Tensor)):
            return _no_chain(model, _depends(i))
        made |= {id(o) for o in step.out[1:]} if isinstance(step.out, tuple | list) else set()
    if large(idle, linears(blocks, prefix)):
        return f"{_name(model)} does not run these linears on text, so they see no input: {', '.join(idle[:3])}"
    return ""


def _differing(steps: Sequence[_Step], batch: Batch, tolerance: float = 1e-3) -> str:
    """Why the blocks, run on their own with the arguments in `batch`, are not what the model's pass made of them.

    tolerance: largest difference relative to the largest value.
    """
    for i, step in enumerate(steps):
        call = batch.calls[step.block]
        if not alike(step.call.parts(), call.parts()):
            return _depends(i)
        tensors = [batch.hidden, *(p for p in call.parts() if isinstance(p, Tensor))]
        versions = [t._version for t in tensors]
        try:
            for _ in range(1 + any(map(holds_state, call.parts()))):  # what it leaves there must not add up
                out = batch.run(step.block)
        except torch.OutOfMemoryError:
            raise
        except Exception as e:  # whatever a block raises that relies on more than its arguments
            return f"block {i} cannot be run on its own: {brief(e)}"
        if versions != [t._version for t in tensors]:
            return f"block {i} overwrites what it is called with"
        wanted = hidden_of(step.out)
        difference = float((out - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30))
        if not difference <= tolerance:
            return f"block {i} on its own differs by {difference:.1e} of the largest value"
        batch.hidden = out
    return ""


def _called(
    model: nn.Module, blocks: Sequence[nn.Module], windows: Tensor, outs: Sequence[Any], before: Batch | None = None
) -> Batch:
    """What the blocks are called with; none is run. before: a batch whose equal arguments are kept instead."""
    calls: dict[nn.Module, Call] = {}
    first: list[Tensor] = []
    known: dict[int, tuple[Any, Any]] = {}  # by id: an argument, which it keeps alive, and what stands for it

    def instead(block: nn.Module, out: Any) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden, call = Call.split(args, kwargs)
            first.extend([hidden] * (not first))
            last = calls[blocks[len(calls) - 1]] if calls else None
            calls[block] = merged(call, [c for c in (before and before.calls[block], last) if c], known)
            if len(calls) == len(blocks):
                stop()
            return (hidden, *out[1:]) if isinstance(out, tuple) else [hidden, *out[1:]] if out else hidden

        return forward

    with ExitStack() as stack, stopping():
        for block, out in zip(blocks, outs, strict=True):
            stack.callback(_restore, block, block.__dict__.get("forward"))
            block.forward = instead(block, out)
        _forward(model, windows)
    return Batch(first[0], calls)


def _restore(block: nn.Module, forward: Any) -> None:
    """Takes back the place of `forward`; libraries that spread a model over GPUs put their own into the module."""
    del block.forward
    if forward is not None:
        block.forward = forward


def _worthless(out: Any) -> Any:
    """What a block returned, without the hidden states, and with nothing in it that may be used. None for a tensor."""
    if isinstance(out, Tensor):
        return None
    if not isinstance(out, tuple | list):
        raise RuntimeError(
            f"a block returns a {type(out).__name__}: hidden states, or a tuple of them and more, are run"
        )
    rest = [torch.full_like(o, torch.nan) if isinstance(o, Tensor) and o.is_floating_point() else None for o in out[1:]]
    return (None, *rest) if isinstance(out, tuple) else [None, *rest]


@torch.no_grad()
def check_experts(model: nn.Module, window: Tensor, chain: Chain, tolerance: float = 1e-2) -> None:
    """Raises ValueError unless every block computes the same on `window` (1, tokens) with its experts split into
    linears, up to rounding.

    tolerance: largest difference relative to the largest value. Catches experts that do more than is known of them.
    """
    prefix, blocks = decoder_blocks(model)
    if not experts_in(blocks):
        return
    batch = capture(model, window, 1, chain)[0]
    for i, block in enumerate(blocks):
        whole = batch.run(block)
        with split(block):
            difference = float((whole - batch.run(block)).abs().max() / whole.abs().max().clamp(min=1e-30))
        if not difference <= tolerance:
            raise ValueError(
                f"{_name(model)}: the experts of {prefix}.{i}, run one by one, differ from their layer by "
                f"{difference:.1e} of the largest value"
            )
        batch.hidden = whole
