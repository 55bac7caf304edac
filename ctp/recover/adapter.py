"""Adapters in PEFT's format that were made elsewhere: soft prompts and LoRA. safetensors and JSON only.

`locate` pins one to an exact version, `fetch` gives its folder, `adapter_facts` says what it is, `applied` uses it.
"""

import json
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ctp import hub
from ctp.cache import check_same, digest
from ctp.modelfiles import shapes
from ctp.names import shown
from ctp.paths import folder_named

if TYPE_CHECKING:  # torch takes seconds to import, and pinning a grid needs none of it
    from torch import Tensor
    from transformers import PreTrainedModel

CONFIG, ADAPTER = "adapter_config.json", "adapter_model.safetensors"
FILES = (CONFIG, ADAPTER)
KINDS: dict[str, Literal["prompt", "lora"]] = {"PROMPT_TUNING": "prompt", "LORA": "lora"}
# What would change the model's own weights or layers, so that taking the adapter off leaves another model.
PLAIN_LORA: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None,),
    "layer_replication": (None,),
    "init_lora_weights": (True, False, "gaussian"),
}


@dataclass(frozen=True)
class AdapterFacts:
    """What planning needs to know. k: rows of a prompt, 0 for LoRA. width: their numbers each, 0 for LoRA."""

    kind: Literal["prompt", "lora"]
    k: int
    width: int


def locate(path: str, revision: str = "") -> tuple[str, str, str]:
    """(short name, revision, location) of a folder or hub id. Raises ValueError, in one sentence, if there is none."""
    if (folder := folder_named(path)) is not None:
        _check_files(folder)
        return folder.resolve().name, _revision(folder), str(folder.resolve())
    if path.startswith(("/", ".", "~")):
        raise ValueError(f"there is no folder {shown(path)}")
    return path, hub.commit(path, revision, "adapter"), f"hub:{path}"


def fetch(location: str, revision: str) -> Path:
    """The folder with the adapter's files. Raises ValueError if it is not what was pinned, or not to be had."""
    if not location.startswith("hub:"):
        folder = Path(location)
        check_pinned(location, revision)
        _check_files(folder)
        return folder
    folder = hub.fetch(location.removeprefix("hub:"), revision, FILES, "adapter")
    _check_files(folder)
    return folder


def pinned_files(location: str) -> list[Path]:
    """The files whose hash is the revision of a location that `locate` gave; none of one on the hub."""
    return [] if location.startswith("hub:") else [Path(location) / name for name in FILES]


def check_pinned(location: str, revision: str) -> None:
    """Raises Changed, in one sentence, where what lies at a location is not (or no more) of this revision."""
    check_same(f"the adapter {location}", revision, lambda: pinned_files(location))


def adapter_facts(folder: str | Path) -> AdapterFacts:
    """What the adapter's configuration says; weights are not read.

    Raises ValueError for a folder that is no adapter in safetensors, or an adapter that ctp cannot use.
    """
    _check_files(Path(folder))
    shapes(Path(folder) / ADAPTER)  # raises where it is not whole
    try:
        config = json.loads((Path(folder) / CONFIG).read_text())
        kind, task = config["peft_type"], config["task_type"]
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(f"{CONFIG} of {folder} is no adapter's configuration: {type(e).__name__}: {e}") from e
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"{CONFIG}: peft_type = {shown(kind)}, allowed: {', '.join(KINDS)}")
    if task != "CAUSAL_LM":
        raise ValueError(f"{CONFIG}: task_type = {shown(task)}, allowed: CAUSAL_LM")
    if KINDS[kind] == "prompt":
        k, width = config.get("num_virtual_tokens"), config.get("token_dim")
        if not isinstance(k, int) or not isinstance(width, int) or k < 1 or width < 1:
            raise ValueError(
                f"{CONFIG}: num_virtual_tokens = {shown(k)} and token_dim = {shown(width)} must be above 0"
            )
        return AdapterFacts("prompt", k, width)
    for name, allowed in PLAIN_LORA.items():
        if (value := config.get(name, allowed[0])) not in allowed:
            raise ValueError(f"{CONFIG}: {name} = {shown(value)}, allowed: {', '.join(map(str, allowed))}")
    return AdapterFacts("lora", 0, 0)


