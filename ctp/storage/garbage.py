"""What no run needs any more: `python -m ctp.store gc` and `rm` are made of this."""

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ctp.storage.catalog import OURS, Artifact, artifacts
from ctp.storage.drivers import RUNNING, records
from ctp.storage.folders import DAMAGED, DAY, TEMPORARY, File
from ctp.storage.manifest import PAYLOAD
from ctp.storage.partial import FAILED, PARTIAL
from ctp.storage.ref import DIGITS, split
from ctp.storage.store import Store


@dataclass(frozen=True)
class Litter:
    """Something that nobody needs, and why. path: relative to the store's root; size: bytes."""

    path: str
    size: int
    why: str


def litter(store: Store, planned: set[str] | None = None) -> list[Litter]:
    """What no run needs: what was cut off and is a day old, the records of dead drivers, states and failures of cells
    that are done, damaged artifacts.

    planned: keys; then also every artifact, state and failure of other cells. Raises StoreError.
    """
    keep = None if planned is None else {k[:DIGITS] for k in planned}

    def unplanned(folder: str) -> bool:
        return keep is not None and bool(OURS.fullmatch(folder)) and split(folder)[1] not in keep

    found = artifacts(store)
    out = [*_workspaces(store), *_records(store)]
    for a in (a for a in found if a.ours):
        if not a.manifest and not a.damage:
            out += [Litter(a.path, a.size, "cut off before it was done")] * (a.quiet > DAY)
        elif unplanned(a.folder):
            out.append(Litter(a.path, a.size, "no cell of these grids"))
        else:
            out += _payloads(a)
    done = {a.folder for a in found if a.done}
    for top, what in ((PARTIAL, "a state"), (FAILED, "a failure")):
        for name, (size, _) in _grouped(store.folders.files(top), 1).items():
            folder = name.removesuffix(".json")
            if folder in done:
                out.append(Litter(f"{top}/{name}", size, f"{what} of a cell that is done"))
            elif unplanned(folder):
                out.append(Litter(f"{top}/{name}", size, f"{what} of no cell of these grids"))
    damaged = _grouped(store.folders.files(DAMAGED), 2).items()
    why = "damaged, and computed again where a run needed it"
    return [*out, *(Litter(f"{DAMAGED}/{name}", size, why) for name, (size, _) in damaged)]


def _workspaces(store: Store) -> Iterator[Litter]:
    sizes = _grouped(store.folders.files(TEMPORARY), 1)
    for path in store.folders.left_over():
        size, _ = sizes.get(path.name, (0, 0.0))
        yield Litter(f"{TEMPORARY}/{path.name}", size, "left by a process that was killed")


def _records(store: Store) -> Iterator[Litter]:
    """The records of drivers that have ended; one that cannot be read goes when it is a day old."""
    left = {d.path.rpartition("/")[2] for d in records(store, None) if d.is_left}
    for name, file in store.folders.files(RUNNING).items():
        if name in left or time.time() - file.time > DAY:
            yield Litter(f"{RUNNING}/{name}", file.size, "left by a driver that is no more")


def _payloads(a: Artifact) -> Iterator[Litter]:
    """In an object store: the files of drivers that came too late, or died before their manifest."""
    named = a.manifest.get("payload", "").rstrip("/")
    for name, (size, last) in _grouped({n: f for n, f in a.files.items() if PAYLOAD.match(n)}, 1).items():
        if named and name != named and time.time() - last > DAY:
            yield Litter(f"{a.path}/{name}", size, "no manifest names it")


def _grouped(found: dict[str, File], depth: int) -> dict[str, tuple[int, float]]:
    """(bytes, time of the last write) of each folder at this depth."""
    out: dict[str, tuple[int, float]] = defaultdict(lambda: (0, 0.0))
    for path, file in found.items():
        name = "/".join(path.split("/")[:depth])
        out[name] = out[name][0] + file.size, max(out[name][1], file.time)
    return dict(out)


def dependants(found: Iterable[Artifact], removed: Iterable[Artifact]) -> list[Artifact]:
    """What was made from these, directly or not. found: inputs before what was made from them."""
    keys, out = {a.digits for a in removed}, []
    for a in found:
        if a.digits not in keys and any(i[:DIGITS] in keys for i in a.manifest.get("inputs", ())):
            keys.add(a.digits)
            out.append(a)
    return out
