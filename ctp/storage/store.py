"""Artifacts on any fsspec URI: one folder per cell, and `manifest.json` written last means done.

    {root}/{kind}/{name}-{first digits of the key}/   payload files and manifest.json
    {root}/partial/, {root}/failed/                   of cells that are not done: see ctp.storage.partial
    {root}/damaged/{kind}/                            artifacts that fail their checksums

Nothing that is done is overwritten, and files that fail their checksum are never used: such an artifact is moved to
damaged/, and its cell is computed again.
"""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from ctp.cells.cell import KINDS
from ctp.common.files import cache_dir, fill
from ctp.storage.manifest import (
    MANIFEST,
    Contents,
    Damaged,
    Identity,
    Manifest,
    Record,
    Stored,
    content,
    lacking,
    verify,
    whole,
)
from ctp.storage.objects import Objects, open_folders
from ctp.storage.partial import Failures, States
from ctp.storage.ref import Ref
from ctp.storage.remote import StoreError, room

DEFAULT_STORE = "results/store"
READERS = 16  # manifests of an object store that are read at a time


def default_store() -> str:
    """CTP_STORE, else results/store."""
    return os.environ.get("CTP_STORE") or DEFAULT_STORE


@dataclass
class Draft:
    """An artifact in the making: fill `path` with files and `record` with what the manifest shall hold."""

    path: Path
    record: Record = field(default_factory=Record)


