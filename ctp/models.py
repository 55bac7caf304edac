"""Causal language models by name: a hub id, a folder, a GGUF file, one inside an installed package, or a tiny one.

`locate` pins a name to one exact version without loading it; `load` gives a ready model and tokenizer. Weights come
from safetensors (or GGUF, converted once per machine; or, where a hub model has no safetensors, from its .bin files, of
which tensors alone are read); code from the hub is never run.
"""

import errno
import hashlib
import json
import pickle
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ctp import families, ggufs, hub, modelfiles, tiny_models
from ctp.cache import cache_dir, check_same, digest, write_json
from ctp.context import context_length
from ctp.ggufs import LOCAL, PACKAGED, quiet
from ctp.names import brief, brief_list, shown
from ctp.paths import expanded, folder_named, there

UNPINNED = "unpinned"  # the revision of what is only planned with, while the hub cannot be reached
KNOWN = Path(__file__).with_name("known_models.json")  # hub id or package -> the revision it stands for, its Facts


@dataclass(frozen=True)
class Facts:
    """What planning needs to know of a model. context: longest input in tokens, None without a limit."""

    dtype: str
    context: int | None
    parameters: int
    layers: int  # decoder blocks
    linear_parameters: int  # weights of the linears in the decoder blocks, biases not counted
    in_features: tuple[int, ...]  # of the linears in the decoder blocks, without repetition
    vocab: int  # rows of the embedding
    width: int  # of the embedding: numbers per row of a soft prompt
    refused: Mapping[str, str]  # use (see `ctp.families`) -> why the model is refused for it; empty for most models
    needs_bos: bool = False  # must every window begin with the beginning-of-text token?

    @classmethod
    def read(cls, said: Mapping[str, Any]) -> "Facts | None":
        """From JSON; None where it does not have these very fields, as what an older ctp remembered."""
        same = said.keys() == cls.__dataclass_fields__.keys()
        return cls(**{**said, "in_features": tuple(said["in_features"])}) if same else None


@lru_cache
def known_models() -> dict[str, tuple[str, Facts]]:
    """hub id, or `package:…` -> (revision, Facts) of the models that are planned with unseen."""
    out = {}
    for name, said in json.loads(KNOWN.read_text()).items():
        found = Facts.read({n: v for n, v in said.items() if n != "commit"})
        assert found is not None, f"{KNOWN.name}: {name} has other fields than Facts"
        out[name] = (str(said["commit"]), found)
    return out


def locate(name: str, revision: str = "") -> tuple[str, str, str]:
    """(short name, revision, location) of a model. Raises ValueError, in one sentence, where there is none."""
    if name in PACKAGED or name.startswith("package:"):
        location = PACKAGED.get(name, name)
        return name.split("/")[-1], "sha256:" + digest([ggufs.packaged(location)]), location
    if name in tiny_models.NAMES:
        return tiny_models.locate(name)
    if (folder := folder_named(name)) is not None:
        short = folder.resolve().name
        if not short.isprintable():
            raise ValueError(f"the folder's name {shown(short)} has control characters, and would be printed")
        if not (folder / "config.json").is_file():
            raise ValueError(f"{name!r} is a folder without config.json, so not a Hugging Face model")
        files = _read_files(folder)
        if not any(f.suffix == ".safetensors" for f in files):
            raise ValueError(f"{name!r} holds no .safetensors file; ctp loads no pickled weights")
        if no_file := [f.name for f in files if not f.is_file()]:
            raise ValueError(f"{name!r} holds {no_file[0]}, which is no file")
        if (folder / "adapter_config.json").is_file():  # transformers would load it, and the base model that it names
            raise ValueError(f"{name!r} holds an adapter beside the model: keep it in a folder of its own")
        return short, "sha256:" + digest(files), str(folder.resolve())
    if name.endswith(ggufs.SUFFIX) and (file := expanded(name)) and there(file) and file.is_file():
        return file.stem, "sha256:" + digest([file]), f"{ggufs.SCHEME}{file.resolve()}"
    if name.startswith(("/", ".", "~")):
        raise ValueError(f"there is no folder {shown(name)}")
    if not revision and name in known_models():
        return name, known_models()[name][0], f"hub:{name}"
    instead = f"a folder, or one of: {', '.join(PACKAGED)}"
    return name, hub.commit(name, revision, instead=instead), f"hub:{name}"


