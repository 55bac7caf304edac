"""What lies in a store, and what of it does nobody need? `python -m ctp.store gc` and `rm` are made of this."""

import os
import re
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, NamedTuple

from ctp.cells.cell import KINDS
from ctp.storage.drivers import RUNNING, records
from ctp.storage.folders import DAMAGED, DAY, TEMPORARY
from ctp.storage.manifest import MANIFEST, Damaged, lacking, parse
from ctp.storage.partial import FAILED, PARTIAL
from ctp.storage.store import Store

KEY = re.compile("[0-9a-fA-F]{6,64}")  # what stands for an artifact: its key, or how that begins
_OURS = re.compile(r".+-[0-9a-f]{12}", re.DOTALL)
DIGITS = 12  # of its key, at the end of an artifact's folder name
READERS = 16


class File(NamedTuple):
    """Bytes, and when it was written, in seconds since 1970; a store that does not tell says now."""

    size: int
    time: float


@dataclass(frozen=True)
class Litter:
    """Something that nobody needs, and why. path: within the store."""

    path: str
    size: int
    why: str


@dataclass
class Artifact:
    """A folder of a kind. files: what lies in it. manifest: None where there is none that can be believed."""

    kind: str
    name: str
    files: dict[str, File] = field(default_factory=dict)
    manifest: dict[str, Any] | None = None
    damage: str = ""

    @property
    def path(self) -> str:
        return f"{self.kind}/{self.name}"

    @property
    def ours(self) -> bool:
        """Is it called as ctp calls its folders?"""
        return bool(_OURS.fullmatch(self.name)) and "" not in self.files

    @property
    def digits(self) -> str:
        """The first digits of its key, which its folder's name ends with."""
        return self.name.rpartition("-")[2]

    @property
    def done(self) -> bool:
        """Is it taken for its cell's result? See `ctp.storage.manifest.whole`."""
        if self.manifest is None or not self.manifest["key"].startswith(self.digits):
            return False
        return not lacking(self.manifest, lambda name: self.files[name].size if name in self.files else None)

    @property
    def size(self) -> int:
        return sum(f.size for f in self.files.values())

    @property
    def quiet(self) -> float:
        """Seconds since anything in it was written."""
        return time.time() - max((f.time for f in self.files.values()), default=0)


def files(store: Store, folder: str) -> dict[str, File]:
    """Every file under a folder of the store, by its path in there; a link is a file. Raises StoreError."""
    base = f"{store.root}/{folder}"
    if not store.local:
        return {p[len(base) + 1 :]: File(int(f.get("size") or 0), _time(f)) for p, f in store.find(base).items()}
    found = {}
    for at, folders, names in (step for top in _tops(base) for step in os.walk(top)):
        links = [n for n in folders if at != base and os.path.islink(f"{at}/{n}")]
        for name in (*names, *links):
            stat = os.lstat(f"{at}/{name}")
            found[f"{at}/{name}"[len(base) + 1 :]] = File(stat.st_size, stat.st_mtime)
    return found


def _tops(base: str) -> list[str]:
    """The folder, and those in it that lie elsewhere and are linked here: somebody had no room for them."""
    inside = os.scandir(base) if os.path.isdir(base) else ()
    return [base, *(e.path for e in inside if e.is_symlink() and e.is_dir())]


def _time(said: dict[str, Any]) -> float:
    for name in ("LastModified", "last_modified", "updated", "mtime", "created"):
        value = said.get(name)
        if isinstance(value, datetime):
            return value.timestamp()
        if isinstance(value, int | float):
            return float(value)
    return time.time()


def artifacts(store: Store, read: bool = True) -> list[Artifact]:
    """Every folder of a kind, by kind and name, with its manifest unless `read` is False. Raises StoreError."""
    found: dict[tuple[str, str], Artifact] = {}
    for kind in KINDS:
        for path, file in files(store, kind).items():
            name, _, inner = path.partition("/")
            found.setdefault((kind, name), Artifact(kind, name)).files[inner] = file
    out = [found[at] for at in sorted(found, key=lambda at: (list(KINDS).index(at[0]), at[1]))]
    if read:
        with ThreadPoolExecutor(1 if store.local else READERS) as pool:
            list(pool.map(lambda a: _read(store, a), (a for a in out if MANIFEST in a.files)))
    return out


def _read(store: Store, artifact: Artifact) -> None:
    path = f"{store.root}/{artifact.path}/{MANIFEST}"
    text = store.read(path)
    try:
        artifact.manifest = None if text is None else parse(text, MANIFEST)
    except Damaged as e:
        artifact.damage = str(e)


