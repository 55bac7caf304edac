"""The walk through a model: block by block, compress the linears, hand the compressed block's outputs to the next."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ctp.architectures.blocks import decoder_blocks, unfit
from ctp.architectures.calls import Batch, stop, stopping
from ctp.architectures.chain import Chain, capture, check_chain, check_experts
from ctp.architectures.experts import matrices, split
from ctp.architectures.linears import linears, matrix
from ctp.cells import Solver
from ctp.compression.calibration import packed_linears, shared_inputs
from ctp.compression.refit import stripes
from ctp.compression.routing import filled_up, pieces, stages
from ctp.compression.solver import Inverse, check_shape, factorise, solve
from ctp.formats.artifact import Routing
from ctp.formats.layer import Layer, check
from ctp.machine.arithmetic import widened
from ctp.machine.threads import keep_heap, side_by_side

Progress = Callable[[int, int], None]
CPU_TOKENS = 1024  # in a forward pass: larger activations than the cache holds cost time in every pass
PROBE = 8  # tokens that show how a block is put together


def compress_model(
    model: nn.Module,
    windows: Tensor,
    compression: Solver,
    *,
    batch: int | None = None,
    progress: Progress | None = None,
    routing: Routing | None = None,
) -> dict[str, Layer]:
    """Compresses the linears of all decoder blocks in place, also of experts; head, embeddings, norms and routers stay.

    model: a causal language model of transformers on any device; in half precision that the device has no fast
    arithmetic for it runs in float32, and its weights are rounded to their own type. windows: token ids (n, tokens).
    batch: windows per forward pass, by default 4, on a CPU as many as make CPU_TOKENS tokens. progress is called with
    (blocks done, blocks). routing: counts the tokens of every expert. Returns the compressed form of every weight by
    module name, of experts by the names of `experts.matrices`.

    Raises ValueError before anything is changed where a group size does not fit a linear, a matrix in a block is not a
    linear's or the model is no chain of blocks, and later where a Hessian cannot be factorised; ArithmeticError where
    the result is not what the spec promises.
    """
    if windows.ndim != 2 or not windows.numel():
        raise ValueError(f"windows must be token ids (n, tokens), at least one; got shape {tuple(windows.shape)}")
    if why := unfit(model):
        raise ValueError(why)
    prefix, blocks = decoder_blocks(model)
    experts, dtypes, layers = matrices(model), _dtypes(model), dict[str, Layer]()
    with torch.no_grad(), _calibrating(model), widened(model):
        keep_heap()
        chain = _check_model(model, windows, compression)
        batches = capture(model, windows, batch or _batch(model, windows), chain)
        probe = capture(model, windows[:1, :PROBE], 1, chain)[0]
        for i, block in enumerate(blocks):
            done = compress_block(block, batches, compression, f"{prefix}.{i}", probe, dtypes, chain.idle, routing)
            layers |= {experts[n].name if n in experts else n: layer for n, layer in done.items()}
            if i + 1 < len(blocks):
                _run(block, batches)
            if progress:
                progress(i + 1, len(blocks))
    return layers


def _dtypes(model: nn.Module) -> dict[str, torch.dtype]:
    """What the weights of linears and experts are stored in, by name."""
    prefix, blocks = decoder_blocks(model)
    found = {n: matrix(m).dtype for n, m in linears(blocks, prefix).items()}
    return found | {n: model.get_parameter(m.parameter).dtype for n, m in matrices(model).items()}


def _batch(model: nn.Module, windows: Tensor) -> int:
    """Windows (n, tokens) per forward pass."""
    on_cpu = next(model.parameters()).device.type == "cpu"
    return max(1, CPU_TOKENS // windows.shape[1]) if on_cpu else 4


def _run(block: nn.Module, batches: Sequence[Batch]) -> None:
    """The block's outputs become the hidden states of the batches."""
    with packed_linears(block):
        for batch in batches:
            batch.hidden = batch.run(block)


def _check_model(model: nn.Module, windows: Tensor, compression: Solver) -> Chain:
    """Raises ValueError where the blocks are no chain, a group size or pattern fits no linear, or experts differ."""
    prefix, blocks = decoder_blocks(model)
    chain = check_chain(model, windows[:1])
    with split(blocks):
        for name, linear in linears(blocks, prefix).items():
            if name not in chain.idle:
                with _naming(name):
                    check_shape(matrix(linear).shape[1], compression)
    check_experts(model, windows[:1, :PROBE], chain)
    return chain


