"""A compressed model as a folder that other tools open."""

import copy
import json
from pathlib import Path

from huggingface_hub import save_torch_state_dict
from torch import nn

from ctp.cache import new_folder
from ctp.compression.artifact import Compressed
from ctp.compression.layer import Layer
from ctp.formats import compressed_tensors, gptq
from ctp.models import quiet, skeleton
from ctp.names import unknown

FORMATS = ("hf", "compressed-tensors", "gptq")


def export(model: Compressed, folder: str | Path, format: str) -> list[str]:
    """Write `model` into the empty or new `folder`; returns what a reader must know, a sentence each.

    hf: an ordinary Hugging Face folder. compressed-tensors: its pack-quantized format. gptq: AutoGPTQ's format.
    `AutoModelForCausalLM.from_pretrained(folder)` opens each, where compressed-tensors or GPTQModel is installed.
    Raises ValueError in one sentence where the format cannot hold the model or the folder is not empty.
    """
    if format not in FORMATS:
        raise ValueError(unknown("format", format, FORMATS))
    with quiet(), new_folder(Path(folder)) as work:
        if format == "hf":
            model.model().save_pretrained(work)
            notes = ["The weights are ordinary ones, of the size of the uncompressed model."]
        else:
            notes = _quantized(model, work, format)
        model.tokenizer.save_pretrained(work)
        if model.generation is not None:
            model.generation.save_pretrained(work)
    return notes


def _quantized(model: Compressed, folder: Path, format: str) -> list[str]:
    """Write weights and config in one of the quantized formats."""
    writer = gptq.write if format == "gptq" else compressed_tensors.write
    sym = not any(n.endswith(".zero") for n in model.packed)
    act_order = any(n.endswith(".g_idx") for n in model.packed)
    state = {n: t.to(model.config.dtype) if t.is_floating_point() else t for n, t in model.rest.items()}
    grids: set[tuple[int, int | None]] = set()
    names, kept, weights = set(), 0, 0
    for name, layer in model.layers():
        if layer.bits is None:
            raise ValueError(f"{format} has no form for pruned weights that are not quantized ({name}): export hf")
        state |= writer(name, layer, sym)
        grids.add((layer.bits, _group_size(name, layer)))
        names.add(name)
        kept, weights = kept + layer.kept, weights + layer.shape[0] * layer.shape[1]
    if len(grids) > 1:
        raise ValueError(
            f"{format}: (bits, group size) differ from linear to linear, {sorted(grids, key=str)}: export hf"
        )
    ((bits, group_size),) = grids
    config = copy.deepcopy(model.config)
    bare = skeleton(config)
    if format == "gptq":
        said = gptq.settings(bits, group_size, sym, act_order)
    else:
        linears = [n for n, m in bare.named_modules() if isinstance(m, nn.Linear)]
        said = compressed_tensors.settings(bits, group_size, sym, [n for n in linears if n not in names])
    config.quantization_config = said
    config.architectures = [type(bare).__name__]
    config.save_pretrained(folder)
    save_torch_state_dict(state, folder, metadata={"format": "pt"})
    if format == "gptq":  # where AutoGPTQ looks
        (folder / "quantize_config.json").write_text(json.dumps(said, indent=2) + "\n")
    return _notes(format, bits, sym, act_order, 1 - kept / weights)


def _group_size(name: str, layer: Layer) -> int | None:
    """Inputs that share a scale; None for one scale per output channel."""
    assert layer.scale is not None
    columns, groups = layer.shape[1], layer.scale.shape[1]
    if columns % groups:
        raise ValueError(f"{name}: {columns} inputs in {groups} groups are no groups of one size: export hf")
    return columns // groups if groups > 1 else None


def _notes(format: str, bits: int, sym: bool, act_order: bool, sparsity: float) -> list[str]:
    """What the format, or a well-known reader of it, makes of this model."""
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
    return notes
