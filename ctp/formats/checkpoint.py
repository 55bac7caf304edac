"""Compressed models made elsewhere: a folder of AutoGPTQ, GPTQModel, AutoAWQ, bitsandbytes or llm-compressor, or a
pruned one, as `Compressed`.

Their weights are unpacked by ctp's own code: no foreign kernel ever computes with them or carries a gradient.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer

from ctp.architectures.blocks import decoder_blocks
from ctp.architectures.experts import matrices
from ctp.architectures.linears import as_stored, is_linear, linears, matrix
from ctp.architectures.names import names_here
from ctp.common import hub
from ctp.formats import awq, bitsandbytes, compressed_tensors, gguf, gptq
from ctp.formats.artifact import PACKED, Compressed, read_generation, read_tensors
from ctp.formats.checks import FLOATS, Layers, part
from ctp.formats.layer import Layer
from ctp.formats.pack import pack
from ctp.models import gguf as model_gguf
from ctp.models import tiny
from ctp.models.files import read_object, weight_files
from ctp.models.hf import LOCAL, skeleton
from ctp.models.sources import check_pinned

READERS: dict[str, Any] = {
    "gptq": gptq, "awq": awq, "bitsandbytes": bitsandbytes, "compressed-tensors": compressed_tensors
}  # fmt: skip


def fetch(location: str, revision: str, weights: bool = True) -> Path:
    """The folder, or GGUF file, of a checkpoint that `sources.locate` found. weights: False for the configuration.

    Raises ValueError where it has changed since it was pinned, or is no folder of its own.
    """
    if location.startswith("hub:"):
        files = (*hub.CONFIG, "*.safetensors") if weights else hub.CONFIG
        return hub.fetch(location.removeprefix("hub:"), revision, files, "checkpoint")
    if location.startswith(("package:", tiny.SCHEME)):
        raise ValueError("a checkpoint is a folder or a hub id, not a tiny or packaged model")
    check_pinned(location, revision)
    return Path(location.removeprefix(model_gguf.SCHEME))


def quantization(folder: Path) -> dict[str, Any] | None:
    """The quantization config of a checkpoint, from config.json or AutoGPTQ's quantize_config.json; None without one.

    Raises ValueError naming the file or field that ctp cannot read.
    """
    if folder.suffix == model_gguf.SUFFIX:
        return None  # the file itself says it
    config = read_object(folder / "config.json")
    found = next((config[n] for n in ("quantization_config", "compression_config") if config.get(n) is not None), None)
    beside = folder / "quantize_config.json"
    if found is None and beside.is_file():
        found = {"quant_method": "gptq", **read_object(beside)}
    if found is None:
        return None
    if not isinstance(found, dict):
        raise ValueError(f"quantization_config = {found!r}: should be an object")
    if found.get("quant_method") not in READERS:
        raise ValueError(f"quant_method = {found.get('quant_method')!r}: allowed: {', '.join(READERS)}")
    READERS[found["quant_method"]].check(found)
    return found


def open_checkpoint(folder: Path, dtype: str = "auto", tokenizer: Any = None) -> Compressed:
    """The compressed model in `folder`, or in a GGUF file; ctp's own included.

    dtype: what it computes in, "auto" as its config says. tokenizer: the base model's; without one, the folder's own.
    Raises ValueError, in one sentence, where it is not compressed, not complete, in a format that ctp does not read, or
    does not fit its configuration.
    """
    if (folder / PACKED).is_file():  # ctp's own
        opened = Compressed.open(folder)
        opened.config.dtype = opened.config.dtype if dtype == "auto" else getattr(torch, dtype)
        return replace(opened, tokenizer=tokenizer or opened.tokenizer)
    file = folder if folder.suffix == model_gguf.SUFFIX and folder.is_file() else None
    if file is not None:
        folder = model_gguf.folder(file)
    settings = quantization(folder)
    config = AutoConfig.from_pretrained(folder, **LOCAL)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = (config.dtype or torch.float32) if dtype == "auto" else getattr(torch, dtype)
    bare = skeleton(config)
    modules = dict(bare.named_modules())
    tensors = _renamed(_tensors(folder), bare)
    if file is not None:
        found = gguf.layers(tensors, file, bare)
    else:
        found = READERS[settings["quant_method"]].layers(tensors, settings) if settings else _pruned(tensors, bare)
    packed: dict[str, Tensor] = {}
    used: set[str] = set()
    for name, layer, parts in found:
        _check_linear(name, layer.shape, modules)
        packed |= pack({name: layer})
        used |= parts
    if not packed:
        raise ValueError(
            f"{(file or folder).name} holds no quantized and no pruned weights: it is a model, not a compressed one"
        )
    rest = {n: t for n, t in tensors.items() if n not in used and not _leftover(n, t, modules)}
    _check_rest(rest, bare)
    tokenizer = tokenizer or AutoTokenizer.from_pretrained(folder, **LOCAL)
    return Compressed(packed, rest, config, tokenizer, read_generation(folder))


def _tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of the folder's weight files. Raises ValueError where two files hold one of the same name."""
    out: dict[str, Tensor] = {}
    for file in weight_files(folder, named=False):
        found = read_tensors(file)
        if twice := sorted(out.keys() & found.keys()):
            raise ValueError(f"{file} holds {twice[0]}, and another .safetensors file too: which of them is the model?")
        out |= found
    return out


