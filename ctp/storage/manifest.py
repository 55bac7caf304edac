"""The manifest of an artifact: what it must say to be believed, and whether the files are those that it names."""

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NotRequired, TypedDict

from ctp.cells.cell import KINDS, CellData, canonical
from ctp.common.files import sha256_file
from ctp.storage.remote import StoreError

MANIFEST = "manifest.json"
_KEY = re.compile("[0-9a-f]{64}")
PAYLOAD = re.compile("payload-[0-9a-f]{12}")  # in an object store, the folder of the files in an artifact


class FileEntry(TypedDict):
    """What a manifest holds of a file. size: bytes."""

    sha256: str
    size: int


class Identity(CellData):
    """What every manifest begins with: the cell, its key (hex), the VERSION of its kind and the keys of its inputs."""

    key: str
    version: int
    inputs: list[str]


class Record(TypedDict, total=False):
    """What a cell's work adds to its manifest; a method has its own of these.

    seconds: of the whole cell; train_seconds: of learning; created: since 1970; step: of a saved state. location: of a
    dense model. text, task, machine_detail: what a perplexity, a task or a timing depends on besides the model.
    """

    metrics: dict[str, float]
    seconds: float
    created: float
    device: str
    computed_in: str
    peak_memory_bytes: int
    git_commit: str | None
    versions: dict[str, str | None]
    python: str
    machine: str
    at_once: int
    location: str
    train_seconds: float
    experts_short_of_tokens: dict[str, int]
    text: dict[str, str | int]
    task: dict[str, Any]
    machine_detail: dict[str, Any]
    step: int


class Stored(Identity, Record):
    """What is stored of a cell besides its files."""


class Contents(TypedDict):
    """files: by name, in the folder `payload` (with a slash at its end) if there is one."""

    files: dict[str, FileEntry]
    payload: NotRequired[str]


class Manifest(Stored, Contents):
    """The manifest of an artifact."""


class Damaged(StoreError):
    """What is stored is not what was put there, or was never put there by ctp."""


def parse(text: bytes, path: str) -> Manifest:
    """The manifest that `path` holds. Raises Damaged where it is torn, or names files outside its own folder."""
    try:
        manifest: Manifest = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise Damaged(f"{path} is not JSON ({e})") from e
    wrong = _wrong(manifest)
    if wrong:
        raise Damaged(f"{path} is no manifest: {wrong}")
    return manifest


def whole(text: bytes, path: str, key: str, size: Callable[[str], int | None] | None) -> Manifest:
    """The manifest of an artifact that is done: it is valid, of this key, and its files have the sizes it names.

    This is what done means wherever it is asked; bytes are compared when an artifact is used. path: of the manifest.
    size: of a file in the manifest's folder by its name, None where there is none; itself None where the caller is
    going to read the files. Raises Damaged.
    """
    manifest = parse(text, path)
    if manifest["key"] != key:
        raise Damaged(f"{path} is of key {manifest['key']}, not {key}")
    if size and (lack := lacking(manifest, size)):
        raise Damaged(f"{path.removesuffix(MANIFEST)}{lack}")
    return manifest


def lacking(manifest: Contents, size: Callable[[str], int | None]) -> str:
    """What the sizes of its files show to be wrong with an artifact; empty where nothing is. size: as in `whole`."""
    for name, file in manifest["files"].items():
        found = size(f"{manifest.get('payload', '')}{name}")
        if found is None:
            return f"{name} is missing, though the manifest names it"
        if found != file["size"]:
            return f"{name} has {found} bytes, not the {file['size']} that its manifest says"
    return ""


def _wrong(manifest: object) -> str:
    """What keeps this from being a manifest; empty where nothing does."""
    if not isinstance(manifest, dict):
        return "it is not an object"
    key, payload, inputs = manifest.get("key"), manifest.get("payload", ""), manifest.get("inputs")
    files, metrics = manifest.get("files"), manifest.get("metrics", {})
    if not _is(_KEY, key):
        return f"key = {key!r}, not 64 hex digits"
    if manifest.get("kind") not in KINDS or not isinstance(manifest.get("spec"), dict):
        return f"kind = {manifest.get('kind')!r}, or it has no spec; kinds are {', '.join(KINDS)}"
    if payload != "" and not (_is(PAYLOAD, str(payload)[:-1]) and payload[-1] == "/"):
        return f"payload = {payload!r}, not a folder that ctp makes"
    if not isinstance(inputs, list) or not all(_is(_KEY, i) for i in inputs):
        return f"inputs = {inputs!r}, not a list of keys"
    if not isinstance(metrics, dict):
        return f"metrics = {metrics!r}, not numbers by name"
    if not isinstance(files, dict):
        return "it names no files"
    for name, file in files.items():
        if not _inside(name) or name == MANIFEST:
            return f"{name!r} is not the name of a file in its folder"
        if not (isinstance(file, dict) and isinstance(file.get("size"), int) and isinstance(file.get("sha256"), str)):
            return f"it does not say size and sha256 of {name!r}"
    return ""


def _is(pattern: re.Pattern[str], value: object) -> bool:
    return isinstance(value, str) and bool(pattern.fullmatch(value))


def _inside(name: str) -> bool:
    """Is a file of that name in the folder, whatever the folder? No absolute paths, no way up, nothing odd."""
    parts = PurePosixPath(name).parts
    return bool(parts) and str(PurePosixPath(name)) == name and not {"/", "..", "."} & set(parts) and "\0" not in name


def files_of(folder: Path) -> dict[str, FileEntry]:
    """What a manifest holds of the files in a folder: name -> sha256 and size.

    Raises ValueError where there is a link, something that is no file, or a name that no artifact can hold.
    """
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            raise ValueError(f"{name!r} is a link: an artifact holds files of its own")
        if not path.is_file() and not path.is_dir():
            raise ValueError(f"{name!r} is neither a file nor a folder: an artifact holds files")
        if name == MANIFEST:
            raise ValueError(f"{name!r} is the name of ctp's own file in an artifact: give yours another one")
        if name.encode(errors="replace").decode() != name:
            raise ValueError(f"the file name {name!r} is not UTF-8")
        if path.is_file():
            found[name] = FileEntry(sha256=sha256_file(path), size=path.stat().st_size)
    return found


def verify(folder: Path, files: Mapping[str, FileEntry]) -> None:
    """Raises Damaged where a file fails its checksum, is missing, or is a link that leaves the folder.

    An error of reading (a disk, a permission) is raised as it is: it says nothing of what was written. Messages begin
    with the file's name in the folder.
    """
    home = folder.resolve()
    for name, file in files.items():
        path = folder / name
        if not path.resolve().is_relative_to(home):
            raise Damaged(f"{name} is a link that leaves its folder")
        if lack := lacking(
            {"files": {name: file}}, lambda n: p.stat().st_size if (p := folder / n).is_file() else None
        ):
            raise Damaged(lack)
        if sha256_file(path) != file["sha256"]:
            raise Damaged(f"{name} is not the file that its manifest names: its bytes have changed")


def content(files: Mapping[str, FileEntry]) -> str:
    """One digest (hex) of all files that a manifest names."""
    return hashlib.sha256(canonical(dict(files)).encode()).hexdigest()
