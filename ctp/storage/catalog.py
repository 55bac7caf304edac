"""The artifacts of a store: listed with their manifests, and found by key or name."""

import re
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import cast

from ctp.cells.cell import KINDS, Cell, from_json, key
from ctp.common.redact import scrub
from ctp.storage.folders import File
from ctp.storage.manifest import MANIFEST, Damaged, Manifest, lacking, parse
from ctp.storage.ref import DIGITS, split
from ctp.storage.store import READERS, Store

KEY = re.compile("[0-9a-fA-F]{6,64}")  # what names an artifact: its key, or how that begins
OURS = re.compile(rf".+-[0-9a-f]{{{DIGITS}}}", re.DOTALL)


_NONE = cast(Manifest, {})


@dataclass
class Artifact:
    """A folder of a kind. files: what is in it; manifest: empty where there is no valid one; damage: why."""

    kind: str
    folder: str
    files: dict[str, File] = field(default_factory=dict)
    manifest: Manifest = field(default_factory=lambda: _NONE)
    damage: str = ""

    @property
    def path(self) -> str:
        """Relative to the store's root."""
        return f"{self.kind}/{self.folder}"

    @property
    def name(self) -> str:
        return split(self.folder)[0]

    @property
    def digits(self) -> str:
        """The first digits of its key."""
        return split(self.folder)[1]

    @property
    def key(self) -> str:
        """The whole key, which only the manifest has; empty without one."""
        return self.manifest.get("key", "")

    @property
    def ours(self) -> bool:
        """Is it named as ctp names its folders?"""
        return bool(OURS.fullmatch(self.folder)) and "" not in self.files

    @property
    def problem(self) -> str:
        """What its manifest and the sizes of its files show to be wrong; empty where that is nothing."""
        if not self.manifest:
            return self.damage
        if not self.key.startswith(self.digits):
            return f"{MANIFEST} is of key {self.key}"
        return lacking(self.manifest, lambda name: self.files[name].size if name in self.files else None)

    @property
    def done(self) -> bool:
        """Is it a cell's result? See `ctp.storage.manifest.whole`."""
        return bool(self.manifest) and not self.problem

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(f.size for f in self.files.values())

    @property
    def payload_size(self) -> int:
        """Bytes of the files that the manifest names."""
        return sum(f["size"] for f in self.manifest.get("files", {}).values())

    @property
    def quiet(self) -> float:
        """Seconds since anything in it was written."""
        return time.time() - max((f.time for f in self.files.values()), default=0)


def artifacts(store: Store, kinds: Iterable[str] = tuple(KINDS), read: bool = True) -> list[Artifact]:
    """Every folder of these kinds, by kind and name, with its manifest unless `read` is False. Raises StoreError."""
    out: list[Artifact] = []
    for kind in kinds:
        found: dict[str, Artifact] = {}
        for path, file in store.folders.files(kind).items():
            folder, _, inner = path.partition("/")
            found.setdefault(folder, Artifact(kind, folder)).files[inner] = file
        out += sorted(found.values(), key=lambda a: (a.name, a.digits))
    if read:
        with ThreadPoolExecutor(1 if store.folders.local else READERS) as pool:
            list(pool.map(lambda a: _read(store, a), (a for a in out if MANIFEST in a.files)))
    return out


def _read(store: Store, artifact: Artifact) -> None:
    text = store.folders.read(f"{store.folders.root}/{artifact.path}/{MANIFEST}")
    try:
        artifact.manifest = _NONE if text is None else parse(text, MANIFEST)
    except Damaged as e:
        artifact.damage = str(e)


def _complaint(store: Store, a: Artifact) -> str:
    return f"{store.folders.root}/{a.path}/{a.problem}: `python -m ctp.store verify` says what to do"


def entries(store: Store, kinds: Sequence[str] = tuple(KINDS), damaged: list[str] | None = None) -> list[Artifact]:
    """Every finished artifact, by kind and name. Raises StoreError where the store does not answer.

    damaged: a list for what is wrong with damaged ones; without it the first of them raises Damaged.
    """
    found = artifacts(store, kinds)
    for a in (a for a in found if a.problem):
        if damaged is None:
            raise Damaged(_complaint(store, a))
        damaged.append(_complaint(store, a))
    return [a for a in found if a.done]


def select(found: Sequence[Artifact], texts: Sequence[str]) -> list[Artifact]:
    """The artifacts that these keys (6 digits or more), names with or without their key, or paths stand for.

    Raises ValueError where a text stands for none, or a key for several.
    """
    chosen: dict[str, Artifact] = {}
    for text in texts:
        named = [a for a in found if text in (a.path, a.folder, a.name)]
        by_key = KEY.fullmatch(text) and [a for a in found if a.digits.startswith(text.lower()[:DIGITS])]
        hits = named or by_key or []
        if not hits:
            raise ValueError(f"no artifact with the key or name {text!r}: `python -m ctp.store ls` prints both")
        if not named and len(hits) > 1:
            raise ValueError(f"{len(hits)} artifacts with a key that begins with {text!r}: give more digits")
        chosen |= {a.path: a for a in hits}
    return list(chosen.values())


def find(store: Store, text: str) -> tuple[Cell, Manifest]:
    """The cell and manifest of the one artifact whose key begins with `text` (6 hex digits or more).

    Raises ValueError where there is none, several, or one of another version of ctp; Damaged where it is damaged.
    """
    if not KEY.fullmatch(text):
        raise ValueError(f"{text!r} is no key: 6 to 64 hex digits, as `python -m ctp.store ls` prints them")
    text = text.lower()
    found = [a for a in artifacts(store, read=False) if a.digits.startswith(text[:DIGITS]) and MANIFEST in a.files]
    for a in found:
        _read(store, a)
        if a.problem:
            raise Damaged(_complaint(store, a))
    manifests = [a.manifest for a in found if a.manifest and a.key.startswith(text)]
    if len(manifests) != 1:
        what = "no artifact" if not manifests else f"{len(manifests)} artifacts"
        raise ValueError(f"{what} in {scrub(store.uri)} with a key that begins with {text!r}")
    with suppress(ValueError, KeyError):
        cell = from_json(manifests[0])
        if key(cell) == manifests[0]["key"]:
            return cell, manifests[0]
    raise ValueError(f"{text} was made by another version of ctp, which meant something else by it, or by a "
                     "plugin's method, which only its grid knows")  # fmt: skip