def copy_adapter(folder: Path, to: Path) -> None:
    """Copy an adapter's two files, whatever else lies beside them."""
    for name in FILES:
        shutil.copyfile(folder / name, to / name)


def parameters(folder: str | Path) -> int:
    """How many numbers the adapter has."""
    return sum(math.prod(shape) for shape in _tensors(Path(folder)).values())


@contextmanager
def applied(model: "PreTrainedModel", folder: str | Path) -> "Iterator[Tensor | None]":
    """The model with the adapter: yields a soft prompt (k, d) in fp32, to be put in front, or None with LoRA injected.

    LoRA is taken off again on the way out: the same modules, flags and weights as before. Inside, the model is in
    evaluation mode and nothing asks for a gradient. Raises ValueError where the adapter does not fit the model.
    """
    from ctp.recover.attach import frozen
    from ctp.recover.state import load_prompt

    facts = adapter_facts(folder)
    if facts.kind == "prompt":
        prompt = load_prompt(folder)
        if tuple(prompt.shape) != (facts.k, facts.width):
            raise ValueError(f"{ADAPTER} holds a prompt {tuple(prompt.shape)}; {CONFIG} says {facts.k} x {facts.width}")
        yield prompt
        return
    with frozen(model), _lora(model, Path(folder)):
        yield None


def attach_adapter(model: "PreTrainedModel", folder: str | Path) -> Any:
    """The model with the adapter for good: itself with a soft prompt attached, or a PeftModel around it with LoRA.

    Raises ValueError as `applied` does.
    """
    from peft import PeftModel

    from ctp.recover.prompted import attach_prompt

    with applied(model, folder) as prompt:
        pass  # it fits
    if prompt is not None:
        attach_prompt(model, prompt)
        return model
    return PeftModel.from_pretrained(model, str(folder), torch_device=str(model.device))


@contextmanager
def _lora(model: "PreTrainedModel", folder: Path) -> Iterator[None]:
    from peft import PeftModel, get_peft_model_state_dict

    stored = _tensors(folder)
    if other := sorted(name for name in stored if "lora_" not in name):  # PEFT would write it into the model's own
        raise ValueError(f"{ADAPTER} in {folder} holds {other[0]}, allowed: LoRA's tensors only")
    with restored(model):
        try:
            injected = PeftModel.from_pretrained(model, str(folder), torch_device=str(model.device))
        except (ValueError, RuntimeError) as e:  # no such layer, or a layer of another size
            raise ValueError(f"the LoRA in {folder} does not fit the model: {' '.join(str(e).split())}") from e
        # PEFT itself passes over tensors without a layer, and layers without a tensor: half an adapter, silently.
        odd = sorted(stored.keys() ^ get_peft_model_state_dict(injected, save_embedding_layers=False).keys())
        if odd:
            raise ValueError(f"the LoRA in {folder} does not fit the model: {odd[0]} and {len(odd) - 1} more tensors "
                             "are only in one of them")  # fmt: skip
        yield


@contextmanager
def restored(model: "PreTrainedModel") -> Iterator[None]:
    """Every module gets back its children and loses new attributes: more than PEFT's unload, and on failure too."""
    before = [(module, dict(module._modules), set(vars(module))) for module in model.modules()]
    try:
        yield
    finally:
        for module, children, names in before:
            module._modules.clear()
            module._modules.update(children)
            for name in set(vars(module)) - names:
                delattr(module, name)


def _tensors(folder: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what the adapter holds, without reading it."""
    from safetensors import safe_open

    with safe_open(folder / ADAPTER, framework="pt") as f:
        names = f.keys()
        return {name: tuple(f.get_slice(name).get_shape()) for name in names}


def _check_files(folder: Path) -> None:
    """Raise ValueError, in one sentence, unless `folder` holds the two files of an adapter."""
    lacking = [name for name in FILES if not (folder / name).is_file()]
    if lacking:
        pickled = "; ctp loads no pickled weights" if (folder / "adapter_model.bin").exists() else ""
        raise ValueError(f"{str(folder)!r} is no PEFT adapter: it has no {lacking[0]}{pickled}")


def _revision(folder: Path) -> str:
    return "sha256:" + digest([folder / name for name in FILES])
