"""PEFT adapters made elsewhere, as files: located, pinned, checked and copied. safetensors and JSON only.

`locate` pins one to an exact version, `fetch` gives its folder, `adapter_facts` says what it is.
"""

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ctp.common import hub
from ctp.common.files import check_same, digest, folder_named
from ctp.common.messages import shown
from ctp.models.files import shapes

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
        return folder.resolve().name, "sha256:" + digest(pinned_files(str(folder))), str(folder.resolve())
    if path.startswith(("/", ".", "~")):
        raise ValueError(f"there is no folder {shown(path)}")
    return path, hub.commit(path, revision, "adapter"), f"hub:{path}"


def fetch(location: str, revision: str) -> Path:
    """The folder with the adapter's files. Raises ValueError if it is not what was pinned, or not to be had."""
    if location.startswith("hub:"):
        folder = hub.fetch(location.removeprefix("hub:"), revision, FILES, "adapter")
    else:
        folder = Path(location)
        check_pinned(location, revision)
    _check_files(folder)
    return folder


def pinned_files(location: str) -> list[Path]:
    """The files whose hash is the revision of a location that `locate` gave; none of one on the hub."""
    return [] if location.startswith("hub:") else [Path(location) / name for name in FILES]


def check_pinned(location: str, revision: str) -> None:
    """Raises Changed, in one sentence, unless the files at a location have this revision."""
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
    """Copy an adapter's two files, and no other."""
    for name in FILES:
        shutil.copyfile(folder / name, to / name)


def parameters(folder: str | Path) -> int:
    """How many numbers the adapter has."""
    return sum(math.prod(shape) for shape in shapes(Path(folder) / ADAPTER).values())


def _check_files(folder: Path) -> None:
    """Raise ValueError, in one sentence, unless `folder` holds the two files of an adapter."""
    if missing := [name for name in FILES if not (folder / name).is_file()]:
        pickled = "; ctp loads no pickled weights" if (folder / "adapter_model.bin").exists() else ""
        raise ValueError(f"{str(folder)!r} is no PEFT adapter: it has no {missing[0]}{pickled}")
