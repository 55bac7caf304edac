"""Causal language models by name: a hub id, a folder, a GGUF file, one inside an installed package, or a tiny one.

`locate` pins a name to one exact version without loading it; `load` gives a ready model and tokenizer. Weights come
from safetensors (or GGUF, converted once per machine; or, where a hub model has no safetensors, from its .bin files, of
which tensors alone are read); code from the hub is never run.
"""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ctp.common.files import cache_dir, write_json
from ctp.common.messages import brief, brief_list, shown
from ctp.models import files as model_files
from ctp.models.hf import LOCAL, place, quiet
from ctp.models.sources import check_pinned, model_folder


def load_model(location: str, revision: str, dtype: str = "auto", device: str = "cpu") -> tuple[Any, Any]:
    """(model in eval mode on `device`, tokenizer) of a location that `locate` gave.

    Raises ValueError, in one sentence, where it cannot be loaded, is not whole, or has changed since it was located.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    check_pinned(location, revision)
    folder, safe = model_folder(location, revision)
    kind = dtype if dtype == "auto" else getattr(torch, dtype)
    if safe:
        model_files.weight_files(folder)
    try:  # A .bin is read by torch.load with weights_only; from a folder transformers asks nobody to convert it.
        with quiet():
            model, info = AutoModelForCausalLM.from_pretrained(
                folder, dtype=kind, use_safetensors=safe, output_loading_info=True, **LOCAL
            )
    except pickle.UnpicklingError as e:
        raise ValueError(f"a .bin file of {location} holds more than tensors, and code in it is not run") from e
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, ImportError, SafetensorError) as e:
        if isinstance(e, torch.OutOfMemoryError):
            raise
        raise ValueError(f"the model {location} cannot be loaded: {brief(e)}") from e
    _check_lacking(location, info)
    tokenizer = load_tokenizer(location, revision)
    check_pinned(location, revision)
    return place(model, device).eval(), tokenizer


def load_tokenizer(location: str, revision: str) -> Any:
    """The tokenizer of a location that `locate` gave."""
    from transformers import AutoTokenizer

    folder = model_folder(location, revision, weights=False)[0]
    try:
        return AutoTokenizer.from_pretrained(folder, **LOCAL)
    except Exception as e:  # transformers' own, and those of the libraries below it, have no common kind
        raise ValueError(
            f"the tokenizer of {location} cannot be loaded: {model_files.needs_code(folder) or brief(e)}"
        ) from e


def check_usable(location: str, revision: str, vocab: int) -> None:
    """Raise ValueError for a folder whose weights are not whole, or whose tokenizer has ids beyond `vocab` embeddings.

    Looked at once a machine, without the weights themselves.
    """
    memo = cache_dir() / "whole" / f"{revision.replace(':', '-')}.json"
    if memo.exists() or not Path(location).is_absolute():
        return
    model_files.weight_files(Path(location))
    if said := model_files.read_object(Path(location) / "config.json").get("quantization_config"):
        how = said.get("quant_method") if isinstance(said, dict) else said
        raise ValueError(f"{location} is quantized already (quant_method = {shown(how)}): a grid's models are plain; "
                         "name it as a compression of its base model, {method: checkpoint, path: …}")  # fmt: skip
    _check_whole(Path(location))
    ids = load_tokenizer(location, revision).get_vocab().values()
    if max(ids, default=-1) >= vocab:
        raise ValueError(f"the tokenizer of {location} has tokens up to {max(ids)}, and the model's embedding {vocab} "
                         "rows: it is another model's")  # fmt: skip
    check_pinned(location, revision)
    write_json(memo, {"vocab": vocab})


def _check_whole(folder: Path) -> None:
    """Raise ValueError where a weight lacks or is of another shape, by transformers' own names, without reading any."""
    from transformers import AutoModelForCausalLM

    try:
        with quiet():
            _, info = AutoModelForCausalLM.from_pretrained(
                folder, device_map={"": "meta"}, use_safetensors=True, ignore_mismatched_sizes=True,
                output_loading_info=True, **LOCAL
            )  # fmt: skip
    except Exception as e:  # whatever files that fit no model make transformers and torch raise
        raise ValueError(f"the model {folder} cannot be loaded: {brief(e)}") from e
    _check_lacking(str(folder), info)
    for name, held, wanted in sorted(info["mismatched_keys"]):
        raise ValueError(f"the weights of {folder} are not this model's: {name} is {tuple(held)}, not {tuple(wanted)}")


def _check_lacking(where: str, info: Mapping[str, Any]) -> None:
    if lacking := sorted(info["missing_keys"]):  # transformers fills in random numbers
        raise ValueError(f"the weights of {where} are incomplete: {brief_list(lacking)} missing")