def _read_files(folder: Path) -> list[Path]:
    """What of a folder is a model's, and makes its revision."""
    return sorted(f for f in folder.iterdir() if f.suffix in (".json", ".safetensors", ".model", ".txt"))


def pinned_files(location: str) -> list[Path]:
    """The files whose hash is the revision of a location; none where the location itself is exact."""
    if location.startswith("package:"):
        return [ggufs.packaged(location)]
    if location.startswith(ggufs.SCHEME):
        return [Path(location.removeprefix(ggufs.SCHEME))]
    if location.startswith(("hub:", tiny_models.SCHEME)):
        return []
    if files := _read_files(Path(location)):
        return files
    raise FileNotFoundError(errno.ENOENT, "it is empty", location)


def check_pinned(location: str, revision: str) -> None:
    """Raises Changed, in one sentence, where what is at a location is not, or no more, of this revision; "" is any."""
    if revision:
        check_same(f"the model {location}", revision, lambda: pinned_files(location))


def load(location: str, revision: str, dtype: str = "auto", device: str = "cpu") -> tuple[Any, Any]:
    """(model in eval mode on `device`, tokenizer) of a location that `locate` gave.

    Raises ValueError, in one sentence, where it cannot be loaded, is not whole, or has changed since it was located.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    check_pinned(location, revision)
    folder, safe = _folder(location, revision)
    kind = dtype if dtype == "auto" else getattr(torch, dtype)
    if safe:
        modelfiles.weight_files(folder)
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

    folder = _folder(location, revision, weights=False)[0]
    try:
        return AutoTokenizer.from_pretrained(folder, **LOCAL)
    except Exception as e:  # transformers' own, and those of the libraries below it, have no common kind
        raise ValueError(
            f"the tokenizer of {location} cannot be loaded: {modelfiles.needs_code(folder) or brief(e)}"
        ) from e


def check_usable(location: str, revision: str, vocab: int) -> None:
    """Raise ValueError for a folder whose weights are not whole, or whose tokenizer has ids beyond `vocab` embeddings.

    Looked at once a machine, without the weights themselves.
    """
    memo = cache_dir() / "whole" / f"{revision.replace(':', '-')}.json"
    if memo.exists() or not Path(location).is_absolute():
        return
    modelfiles.weight_files(Path(location))
    if said := modelfiles.read_object(Path(location) / "config.json").get("quantization_config"):
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


def place(model: Any, device: str) -> Any:
    """The model on `device`; spread over the GPUs where this process has been given several."""
    import torch

    if device != "cuda" or torch.cuda.device_count() < 2:
        return model.to(device)
    from accelerate import dispatch_model, infer_auto_device_map

    split = infer_auto_device_map(model, no_split_module_classes=model._no_split_modules)
    return dispatch_model(model, device_map=split)


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


@lru_cache
def facts(location: str, revision: str) -> Facts:
    """Read from the configuration alone (no weights), remembered per machine; of the known models without a network.

    Raises ValueError, in one sentence, where the configuration is not to be had or not understood.
    """
    commit, known = known_models().get(location.removeprefix("hub:"), ("", None))
    if known is not None and location.startswith(("hub:", "package:")) and revision in (commit, UNPINNED):
        return known
    memo = cache_dir() / "facts" / _rules() / f"{revision.replace(':', '-')}.json"
    if memo.exists() and (remembered := Facts.read(json.loads(memo.read_text()))):
        return remembered
    from transformers import AutoConfig

    folder, _ = _folder(location, revision, weights=False)
    modelfiles.check_config(folder)
    files = modelfiles.weight_files(folder, named=False) if any(folder.glob("*.safetensors")) else []
    held = {n: s for f in files for n, s in modelfiles.shapes(f).items()}
    try:
        with quiet():
            config = AutoConfig.from_pretrained(folder, **LOCAL)
            _check_causal(config)
            found = config_facts(config)
            _check_shapes(config, held)
    except Exception as e:  # whatever a configuration that fits no model makes transformers and torch raise
        raise ValueError(
            f"the configuration of {location} cannot be used: {modelfiles.needs_code(folder) or brief(e)}"
        ) from e
    check_pinned(location, revision)
    write_json(memo, asdict(found))
    return found


@lru_cache
def _rules() -> str:
    """Twelve digits that change with what Facts are read by: this code and transformers."""
    code = [f for at in (".", "compression") for f in sorted((Path(__file__).parent / at).glob("*.py"))]
    read = b"".join(f.read_bytes() for f in code) + version("transformers").encode()
    return hashlib.sha256(read).hexdigest()[:12]


def config_facts(config: Any) -> Facts:
    """The Facts of a transformers configuration; dtype float32 where it says none."""
    import torch

    from ctp.compression.blocks import decoder_blocks, unfit
    from ctp.compression.chain import foreseen
    from ctp.compression.experts import split
    from ctp.compression.linears import linears, matrix

    model, idle = skeleton(config).eval(), frozenset[str]()
    refused, why = families.refusals(model.config), unfit(model)  # a class may make a decoder of its configuration
    try:
        prefix, blocks = decoder_blocks(model)
        if not why:
            why, idle = foreseen(model)
    except ValueError as e:  # `why` says so
        prefix, blocks = "", torch.nn.ModuleList()
        refused.setdefault("lora", str(e))
    if why:
        refused["compress"] = why
    with split(blocks):
        weights = [matrix(m) for n, m in linears(blocks, prefix).items() if n not in idle]
    embedding = model.get_input_embeddings()
    if why := families.no_projections(config, blocks):
        refused.setdefault("lora", why)
    return Facts(
        dtype=str(config.dtype or torch.float32).removeprefix("torch."),
        context=context_length(config),
        parameters=sum(p.numel() for p in model.parameters()),
        layers=len(blocks) or getattr(config.get_text_config(), "num_hidden_layers", 0),
        linear_parameters=sum(w.numel() for w in weights),
        in_features=tuple(sorted({w.shape[1] for w in weights})),
        vocab=embedding.num_embeddings,
        width=embedding.embedding_dim,
        refused=refused,
        needs_bos=families.needs_bos(config),
    )


def skeleton(config: Any) -> Any:
    """The ordinary model of a configuration, without weights: its modules, names and shapes."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def _check_shapes(config: Any, held: Mapping[str, tuple[int, ...]]) -> None:
    """Raises ValueError where tensors in a folder are not those of its configuration."""
    if not held or getattr(config, "quantization_config", None) is not None:  # other tensors stand for its linears
        return
    model = skeleton(config)
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    wanted = {n: tuple(t.shape) for n, t in model.state_dict().items() if n not in tied}
    modelfiles.check_shapes(held, wanted, type(model).__name__)


def _check_causal(config: Any) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ValueError(f"model_type = {config.model_type!r} is no causal language model that transformers knows")


def _folder(location: str, revision: str, weights: bool = True) -> tuple[Path, bool]:
    """(folder for `from_pretrained`, whether its weights are safetensors); weights=False: they need not be there."""
    if location.startswith("hub:"):
        return hub.fetch_model(location.removeprefix("hub:"), revision, weights)
    if location.startswith("package:"):
        return ggufs.folder(ggufs.packaged(location), revision), True
    if location.startswith(ggufs.SCHEME):
        return ggufs.folder(Path(location.removeprefix(ggufs.SCHEME)), revision), True
    if location.startswith(tiny_models.SCHEME):
        return tiny_models.folder(location, revision), True
    return Path(location), True
