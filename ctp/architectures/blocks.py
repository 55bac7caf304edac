"""The decoder blocks of a causal language model, and whether their weights can be compressed."""

from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ctp.architectures.experts import split
from ctp.architectures.linears import linears, not_linear, shared_weight


def decoder_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The module name of the list of decoder blocks, and the list: e.g. ("model.layers", ...).

    Of the outermost lists of composed modules in the text model (towers for images and sound have a configuration of
    another class) it is the one with as many members as the config has layers, or else the only one. Raises ValueError
    if there is none or more.
    """
    config: Any = model.config
    text = config.get_text_config(decoder=True)
    found = {n: m for n, m in _text_lists(model, type(text)) if len(m) and all(list(b.children()) for b in m)}
    found = {n: m for n, m in found.items() if not any(n.startswith(f"{other}.") for other in found)}
    counts = {getattr(text, n, None) for n in ("num_hidden_layers", "decoder_layers")}
    fitting = [(n, m) for n, m in found.items() if len(m) in counts] or list(found.items())
    if len(fitting) != 1:
        raise ValueError(f"model type {config.model_type}: {type(model).__name__}: no single list of decoder blocks; "
                         f"candidates: {[n for n, _ in fitting]}")  # fmt: skip
    return fitting[0]


def unfit(model: nn.Module) -> str:
    """Why the weights in a model's decoder blocks cannot be compressed as they are stored, "" where they can.

    Decided by modules and shapes alone: the model may be one without weights.
    """
    try:
        prefix, blocks = decoder_blocks(model)
    except ValueError as e:
        return str(e)
    with split(blocks):
        found = linears(blocks, prefix)
        others = [other for i, block in enumerate(blocks) if (other := not_linear(block, f"{prefix}.{i}"))]
    if not found:
        why = f"{prefix}: the decoder blocks have no linear to compress"
    elif others:
        why = f"{others[0]} is not the weight of a linear, which is not supported"
    elif same := shared_weight(model, found):
        why = f"{same[0]} and {same[1]} are one weight, which cannot be compressed for the inputs of both"
    else:
        return ""
    config: Any = model.config
    return f"model type {config.model_type}: {why}"


def _text_lists(model: nn.Module, kind: type, prefix: str = "") -> Iterator[tuple[str, nn.ModuleList]]:
    """The module lists by name that are in no model inside this one with a configuration of another class."""
    for name, child in model.named_children():
        path = f"{prefix}.{name}" if prefix else name
        if isinstance(child, nn.ModuleList):
            yield path, child
        other = isinstance(child, PreTrainedModel) and type(child.config) is not kind
        if not other or any(isinstance(m, PreTrainedModel) and type(m.config) is kind for m in child.modules()):
            yield from _text_lists(child, kind, path)
