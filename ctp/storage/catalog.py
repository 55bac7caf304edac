"""The artifacts of a store: all of them, or one by its key."""

from dataclasses import dataclass
from typing import Any

from ctp.cells.cell import KINDS, Cell, from_json, key
from ctp.common.redact import scrub
from ctp.storage.garbage import KEY
from ctp.storage.manifest import MANIFEST, Damaged, lacking, parse
from ctp.storage.remote import StoreError
from ctp.storage.store import Store


@dataclass(frozen=True)
class Entry:
    """One artifact: its key, its cell's kind, its readable name, its size in bytes and its manifest."""

    key: str
    kind: str
    name: str
    size: int
    manifest: dict[str, Any]


def entries(store: Store, kinds: tuple[str, ...] = tuple(KINDS), damaged: list[str] | None = None) -> list[Entry]:
    """Every finished artifact, by kind and name. Raises StoreError where a manifest cannot be read.

    damaged: a list for what is wrong with manifests that cannot be believed; without it they raise too.
    """
    out = []
    for path in sorted(path for kind in kinds for path in store.glob(kind, f"*/{MANIFEST}")):
        try:
            said = _read(store, path)
        except Damaged as e:
            if damaged is None:
                raise
            damaged.append(str(e))
            continue
        total = sum(f["size"] for f in said["files"].values())
        name = path.split("/")[-2].removesuffix(f"-{said['key'][:12]}")
        out.append(Entry(said["key"], said["kind"], name, total, said))
    return sorted(out, key=lambda e: (kinds.index(e.kind), e.name))


def _read(store: Store, path: str) -> dict[str, Any]:
    if (text := store.read(path)) is None:
        raise StoreError(f"{path} is gone: somebody removed it meanwhile")
    try:
        manifest = parse(text, path)
        folder = path.removesuffix(f"/{MANIFEST}")
        if store.local and (lack := lacking(manifest, lambda name: store.size(f"{folder}/{name}"))):
            raise Damaged(f"{folder}/{lack}")
        return manifest
    except Damaged as e:
        raise Damaged(f"{e}: `python -m ctp.store verify` says what to do") from e


def find(store: Store, text: str) -> tuple[Cell, dict[str, Any]]:
    """The cell and manifest of the one artifact whose key begins with `text` (6 hex digits or more).

    Raises ValueError where there is none, several, or one of another version of ctp.
    """
    if not KEY.fullmatch(text):
        raise ValueError(f"{text!r} is no key: 6 to 64 hex digits, as `python -m ctp.store ls` prints them")
    text = text.lower()
    found = [p for kind in KINDS for p in store.glob(kind, f"*-{text[:12]}*/{MANIFEST}")]
    manifests = [m for m in (_read(store, p) for p in found) if m["key"].startswith(text)]
    if len(manifests) != 1:
        what = "no artifact" if not manifests else f"{len(manifests)} artifacts"
        raise ValueError(f"{what} in {scrub(store.uri)} with a key that begins with {text!r}")
    (manifest,) = manifests
    try:
        cell = from_json(manifest)
        same = key(cell) == manifest["key"]
    except (ValueError, KeyError):
        same = False
    if not same:
        raise ValueError(f"{text} was made by another version of ctp, which meant something else by it, or by a "
                         "plugin's method, which only its grid knows")  # fmt: skip
    return cell, manifest
