"""A compressed model as a folder that other tools open."""

import copy
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import save_torch_state_dict
from torch import nn

from ctp.architectures.blocks import decoder_blocks
from ctp.architectures.experts import experts_in, matrices, routers
from ctp.architectures.names import as_original, original_names
from ctp.common.files import new_folder
from ctp.common.messages import unknown
from ctp.formats import FORMATS, compressed_tensors, gptq
from ctp.formats.artifact import Compressed, save_generation, save_model
from ctp.formats.checkpoint import open_checkpoint
from ctp.formats.layer import Layer
from ctp.formats.loaders import refusal
from ctp.models.hf import quiet, skeleton


def export(model: Compressed | str | Path, folder: str | Path, format: str) -> list[str]:
    """Write `model` (what `ctp.compress` gave, or a folder with a compressed one) into a new or empty folder.

    Returns what a reader must know, a sentence each.

    hf: an ordinary Hugging Face folder. compressed-tensors: its pack-quantized format. gptq: AutoGPTQ's format.
    `AutoModelForCausalLM.from_pretrained(folder)` opens each, where compressed-tensors or GPTQModel is installed.
    Raises ValueError in one sentence where the format cannot hold the model or the folder is not empty.
    """
    if format not in FORMATS:
        raise ValueError(unknown("format", format, FORMATS))
    if isinstance(model, str | Path):
        model = open_checkpoint(Path(model))
    if not isinstance(model, Compressed):
        raise ValueError(f"a {type(model).__name__} is neither what ctp.compress gave nor a folder with such a model")
    with quiet(), new_folder(Path(folder)) as work:
        if format == "hf":
            whole = model.model()
            if experts_in(whole):  # under the names of the original checkpoints, not of `Compressed`
                vars(whole).pop("_weight_conversions", None)
            save_model(whole, work)
            notes = ["The weights are ordinary ones, of the size of the uncompressed model."]
        else:
            notes = _quantized(model, work, format)
        model.tokenizer.save_pretrained(work)
        save_generation(model.generation, work)
    return notes


def _quantized(model: Compressed, folder: Path, format: str) -> list[str]:
    """Write weights and config in one of the quantized formats; returns notes for readers."""
    config = copy.deepcopy(model.config)
    bare = skeleton(config)
    experts = {m.name: m for m in matrices(bare).values()}
    grids = _grids(model, format)
    shapes = {n: grid.shape for n, grid in grids.items()}
    if why := refusal(format, bare, shapes, experts, max(grid.bits for grid in grids.values())):
        raise ValueError(why)
    bits, group_size = _common(format, grids)
    sym = not any(n.endswith(".zero") for n in model.packed)
    act_order = any(n.endswith(".g_idx") for n in model.packed)
    notes = _notes(format, bits, sym, act_order, model.stats()["sparsity"], bool(experts))
    state = {n: t.to(model.config.dtype) if t.is_floating_point() else t for n, t in model.rest.items()}
    written: dict[str, str] = {}  # linears with other names than in transformers
    if experts:
        state, written = as_original(bare, state), original_names(bare, grids.keys() - experts)
    if format == "gptq":
        split = _split(grids) if bits == 4 and not sym and group_size is None else None
        if split:
            notes.append(f"Each channel's scale is written for {split} inputs at a time: {_MISREAD}.")
        for name, layer in model.layers():
            state |= gptq.write(written.get(name, name), _regrouped(layer, split) if split else layer, sym)
        settings = gptq.settings(bits, split or group_size, sym, act_order)
        settings["block_name_to_quantize"] = decoder_blocks(bare)[0]  # transformers' loader knows some models' only
        (folder / "quantize_config.json").write_text(json.dumps(settings, indent=2) + "\n")  # where AutoGPTQ looks
    else:
        for name, layer in model.layers():
            if name in experts and layer.scale is not None:  # transformers unpacks them in the type of their scales
                layer = replace(layer, scale=layer.scale.to(config.dtype))
            state |= compressed_tensors.write(written.get(name, name), layer, sym)
        settings = compressed_tensors.settings(bits, group_size, sym, _ignored(bare, grids))
    config.quantization_config = settings
    config.architectures = [type(bare).__name__]
    config.save_pretrained(folder)
    save_torch_state_dict(state, folder, metadata={"format": "pt"})
    return notes


