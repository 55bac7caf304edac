"""Is every artifact of a store whole, and what its key says? `python -m ctp.store verify` is made of this."""

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ctp.cells.cell import KINDS, own_key
from ctp.storage.catalog import Artifact
from ctp.storage.folders import DAY
from ctp.storage.manifest import MANIFEST, PAYLOAD, Damaged, Manifest, verify
from ctp.storage.ref import DIGITS
from ctp.storage.store import Store

AGED = "python -m ctp.store gc, which removes it when it is a day old"
ELSEWHERE = "nobody reads it: move it elsewhere"


@dataclass(frozen=True)
class Finding:
    """Something that is wrong, in one line, and what to do about it. path: relative to the store's root."""

    path: str
    problem: str
    remedy: str


def check(store: Store, found: Sequence[Artifact], chosen: Iterable[Artifact]) -> Iterator[Finding]:
    """What is wrong with the chosen artifacts of all that were found: bytes, keys, inputs, files that nothing names."""
    known = {(a.kind, a.digits) for a in found if a.manifest}
    specs = {a.key: a.manifest["spec"] for a in found if a.manifest}
    needed = {i[:DIGITS] for a in found for i in a.manifest.get("inputs", ())}
    for a in chosen:
        if not a.ours:
            yield Finding(a.path, "no manifest names this", ELSEWHERE)
        elif not a.manifest and not a.damage:
            if store.folders.local or a.quiet > DAY:  # in an object store it may be coming just now
                yield Finding(a.path, "files without a manifest: cut off before it was done", AGED)
        elif problem := a.damage or _damage(store, a) or _identity(a, specs):
            remove = f"python -m ctp.store rm {'--force ' * (a.digits in needed)}{a.digits}"
            yield Finding(a.path, problem, f"{remove}; the next run computes it again")
        else:
            yield from _relations(a, known)


def _damage(store: Store, artifact: Artifact) -> str:
    """What is wrong with the bytes; empty where nothing is."""
    folders, manifest = store.folders, artifact.manifest
    source = f"{folders.root}/{artifact.path}"
    try:
        if folders.local:
            verify(Path(source, manifest.get("payload", "")), manifest["files"])
        else:
            with folders.workspace() as work:
                folders.download(source, manifest, work)
                verify(work, manifest["files"])
    except Damaged as e:
        return str(e)
    except OSError as e:  # of a disk; an object store's errors are no finding, they end the check
        return f"it cannot be read ({e})"
    return ""


def _identity(artifact: Artifact, specs: dict[str, Any]) -> str:
    """What its key, its inputs or its folder contradict; empty where nothing does."""
    manifest = artifact.manifest
    try:
        made = own_key(manifest)
        inputs = {key: manifest["spec"][n] for n, key in _inputs(manifest)}
    except (KeyError, TypeError, ValueError, IndexError) as e:
        return f"{MANIFEST} does not say what it was made from ({type(e).__name__}: {e})"
    if made != artifact.key:
        return f"its key is {artifact.key[:DIGITS]}, but its spec makes {made[:DIGITS]}"
    if artifact.key[:DIGITS] != artifact.digits:
        return f"its key is {artifact.key[:DIGITS]}, but its folder is another's"
    if manifest["kind"] != artifact.kind:
        return f"it is of kind {manifest['kind']}"
    other = next((key for key, spec in inputs.items() if specs.get(key, spec) != spec), None)
    return f"it says of its input {other[:DIGITS]} what that is not" if other else ""


def _inputs(manifest: Manifest) -> Iterator[tuple[str, str]]:
    """(field, key) of each input. Raises ValueError where there are more or fewer keys than fields."""
    return zip(
        (n for n in KINDS[manifest["kind"]].INPUTS if manifest["spec"][n] is not None), manifest["inputs"], strict=True
    )


def _relations(artifact: Artifact, known: set[tuple[str, str]]) -> Iterator[Finding]:
    """Inputs that are not there, and files that the manifest does not name."""
    for name, key in _inputs(artifact.manifest):
        if ("learn" if name == "recovery" else "compress", key[:DIGITS]) not in known:
            yield Finding(artifact.path, f"its {name} {key[:DIGITS]} is missing or damaged",
                          "it stands by itself; a run that needs its input makes that again")  # fmt: skip
    payload = artifact.manifest.get("payload", "")
    named = {MANIFEST, *(f"{payload}{n}" for n in artifact.manifest["files"])}
    for name, file in artifact.files.items():
        late = PAYLOAD.match(name) and not (payload and name.startswith(payload))  # of a driver that was not first
        if name not in named and not (late and time.time() - file.time < DAY):
            remedy = AGED if late else ELSEWHERE
            yield Finding(f"{artifact.path}/{name}", "no manifest names this file", remedy)
