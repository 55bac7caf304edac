"""The decoder blocks of a causal language model, and how the linears inside one hang together."""

from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ctp.architectures import families
from ctp.architectures.experts import split
from ctp.architectures.linears import linears, not_linear, shared_weight


def decoder_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The module name of the list of decoder blocks, and the list: e.g. ("model.layers", ...).

    Of the outermost lists of composed modules in the text model (towers for images and sound have a configuration of
    another kind) it is the one with as many members as the config has layers, or else the only one. Raises ValueError
    if there is none or more.
    """
    config: Any = model.config
    text = config.get_text_config(decoder=True)
    found = [(n, m) for n, m in _in_text(model, type(text)) if len(m) and all(list(b.children()) for b in m)]
    found = [(n, m) for n, m in found if not any(n.startswith(f"{other}.") for other, _ in found)]
    counts = {getattr(text, n, None) for n in ("num_hidden_layers", "decoder_layers")}
    fitting = [f for f in found if len(f[1]) in counts] or found
    if len(fitting) != 1:
        names = [n for n, _ in fitting]
        raise ValueError(f"model type {config.model_type}: {type(model).__name__}: no single list of decoder blocks; "
                         f"candidates: {names}")  # fmt: skip
    return fitting[0]


def unfit(model: nn.Module) -> str:
    """Why the weights in a model's decoder blocks cannot be compressed as they lie, "" where they can.

    Decided by modules and shapes alone: the model may be one without weights.
    """
    config: Any = model.config
    why = families.refusals(config).get("compress") or _unfit(model)
    return why if not why or why.startswith("model type ") else f"model type {config.model_type}: {why}"


def _unfit(model: nn.Module) -> str:
    try:
        prefix, blocks = decoder_blocks(model)
    except ValueError as e:
        return str(e)
    with split(blocks):
        found = linears(blocks, prefix)
        others = [other for i, block in enumerate(blocks) if (other := not_linear(block, f"{prefix}.{i}"))]
    if not found:
        return f"{prefix}: the decoder blocks have no linear to compress"
    if others:
        return f"{others[0]} is not the weight of a linear: its like are not supported"
    if same := shared_weight(model, found):
        return f"{same[0]} and {same[1]} are one weight, which cannot be compressed for the inputs of both"
    return ""


def _in_text(model: nn.Module, kind: type, name: str = "") -> Iterator[tuple[str, nn.ModuleList]]:
    """The lists of modules by name that lie in no model inside this one with a configuration of another kind."""
    for own, child in model.named_children():
        path = f"{name}.{own}" if name else own
        other = isinstance(child, PreTrainedModel) and type(child.config) is not kind
        if isinstance(child, nn.ModuleList):
            yield path, child
        if not other or any(isinstance(m, PreTrainedModel) and type(m.config) is kind for m in child.modules()):
            yield from _in_text(child, kind, path)
