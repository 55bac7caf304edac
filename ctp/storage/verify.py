"""Is every artifact of a store whole, and what its key says? `python -m ctp.store verify` is made of this."""

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ctp.cells.cell import KINDS, own_key
from ctp.storage.catalog import Artifact
from ctp.storage.folders import DAY
from ctp.storage.manifest import MANIFEST, PAYLOAD, Damaged, verify
from ctp.storage.ref import DIGITS
from ctp.storage.remote import room
from ctp.storage.store import Store

AGED = "python -m ctp.store gc, which removes it when it is a day old"


@dataclass(frozen=True)
class Finding:
    """Something that is wrong, in one line, and what to do about it. path: within the store."""

    path: str
    problem: str
    remedy: str


def check(store: Store, found: Sequence[Artifact], chosen: Iterable[Artifact]) -> Iterator[Finding]:
    """What is wrong with the chosen artifacts of all that were found: bytes, keys, inputs, files nobody names."""
    known = {(a.kind, a.digits) for a in found if a.manifest}
    specs = {a.manifest["key"]: a.manifest["spec"] for a in found if a.manifest}
    needed = {i[:DIGITS] for a in found for i in a.manifest.get("inputs", ())}
    for artifact in chosen:
        remove = f"python -m ctp.store rm {'--force ' * (artifact.digits in needed)}{artifact.digits}"
        if not artifact.ours:
            yield Finding(artifact.path, "no manifest names this", "nobody reads it: move it elsewhere")
            continue
        if not artifact.manifest and not artifact.damage:
            if store.folders.local or artifact.quiet > DAY:  # in an object store it may be coming just now
                yield Finding(artifact.path, "files without a manifest: cut off before it was done", AGED)
            continue
        problem = artifact.damage or _damage(store, artifact) or _identity(artifact, specs)
        if problem:
            yield Finding(artifact.path, problem, f"{remove}; the next run computes it again")
            continue
        yield from _relations(artifact, known)


def _damage(store: Store, artifact: Artifact) -> str:
    """What is wrong with the bytes; empty where nothing is. Of an object store one file at a time is brought here."""
    source = f"{store.folders.root}/{artifact.path}"
    try:
        for name, said in artifact.manifest["files"].items():
            with room(store.uri), store.folders.inspected(source, artifact.manifest, name) as folder:
                verify(folder, {name: said})
    except Damaged as e:
        return str(e)
    except OSError as e:  # of a disk; an object store's errors are no finding, they end the check
        return f"it cannot be read ({e})"
    return ""


def _identity(artifact: Artifact, specs: dict[str, Any]) -> str:
    """Is it what its key says?"""
    manifest = artifact.manifest
    try:
        made = own_key(manifest)
        own = {key: manifest["spec"][n] for key, n in zip(manifest["inputs"], _inputs(manifest), strict=True)}
    except (KeyError, TypeError, ValueError, IndexError) as e:
        return f"{MANIFEST} does not say what it was made from ({type(e).__name__}: {e})"
    if made != manifest["key"]:
        return f"its key is {manifest['key'][:DIGITS]}, but its spec makes {made[:DIGITS]}"
    if not manifest["key"].startswith(artifact.digits) or len(artifact.digits) != DIGITS:
        return f"its key is {manifest['key'][:DIGITS]}, but its folder is another's"
    if manifest["kind"] != artifact.kind:
        return f"it is of kind {manifest['kind']}"
    other = next((key for key, spec in own.items() if specs.get(key, spec) != spec), None)
    return f"it says of its input {other[:DIGITS]} what that is not" if other else ""


def _inputs(manifest: dict[str, Any]) -> list[str]:
    return [n for n in KINDS[manifest["kind"]].INPUTS if manifest["spec"][n] is not None]


def _relations(artifact: Artifact, known: set[tuple[str, str]]) -> Iterator[Finding]:
    """Inputs that are not there, and files that the manifest does not name."""
    manifest = artifact.manifest
    for key, name in zip(manifest["inputs"], _inputs(manifest), strict=True):
        kind = "learn" if name == "recovery" else "compress"
        if (kind, key[:DIGITS]) not in known:
            yield Finding(artifact.path, f"its {name} {key[:DIGITS]} is missing or damaged",
                          "it stands by itself; a run that needs its input makes that again")  # fmt: skip
    payload = manifest.get("payload", "")
    named = {MANIFEST, *(f"{payload}{n}" for n in manifest["files"])}
    for name, file in artifact.files.items():
        ours = PAYLOAD.match(name) and not (payload and name.startswith(payload))
        if name in named or (ours and time.time() - file.time < DAY):  # another driver's, which comes too late
            continue
        remedy = AGED if ours else "nobody reads it: move it elsewhere"
        yield Finding(f"{artifact.path}/{name}", "no manifest names this file", remedy)