def _renamed(tensors: Mapping[str, Tensor], bare: nn.Module) -> dict[str, Tensor]:
    """Tensors of a checkpoint by their names in the model, those of experts by the names of their linears."""
    here, experts = names_here(bare), matrices(bare).values()
    inside = {m.name for m in experts}
    out: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        module, _, field = name.rpartition(".")
        known = here.get(name) or (f"{here[module]}.{field}" if module in here else "")
        out[known or (name if module in inside else _module_name(name, bare))] = tensor
    for m in experts:
        if m.parameter in out:
            out[f"{m.name}.weight"] = m.of(out[m.parameter]).contiguous()
    whole = {m.parameter for m in experts}
    return {n: t for n, t in out.items() if n not in whole}


def _module_name(name: str, bare: nn.Module) -> str:
    """The tensor's name in the whole causal model: some checkpoints were saved without the head's prefix."""
    prefix = str(getattr(bare, "base_model_prefix", ""))
    first = name.partition(".")[0]
    return f"{prefix}.{name}" if prefix and first not in dict(bare.named_children()) else name


def _pruned(tensors: Mapping[str, Tensor], bare: nn.Module) -> Layers:
    """Linears of the decoder blocks with so many zeros that a mask pays."""
    prefix, blocks = decoder_blocks(bare)
    known = linears(blocks, prefix)
    for name in [*known, *(m.name for m in matrices(bare).values())]:
        stored = tensors.get(f"{name}.weight")
        if stored is None:
            continue  # refused when the model is built
        weight = as_stored(known.get(name), stored)
        mask = weight != 0
        if int(mask.sum()) + weight.numel() / (8 * weight.element_size()) < weight.numel():
            yield name, Layer((weight.shape[0], weight.shape[1]), mask=mask, values=weight[mask]), {f"{name}.weight"}


def _check_linear(name: str, shape: tuple[int, int], modules: Mapping[str, nn.Module]) -> None:
    """Raises ValueError where a compressed weight has not the shape of the model's.

    Not of an expert's; a name that is unknown is refused when the model is built.
    """
    if name in modules and (expected := tuple(matrix(modules[name]).shape)) != shape:
        raise ValueError(f"{name}: its tensors make a weight {shape}, and config.json says {expected}")


def _check_rest(rest: Mapping[str, Tensor], bare: nn.Module) -> None:
    """Raises ValueError naming a weight that is stored as it is and is no weight of the model's: shape, dtype, NaN."""
    wanted = bare.state_dict()
    for name, tensor in rest.items():
        if name not in wanted:
            continue  # another name to transformers, or unknown and refused when the model is built
        dtypes = (*FLOATS, torch.float64) if wanted[name].is_floating_point() else (wanted[name].dtype,)
        try:
            part({"it": tensor}, "it", dtypes, tuple(wanted[name].shape))
        except ValueError as e:
            raise ValueError(f"{name}: {e}") from e


def _leftover(name: str, tensor: Tensor, modules: Mapping[str, nn.Module]) -> bool:
    """What old checkpoints carry along: buffers that transformers computes, all-zero biases of linears without bias."""
    module, _, field = name.rpartition(".")
    linear = modules.get(module)
    unused = field == "bias" and linear is not None and is_linear(linear) and linear.bias is None
    return name.endswith("rotary_emb.inv_freq") or (unused and not bool(tensor.any()))