# Seen with 7.6, its own checkpoints included: logits without any likeness.
_MISREAD = "GPTQModel's default kernel for CPUs misreads 4 bit asymmetric channels"


class _Grid(NamedTuple):
    """Of one linear. shape: (outputs, inputs)."""

    bits: int
    shape: tuple[int, int]
    groups: int


def _grids(model: Compressed, format: str) -> dict[str, _Grid]:
    """The grid of every linear. Raises ValueError naming one that the format cannot hold."""
    grids = {}
    for name, layer in model.layers():
        if layer.bits is None:
            raise ValueError(f"{format} has no form for pruned weights that are not quantized ({name}): export hf")
        if layer.bits not in gptq.BITS:
            raise ValueError(f"{format} has no form for {layer.bits} bits ({name}): export hf")
        if layer.table is not None or layer.shift is not None:
            raise ValueError(f"{format} has no form for codes that are not evenly spaced around a zero point ({name}): "
                             "export hf")  # fmt: skip
        grids[name] = _Grid(layer.bits, layer.shape, layer.zero_points().shape[1])
    return grids


def _common(format: str, grids: Mapping[str, _Grid]) -> tuple[int, int | None]:
    """(bits, group size) that all linears share; group size None: one grid per output. Raises ValueError if none."""
    if uneven := [name for name, grid in grids.items() if grid.shape[1] % grid.groups]:
        raise ValueError(f"{format}: the groups of {uneven[0]} are not of one size: export hf")
    widths = {grid.bits for grid in grids.values()}
    sizes = {grid.shape[1] // grid.groups for grid in grids.values()}
    if all(grid.groups == 1 for grid in grids.values()):
        sizes = set()
    if len(widths) > 1 or len(sizes) > 1:
        raise ValueError(f"{format}: linears differ in bits {sorted(widths)} or group size {sorted(sizes)}: export hf")
    return widths.pop(), sizes.pop() if sizes else None


def _ignored(bare: Any, grids: Mapping[str, Any]) -> list[str]:
    """Linears that stay as they are, those of routers among them, by their names here and in the checkpoint."""
    left = routers(bare)
    kept = [n for n, m in bare.named_modules() if n not in grids and (isinstance(m, nn.Linear) or n in left)]
    return list(dict.fromkeys([*kept, *original_names(bare, kept).values()])) if left else kept


def _split(grids: Mapping[str, _Grid]) -> int:
    """A group size that divides the inputs of all linears."""
    for size in (128, 64, 32):
        if all(grid.shape[1] % size == 0 for grid in grids.values()):
            return size
    raise ValueError(f"gptq: {_MISREAD}, and no group of 128, 64 or 32 divides the inputs of all linears: export hf")


def _regrouped(layer: Layer, size: int) -> Layer:
    """The same weights with a channel's scale and zero point repeated for every `size` inputs."""
    assert layer.scale is not None
    times = layer.shape[1] // size
    return replace(layer, scale=layer.scale.repeat(1, times), zero=layer.zero_points().repeat(1, times))


def _notes(format: str, bits: int, sym: bool, act_order: bool, sparsity: float, experts: bool) -> list[str]:
    """How the format, or a well-known reader of it, treats this model.

    Raises ValueError where no loader of the format would read the experts of a mixture right.
    """
    if experts and not sym:
        raise ValueError(
            f"{format}: loaders read experts on symmetric grids only: compress with sym: true, or export hf"
        )
    if experts and format == "gptq" and (bits not in (4, 8) or act_order):
        raise ValueError("gptq: loaders read experts of 4 or 8 bits without act-order only: export hf")
    notes = []
    if sparsity:
        notes.append(
            f"{format} has no mask: the {sparsity:.1%} pruned weights stay exactly 0 but take {bits} bits each."
        )
    if format == "gptq" and not sym:
        notes.append("The asymmetric grid is written as version 2 (gptq_v2), which AutoGPTQ itself does not know.")
    if format == "gptq" and (bits not in (4, 8) or not sym or act_order):
        notes.append("vLLM reads this format with 4 or 8 bits, symmetric and without act-order only; transformers all.")
    if format == "compressed-tensors" and bits not in (4, 8):
        notes.append(f"vLLM has kernels for 4 and 8 bits of this format, not for {bits}; transformers reads all.")
    if format == "gptq" and experts:
        notes.append("transformers opens no experts of this format; vLLM and ctp.load do.")
    return notes