def select(found: Iterable[Artifact], texts: Sequence[str]) -> list[Artifact]:
    """The artifacts that these keys (6 digits or more), names with or without their key, or paths stand for.

    Raises ValueError where a text stands for none, or a key for several.
    """
    chosen: dict[str, Artifact] = {}
    everything = list(found)
    for text in texts:
        named = [a for a in everything if text in (a.path, a.name, a.name[: -DIGITS - 1])]
        by_key = KEY.fullmatch(text) and [a for a in everything if a.digits.startswith(text.lower()[:DIGITS])]
        hits = named or by_key or []
        if not hits:
            raise ValueError(f"no artifact with the key or name {text!r}: `python -m ctp.store ls` prints both")
        if not named and len(hits) > 1:
            raise ValueError(f"{len(hits)} artifacts with a key that begins with {text!r}: give more digits")
        chosen |= {a.path: a for a in hits}
    return list(chosen.values())


def litter(store: Store, planned: set[str] | None = None) -> list[Litter]:
    """What no run needs any more: what was cut off and gave no sign of life for a day, what dead drivers said of
    themselves, states and failures of cells that are done, what was damaged. planned: keys; then also every artifact,
    state and failure of no such cell.
    """
    found = artifacts(store)
    done = {a.name for a in found if a.done}
    out = [*_unfinished(store), *_dead(store)]
    for a in found:
        if not a.ours:
            continue  # somebody's, who must know
        if a.manifest is None and not a.damage:
            out += [Litter(a.path, a.size, "cut off before it was done")] * (a.quiet > DAY)
        elif planned is not None and not any(k.startswith(a.digits) for k in planned):
            out.append(Litter(a.path, a.size, "no cell of these grids"))
        elif a.manifest:
            out += _late(a)
    keep = {k[:DIGITS] for k in planned or ()}
    for name, (size, _) in _grouped(files(store, PARTIAL), 1).items():
        if name in done:
            out.append(Litter(f"{PARTIAL}/{name}", size, "a state of a cell that is done"))
        elif planned is not None and _OURS.fullmatch(name) and name[-DIGITS:] not in keep:
            out.append(Litter(f"{PARTIAL}/{name}", size, "a state of no cell of these grids"))
    for name, file in files(store, FAILED).items():
        cell = name.removesuffix(".json")
        if cell in done:
            out.append(Litter(f"{FAILED}/{name}", file.size, "a failure of a cell that is done"))
        elif planned is not None and _OURS.fullmatch(cell) and cell[-DIGITS:] not in keep:
            out.append(Litter(f"{FAILED}/{name}", file.size, "a failure of no cell of these grids"))
    for name, (size, _) in _grouped(files(store, DAMAGED), 2).items():
        out.append(Litter(f"{DAMAGED}/{name}", size, "damaged, and computed again where a run needed it"))
    return out


def _unfinished(store: Store) -> Iterator[Litter]:
    """What killed processes left in a local store's folder for what is being made."""
    inside = _grouped(files(store, TEMPORARY), 1) if store.local else {}
    base = f"{store.root}/{TEMPORARY}"
    for name in sorted(os.listdir(base)) if store.local and os.path.isdir(base) else ():
        size, last = inside.get(name, (0, 0.0))
        if time.time() - max(last, os.lstat(f"{base}/{name}").st_mtime) > DAY:
            yield Litter(f"{TEMPORARY}/{name}", size, "left by a process that was killed")


def _dead(store: Store) -> Iterator[Litter]:
    """What drivers that are no more said of themselves; of a file that cannot be read, its age tells."""
    left = {d.path.rpartition("/")[2] for d in records(store, None) if d.is_left}
    for name, file in files(store, RUNNING).items():
        if name in left or time.time() - file.time > DAY:
            yield Litter(f"{RUNNING}/{name}", file.size, "left by a driver that is no more")


def _late(artifact: Artifact) -> list[Litter]:
    """In an object store: the files of drivers that came too late, or died before their manifest."""
    assert artifact.manifest is not None
    own = artifact.manifest.get("payload", "").rstrip("/")
    groups = _grouped({n: f for n, f in artifact.files.items() if n.startswith("payload-")}, 1)
    return [Litter(f"{artifact.path}/{n}", size, "no manifest names it") for n, (size, last) in groups.items()
            if n != own and own and time.time() - last > DAY]  # fmt: skip


def _grouped(found: dict[str, File], depth: int) -> dict[str, tuple[int, float]]:
    """Bytes and time of the last write of each folder so deep."""
    out: dict[str, tuple[int, float]] = defaultdict(lambda: (0, 0.0))
    for path, file in found.items():
        name = "/".join(path.split("/")[:depth])
        out[name] = out[name][0] + file.size, max(out[name][1], file.time)
    return dict(out)


def dependants(found: Iterable[Artifact], removed: Iterable[Artifact]) -> list[Artifact]:
    """What was made from these, directly or not."""
    keys, out = {a.digits for a in removed}, []
    everything = list(found)  # inputs come before what was made from them: compress, learn, evaluate
    for a in everything:
        if a.manifest and a.digits not in keys and any(i[:DIGITS] in keys for i in a.manifest.get("inputs", ())):
            keys.add(a.digits)
            out.append(a)
    return out


def remove(store: Store, paths: Iterable[str]) -> None:
    """Remove these, given by their path within the store. Raises StoreError where that fails."""
    for path in paths:
        store.remove(f"{store.root}/{path}")
