"""Causal language models by name: a hub id, a folder, a GGUF file, one inside an installed package, or a tiny one.

`sources.locate` pins a name to one exact version; `load_model` gives a ready model and tokenizer. Weights come from
safetensors (or GGUF, converted once per machine; or, where a hub model has no safetensors, from its .bin files, of
which tensors alone are read); code from the hub is never run.
"""

import pickle
from pathlib import Path
from typing import Any

from ctp.common.files import cache_dir, write_json
from ctp.common.messages import brief, shown
from ctp.models import files as model_files
from ctp.models.hf import LOCAL, check_complete, place, quiet
from ctp.models.sources import check_pinned, model_folder


def load_model(location: str, revision: str, dtype: str = "auto", device: str = "cpu") -> tuple[Any, Any]:
    """(model in eval mode on `device`, tokenizer) of a location that `locate` gave.

    Raises ValueError, in one sentence, where it cannot be loaded, is not whole, or has changed since it was located.
    """
    import torch

    check_pinned(location, revision)
    folder, safe = model_folder(location, revision)
    if safe:
        model_files.weight_files(folder)
    kind = dtype if dtype == "auto" else getattr(torch, dtype)
    model, _ = _load(location, folder, dtype=kind, use_safetensors=safe)
    tokenizer = load_tokenizer(location, revision)
    check_pinned(location, revision)
    return place(model, device).eval(), tokenizer


def _load(name: str, folder: Path, **settings: Any) -> tuple[Any, dict[str, Any]]:
    """(model, transformers' loading info). Raises ValueError, calling the model `name`, where it is not whole."""
    import torch
    from transformers import AutoModelForCausalLM

    try:  # A .bin is read by torch.load with weights_only; from a folder transformers asks nobody to convert it.
        with quiet():
            model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **settings, **LOCAL)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except pickle.UnpicklingError as e:
        raise ValueError(f"a .bin file of {name} holds more than tensors, and code in it is not run") from e
    except Exception as e:  # whatever files that fit no model make transformers and torch raise
        raise ValueError(f"the model {name} cannot be loaded: {brief(e)}") from e
    check_complete(name, info)
    return model, info


def load_tokenizer(location: str, revision: str) -> Any:
    """The tokenizer of a location that `locate` gave."""
    from transformers import AutoTokenizer

    folder = model_folder(location, revision, weights=False)[0]
    try:
        return AutoTokenizer.from_pretrained(folder, **LOCAL)
    except Exception as e:  # transformers' own, and those of the libraries below it, have no common kind
        why = model_files.needs_code(folder) or brief(e)
        raise ValueError(f"the tokenizer of {location} cannot be loaded: {why}") from e


def check_usable(location: str, revision: str, vocab: int) -> None:
    """Raise ValueError for a folder whose weights are not whole, or whose tokenizer has ids beyond `vocab` embeddings.

    Looked at once a machine, without the weights themselves.
    """
    memo = cache_dir() / "whole" / f"{revision.replace(':', '-')}.json"
    if memo.exists() or not Path(location).is_absolute():
        return
    folder = Path(location)
    model_files.check_files(folder)
    if found := model_files.read_object(folder / "config.json").get("quantization_config"):
        how = found.get("quant_method") if isinstance(found, dict) else found
        raise ValueError(f"{location} is quantized already (quant_method = {shown(how)}): a grid's models are plain; "
                         "name it as a compression of its base model, {method: checkpoint, path: …}")  # fmt: skip
    _check_weights(folder)
    ids = load_tokenizer(location, revision).get_vocab().values()
    if max(ids, default=-1) >= vocab:
        raise ValueError(f"the tokenizer of {location} has tokens up to {max(ids)}, and the model's embedding {vocab} "
                         "rows: it is another model's")  # fmt: skip
    check_pinned(location, revision)
    write_json(memo, {"vocab": vocab})


def _check_weights(folder: Path) -> None:
    """Raise ValueError where a weight is missing or has the wrong shape, by transformers' own names, reading none."""
    settings = {"device_map": {"": "meta"}, "use_safetensors": True, "ignore_mismatched_sizes": True}
    _, info = _load(str(folder), folder, **settings)
    for name, stored, expected in sorted(info["mismatched_keys"]):
        shapes = f"{name} is {tuple(stored)}, and config.json says {tuple(expected)}"
        raise ValueError(f"the weights of {folder} are not this model's: {shapes}")
