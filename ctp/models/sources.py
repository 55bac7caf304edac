"""Models by name: a hub id, a folder, a GGUF file, one inside an installed package, or a tiny one.

`locate` pins a name to one exact version without loading it.
"""

import errno
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from ctp.common import hub
from ctp.common.files import check_same, digest, expanded, folder_named, there
from ctp.common.messages import shown
from ctp.models import gguf, tiny
from ctp.models.gguf import PACKAGED

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
    refused: Mapping[str, str]  # use (see `ctp.architectures.families`) -> why it is refused; empty for most models
    needs_bos: bool = False  # must every window begin with the beginning-of-text token?

    @classmethod
    def read(cls, fields: Mapping[str, Any]) -> "Facts | None":
        """From JSON; None where the fields are others, as in files of an older ctp."""
        same = fields.keys() == cls.__dataclass_fields__.keys()
        return cls(**{**fields, "in_features": tuple(fields["in_features"])}) if same else None


@lru_cache
def known_models() -> dict[str, tuple[str, Facts]]:
    """hub id, or `package:…` -> (revision, Facts) of the models that are planned with unseen."""
    out = {}
    for name, fields in json.loads(KNOWN.read_text()).items():
        commit = str(fields.pop("commit"))
        found = Facts.read(fields)
        assert found is not None, f"{KNOWN.name}: {name} has other fields than Facts"
        out[name] = (commit, found)
    return out


def locate(name: str, revision: str = "") -> tuple[str, str, str]:
    """(short name, revision, location) of a model. Raises ValueError, in one sentence, where there is none."""
    if name in PACKAGED or name.startswith("package:"):
        location = PACKAGED.get(name, name)
        return name.split("/")[-1], "sha256:" + digest([gguf.packaged(location)]), location
    if name in tiny.NAMES:
        return tiny.locate(name)
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
    if name.endswith(gguf.SUFFIX) and (file := expanded(name)) and there(file) and file.is_file():
        return file.stem, "sha256:" + digest([file]), f"{gguf.SCHEME}{file.resolve()}"
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
        return [gguf.packaged(location)]
    if location.startswith(gguf.SCHEME):
        return [Path(location.removeprefix(gguf.SCHEME))]
    if location.startswith(("hub:", tiny.SCHEME)):
        return []
    if files := _read_files(Path(location)):
        return files
    raise FileNotFoundError(errno.ENOENT, "it is empty", location)


def check_pinned(location: str, revision: str) -> None:
    """Raises Changed, in one sentence, where what is at a location is not, or no more, of this revision; "" is any."""
    if revision:
        check_same(f"the model {location}", revision, lambda: pinned_files(location))


def model_folder(location: str, revision: str, weights: bool = True) -> tuple[Path, bool]:
    """(folder for `from_pretrained`, whether its weights are safetensors); weights=False: they need not be there."""
    if location.startswith("hub:"):
        return hub.fetch_model(location.removeprefix("hub:"), revision, weights)
    if location.startswith("package:"):
        return gguf.folder(gguf.packaged(location), revision), True
    if location.startswith(gguf.SCHEME):
        return gguf.folder(Path(location.removeprefix(gguf.SCHEME)), revision), True
    if location.startswith(tiny.SCHEME):
        return tiny.folder(location, revision), True
    return Path(location), True