class Store:
    """Artifacts under one root, for example `results/store` or `s3://bucket/study`.

    folders: its files; states, failures: of cells that are not done; damaged: a line for each artifact that was found
    damaged through this object. Raises StoreError on a bad URI; every method where the store does not answer.
    """

    def __init__(self, uri: str) -> None:
        self.folders = open_folders(uri)
        self.uri = self.folders.uri
        self.states, self.failures = States(self.folders), Failures(self.folders)
        self.damaged: list[str] = []
        self._verified: dict[str, Path] = {}
        self._seen: dict[str, tuple[object, Contents]] = {}  # path of a manifest -> (its stamp, its files)

    def check_writable(self) -> None:
        """Write and remove a small file, and remove what killed workers left behind."""
        fs, probe = self.folders.fs, f"{self.folders.root}/.probe-{uuid.uuid4().hex}"
        try:
            with room(self.uri):
                fs.makedirs(self.folders.root, exist_ok=True)
                fs.pipe_file(probe, b"ctp")
                fs.rm_file(probe)
                for path in self.folders.left_over():
                    shutil.rmtree(path, ignore_errors=True)
        except StoreError:
            raise
        except Exception as e:  # whatever the object store's client raises
            raise StoreError(f"store {self.uri!r} cannot be written: {type(e).__name__}: {e}") from e

    def folder(self, ref: Ref) -> str:
        """The folder of an artifact, whether it is there or not."""
        return f"{self.folders.root}/{ref.path}"

    # ------------------------------------------------------------- what is there

    def has(self, ref: Ref) -> bool:
        """Is it done? What this machine made but could not send to an object store is sent now."""
        return self._problem(ref) == "" or self._send(ref)

    def done(self, refs: Iterable[Ref]) -> set[str]:
        """The keys of those that are done: see `look`."""
        return self.look(refs)[0]

    def look(self, refs: Iterable[Ref]) -> tuple[set[str], dict[str, str]]:
        """(keys of what is done, key -> what is wrong with a damaged artifact).

        Each manifest is read once per Store; an object store is asked for one listing of each kind.
        """
        refs = list(refs)
        if self.folders.local:
            problems = {r.key: self._problem(r) for r in refs}
        else:
            listed = {f"{kind}/{p}": f.size for kind in KINDS for p, f in self.folders.files(kind).items()}
            there = [r for r in refs if f"{r.path}/{MANIFEST}" in listed]
            with ThreadPoolExecutor(READERS) as pool:
                found = pool.map(lambda r: self._problem(r, lambda name: listed.get(f"{r.path}/{name}")), there)
            problems = {r.key: problem for r, problem in zip(there, found, strict=True)}
        return {k for k, p in problems.items() if p == ""}, {k: p for k, p in problems.items() if p}

    def repair(self, refs: Iterable[Ref]) -> set[str]:
        """Move damaged artifacts out of the way; returns their keys."""
        known = {r.key: r for r in refs}
        damaged = self.look(known.values())[1]
        for k, why in damaged.items():
            self._give_up(known[k], self.folders.read(f"{self.folder(known[k])}/{MANIFEST}"), Damaged(why))
        return set(damaged)

    def _problem(self, ref: Ref, size: Callable[[str], int | None] | None = None) -> str | None:
        """What is wrong with an artifact: empty where it is done, None where it is not there.

        size: of its files by their names, where they are known already.
        """
        path = f"{self.folder(ref)}/{MANIFEST}"
        stamp = self.folders.stamp(path) if size is None else size(MANIFEST)
        if stamp is None:
            return None
        size = size or self._sizes(ref)
        if (seen := self._seen.get(path)) and seen[0] == stamp:
            lack = lacking(seen[1], size)
            return lack and f"{self.folder(ref)}/{lack}"
        if (text := self.folders.read(path)) is None:
            return None
        try:
            manifest = whole(text, path, ref.key, size)
        except Damaged as e:
            return str(e)
        self._seen[path] = stamp, Contents(files=manifest["files"], payload=manifest.get("payload", ""))
        return ""

    def _sizes(self, ref: Ref) -> Callable[[str], int | None]:
        return lambda name: self.folders.size(f"{self.folder(ref)}/{name}")

    def manifest(self, ref: Ref) -> Manifest:
        """The manifest of what is done. Raises StoreError where it is missing, Damaged where it is not valid."""
        return self._manifest(ref)[0]

    def _manifest(self, ref: Ref) -> tuple[Manifest, bytes]:
        """The manifest, and its bytes as they were read."""
        path = f"{self.folder(ref)}/{MANIFEST}"
        if (text := self.folders.read(path)) is None:
            raise StoreError(f"{path} does not exist: {ref.name} is not done")
        try:  # of an object store one request for each file: who needs them finds out
            manifest = whole(text, path, ref.key, self._sizes(ref) if self.folders.local else None)
        except Damaged as e:
            raise self._give_up(ref, text, e) from e
        return manifest, text

    # ------------------------------------------------------------------- writing

    @contextmanager
    def publish(self, ref: Ref, identity: Identity) -> Iterator[Draft]:
        """Fill the draft; on a clean exit it becomes the artifact, on an error nothing becomes visible.

        identity: what the manifest holds besides the draft's record; see ctp.storage.ref. A full disk is a StoreError.
        """
        with self.folders.workspace() as work:
            draft = Draft(work)
            yield draft
            record: Stored = {**draft.record, **identity}
            try:
                manifest = self.folders.commit(work, self.folder(ref), record)
            except (StoreError, FileNotFoundError) as e:
                if self.folders.local:
                    raise
                raise self._keep(ref, work, record, e) from e
        if not self.folders.local:  # where a listing has another size for it, another driver was first
            self._seen[f"{self.folder(ref)}/{MANIFEST}"] = len(manifest), json.loads(manifest)
        self._forget_tries(ref)

    def _forget_tries(self, ref: Ref) -> None:
        """It is done: remove the states and the failure of earlier tries."""
        self.failures.forget(ref)
        if ref.kind == "learn":  # the others save no states, and an object store would be asked for nothing
            self.folders.remove(self.states.folder(ref))

    # A result that took hours must not be lost because an object store is away at the end of its cell.

    @cached_property
    def _unsent(self) -> "Store":
        """A local store in this machine's cache, for what could not be sent to this object store."""
        return Store(str(cache_dir() / "unsent" / hashlib.sha256(self.uri.encode()).hexdigest()[:12]))

    def _keep(self, ref: Ref, work: Path, record: Stored, e: Exception) -> StoreError:
        """Keep on this machine what could not be sent. Returns what to raise."""
        with self._unsent.publish(ref, record) as draft:
            shutil.copytree(work, draft.path, dirs_exist_ok=True)
        kept = self._unsent.folder(ref)
        return StoreError(f"{e}; what was computed is kept in {kept} and sent when this machine tries the cell again")

    def _send(self, ref: Ref) -> bool:
        """Send what an earlier try kept on this machine, if it is whole. Is the cell done now?"""
        if not isinstance(self.folders, Objects) or not self._unsent.has(ref):
            return False
        try:
            work, manifest = self._unsent.fetch(ref), self._unsent.manifest(ref)
        except Damaged:  # torn as this machine died: it is computed again
            return False
        self.folders.upload(work, self.folder(ref), manifest, manifest["files"])
        self._unsent.folders.remove(self._unsent.folder(ref))
        self._forget_tries(ref)
        return True

    # ------------------------------------------------------------------- reading

    def fetch(self, ref: Ref) -> Path:
        """A local folder with the artifact's files, every hash verified (once per Store).

        Raises StoreError where it is not done; Damaged where the files fail their checksums: then the artifact has been
        moved to damaged/, and the cell is not done any more.
        """
        if ref.key not in self._verified:
            manifest, text = self._manifest(ref)
            try:
                with room(self.uri):
                    self._verified[ref.key] = self._local_copy(ref, manifest)
            except Damaged as e:
                raise self._give_up(ref, text, Damaged(f"{self.folder(ref)}/{e}")) from e
        return self._verified[ref.key]

    def _local_copy(self, ref: Ref, manifest: Manifest) -> Path:
        files = manifest["files"]
        if self.folders.local:
            path = Path(self.folder(ref), manifest.get("payload", ""))  # where it was copied from an object store
            verify(path, files)
            return path
        # Named by content too: another store may hold other bytes under this key.
        path = cache_dir() / "artifacts" / f"{ref.key[:24]}-{content(files)[:24]}"
        for tries_left in (2, 1, 0):  # the copy may be damaged in the cache, and the next one on its way
            fill(path, lambda to: self.folders.download(self.folder(ref), manifest, to))
            try:
                verify(path, files)
                break
            except Damaged:
                shutil.rmtree(path, ignore_errors=True)
                if not tries_left:
                    raise
        return path

    def _give_up(self, ref: Ref, manifest: bytes | None, e: Damaged) -> Damaged:
        """Move a damaged artifact out of the way, where that can be done; returns what to raise."""
        folder = self.folder(ref)
        try:
            to = self.folders.set_aside(folder, manifest, str(e))
        except (OSError, StoreError) as other:
            return Damaged(f"{e}; it could not be moved out of the way ({other}): remove {folder}")
        if not to:
            return Damaged(f"{e}; {ref.name} was computed anew or moved meanwhile: it is looked at again next time")
        self.damaged.append(f"{e}; moved to {to}: the next run that needs {ref.name} computes it again")
        return Damaged(self.damaged[-1])
