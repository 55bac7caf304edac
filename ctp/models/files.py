"""Checks of a model's folder before anything of it is loaded: JSON and the headers of safetensors files, no weights."""

import json
import warnings
from pathlib import Path
from typing import Any

from ctp.common.messages import shown

INDEX, WHOLE = "model.safetensors.index.json", "model.safetensors"
# Fields of config.json: the number of decoder blocks, and of positions.
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")
POSITIONS = ("max_position_embeddings", "n_positions")
MOST_LAYERS = 1000
MOST_HEADER = 100_000_000  # bytes, the format's own limit


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises ValueError naming the file where it holds none."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise ValueError(f"{path} is no JSON: {str(e) or type(e).__name__}") from e
    if not isinstance(found, dict):
        raise ValueError(f"{path} is no JSON object but a {type(found).__name__}")
    return found


def check_config(folder: Path) -> None:
    """Raise ValueError for a config.json that no model can be built from in a reasonable time."""
    config = read_object(folder / "config.json")
    for name in LAYERS:
        n = config.get(name, 1)
        if isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= MOST_LAYERS:
            raise ValueError(f"config.json: {name} = {shown(n)}: should be a whole number from 1 to {MOST_LAYERS:,}")
    for name in POSITIONS:
        if isinstance(config.get(name), int) and config[name] < 1:
            raise ValueError(f"config.json: {name} = {config[name]}: should be above 0")


def needs_code(folder: Path) -> str:
    """Why a folder that brings code of its own is not for ctp; "" where it brings none."""
    for file in (folder / "config.json", folder / "tokenizer_config.json"):
        if file.is_file() and '"auto_map"' in file.read_text("utf-8", "replace"):
            return f"it needs Python code that comes with it (auto_map in {file.name}), and such code is never run"
    return ""


def weight_files(folder: Path, named: bool = True) -> list[Path]:
    """The safetensors files that the folder's model is loaded from, as transformers chooses: `model.safetensors` alone
    where it is there, else those that an index names.

    named: False for files of other names too, as quantizing tools give them: those of the one other index, or all.
    Warns of weights that are passed over. Raises ValueError where there are none, or one is missing or elsewhere.
    """
    indices = sorted(f.name for f in folder.glob("*.safetensors.index.json"))
    if (folder / WHOLE).is_file():
        if unread := sorted({file for index in indices for file in _index(folder, index).values()} - {WHOLE}):
            warnings.warn(
                f"{folder}: {WHOLE} is read, as transformers does, and not {unread[0]}, which an index names: "
                "remove what is not the model",
                stacklevel=1,
            )
        return [folder / WHOLE]
    if INDEX in indices or (not named and len(indices) == 1):
        return _indexed(folder, INDEX if INDEX in indices else indices[0])
    loose = sorted(f for f in folder.glob("*.safetensors") if f.name != "adapter_model.safetensors")
    if not named and loose and not indices:
        return loose
    pickled = "; ctp loads no pickled weights" if any(folder.glob("*.bin")) or any(folder.glob("*.pt")) else ""
    several = f"; there are several indices: {', '.join(indices)}" if len(indices) > 1 else ""
    raise ValueError(f"{folder} holds neither {WHOLE} nor {INDEX}{pickled}{several}")


def _index(folder: Path, index: str) -> dict[str, str]:
    """Name of tensor -> name of file, as an index says."""
    mapped = read_object(folder / index).get("weight_map")
    if not isinstance(mapped, dict) or not mapped:
        raise ValueError(f"{index}: weight_map = {shown(mapped)}: should map tensors to files")
    for name in mapped.values():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"{index} names {shown(name)}: should be a .safetensors file of {folder}")
    return mapped


def _indexed(folder: Path, index: str) -> list[Path]:
    """The files that an index names. Raises ValueError unless all are there and hold what the index says, no more."""
    mapped = _index(folder, index)
    files = [folder / name for name in sorted(set(mapped.values()))]
    if missing := [file.name for file in files if not file.is_file()]:
        raise ValueError(f"{folder} lacks {missing[0]}, which {index} names")
    for file in files:
        for name in shapes(file):
            if mapped.get(name) != file.name:
                place = f"is in {mapped[name]}" if name in mapped else "is nowhere"
                raise ValueError(
                    f"{file} holds {name}, which {place} as {index} says: one of the two is of another model"
                )
    return files


def check_files(folder: Path, named: bool = True) -> None:
    """Raise ValueError unless the folder's weight files (see `weight_files`) are there and none is cut off."""
    for file in weight_files(folder, named):
        shapes(file)


def shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor in a safetensors file. Raises ValueError where it is not whole."""
    size = file.stat().st_size
    with file.open("rb") as f:
        length = int.from_bytes(f.read(8), "little")
        if size < 8 or length > min(size - 8, MOST_HEADER):
            raise ValueError(f"{file} is no safetensors file, or a part of one: {size:,} bytes")
        try:
            header = json.loads(f.read(length))
            header.pop("__metadata__", None)
            found = {str(n): tuple(int(x) for x in t["shape"]) for n, t in header.items()}
            end = max((int(t["data_offsets"][1]) for t in header.values()), default=0)
        except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError) as e:
            raise ValueError(f"{file} is no safetensors file: its header cannot be read") from e
    if size != 8 + length + end:
        raise ValueError(f"{file} is damaged: {size:,} bytes, and its header tells of {8 + length + end:,}")
    return found