def compress_block(
    block: nn.Module,
    batches: Sequence[Batch],
    compression: Solver,
    prefix: str,
    probe: Batch,
    dtypes: Mapping[str, torch.dtype] | None = None,
    idle: Collection[str] = (),
    routing: Routing | None = None,
) -> dict[str, Layer]:
    """Compresses one block's linears in place on the inputs in `batches`; names get `prefix` in front.

    probe: a small batch, to see which linears share an input. dtypes: by name, what a weight is rounded to and stored
    in, where that is not its current type. idle: names of linears to leave. routing: see `compress_model`. With
    true_sequential, each group of linears sees the inputs that the compressed ones before it produce.
    """
    layers: dict[str, Layer] = {}
    with split(block):
        groups = shared_inputs(block, probe, [n.removeprefix(f"{prefix}.") for n in idle])
        for stage in stages(block, groups) if compression.true_sequential else [groups] * bool(groups):
            for part in pieces(block, stage):
                sums = filled_up(block, part, partial(hessians, block, batches), prefix, routing or Routing())
                jobs = _jobs(block, part, sums, compression, prefix, dtypes or {})
                names = [f"{prefix}.{name}" for group in part for name in group]
                layers |= zip(names, side_by_side(jobs, batches[0].hidden.device), strict=True)
    return layers


def _jobs(
    block: nn.Module,
    stage: Sequence[Sequence[str]],
    sums: Sequence[Tensor],
    compression: Solver,
    prefix: str,
    dtypes: Mapping[str, torch.dtype],
) -> Iterator[Callable[[], Layer]]:
    """What compresses one linear after the other in place; those on one input share a Hessian and its factors."""
    for names, hessian in zip(stage, sums, strict=True):
        with _naming(f"{prefix}.{names[0]}"):
            inverse = factorise(hessian, compression.damping, compression.act_order)
        for name in names:
            weight = matrix(block.get_submodule(name))
            dtype = dtypes.get(f"{prefix}.{name}", weight.dtype)
            yield partial(_compress_weight, f"{prefix}.{name}", weight, inverse, compression, dtype)


@torch.no_grad()
def _compress_weight(name: str, weight: Tensor, inverse: Inverse, compression: Solver, dtype: torch.dtype) -> Layer:
    """Compresses a weight in place to values of `dtype`."""
    with _naming(name):
        new, layer = solve(weight.to(dtype), inverse, compression)
        weight.copy_(new)
        check(layer, weight.to(dtype), compression)
    return layer.to("cpu")  # a GPU may not hold the compressed form of the whole model beside it


def hessians(
    block: nn.Module, batches: Sequence[Batch], groups: Sequence[Sequence[str]]
) -> tuple[list[Tensor], list[int]]:
    """X^T X / tokens of every group's shared input, float32 (inputs, inputs), and the number of tokens, which is 0
    where an expert was given none. A token counts once, whatever its batch.

    The pass ends at the last group's input: what comes after it in the block is not computed.
    """
    weights = [matrix(block.get_submodule(names[0])) for names in groups]
    sums = [torch.zeros(w.shape[1], w.shape[1], device=w.device) for w in weights]
    counts, calls = [0] * len(groups), [0] * len(groups)
    ends = False  # known after the first batch: only where no linear is run twice does the last group's run come last

    def collect(i: int, _: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0].reshape(-1, args[0].shape[-1]).float()  # 2-D in OPT's fc1 and fc2, 3-D elsewhere
        _add_gram(sums[i], x)
        counts[i] += len(x)
        calls[i] += 1
        if ends and i == len(groups) - 1:
            stop()

    with ExitStack() as stack, packed_linears(block):
        for i, names in enumerate(groups):
            hook = block.get_submodule(names[0]).register_forward_pre_hook(partial(collect, i))
            stack.callback(hook.remove)
        for batch in batches:
            with stopping():
                batch.run(block)
            ends = max(calls) == 1 or ends
    return [_mirrored(s).div_(max(n, 1)) for s, n in zip(sums, counts, strict=True)], counts


def _add_gram(total: Tensor, x: Tensor) -> None:
    """Adds X^T X to total (inputs, inputs), on and above the diagonal: stripe by stripe, little over half the work."""
    for stripe in stripes(len(total)):
        total[: stripe.stop, stripe].addmm_(x[:, : stripe.stop].T, x[:, stripe])


def _mirrored(total: Tensor) -> Tensor:
    """total with the triangle above the diagonal copied below it, in place."""
    for stripe in stripes(len(total)):
        total[stripe, stripe] = total[stripe, stripe].triu() + total[stripe, stripe].triu(1).T
        total[stripe, : stripe.start] = total[: stripe.start, stripe].T
    return total


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Errors of the solver and the checks say which linear they are about."""
    try:
        yield
    except (ValueError, ArithmeticError) as error:
        raise type(error)(f"{name}: {error}") from error


@contextmanager
def _calibrating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and no TensorFloat-32: a Hessian of 10-bit products is often not positive definite."""
    training, precision = model.training, torch.get_float32_matmul_precision()
    model.eval()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        model.train(training)
