"""Artifacts on any fsspec URI: one folder per cell, and `manifest.json` written last means done.

    {root}/{kind}/{slug}-{key[:12]}/   payload files and manifest.json
    {root}/partial/, {root}/failed/    of cells that are not done: see ctp.unfinished
    {root}/damaged/{kind}/             artifacts whose bytes are not those that were put there

Nothing that is done is overwritten, and nothing is read whose bytes are not those the manifest names: such an artifact
is moved to damaged/, and its cell is computed again.
"""

import hashlib
import json
import os
import shutil
import sys
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ctp.cache import cache_dir, fill
from ctp.folders import DAY, TEMPORARY
from ctp.labels import slug
from ctp.manifest import MANIFEST, Damaged, content, files_of, parse, verify
from ctp.remote import StoreError
from ctp.spec import KINDS, Cell, Learn, key
from ctp.unfinished import Unfinished, folder_name, identity

__all__ = ["DEFAULT_STORE", "MANIFEST", "Damaged", "Draft", "Store", "StoreError", "default_store"]

DEFAULT_STORE = "results/store"


def default_store() -> str:
    """CTP_STORE, else results/store."""
    return os.environ.get("CTP_STORE") or DEFAULT_STORE


@dataclass
class Draft:
    """An artifact in the making: fill `path` with files and `record` with what the manifest shall say."""

    path: Path
    record: dict[str, Any] = field(default_factory=dict)


class Store(Unfinished):
    """Artifacts under one root, for example `results/store` or `s3://bucket/study`.

    damaged: a line for each artifact that was found damaged through this object. Raises StoreError on a bad URI.
    """

    def __init__(self, uri: str) -> None:
        super().__init__(uri)
        self.damaged: list[str] = []
        self._verified: dict[str, Path] = {}

    def check_writable(self) -> None:
        """Write and remove a small file. Raises StoreError where that fails."""
        probe = f"{self.root}/.probe-{uuid.uuid4().hex}"
        try:
            with self.room():
                self.fs.makedirs(self.root, exist_ok=True)
                self.fs.pipe_file(probe, b"ctp")
                self.fs.rm_file(probe)
                self._sweep()
        except StoreError:
            raise
        except Exception as e:  # whatever the object store's client raises
            raise StoreError(f"store {self.uri!r} cannot be written: {type(e).__name__}: {e}") from e

    def _sweep(self) -> None:
        """What killed workers left unfinished goes when it gave no sign of life for a day."""
        for path in Path(self.root, TEMPORARY).glob("*") if self.local else ():
            with suppress(FileNotFoundError):  # another driver's worker is done with it
                if time.time() - path.stat().st_mtime > DAY:
                    shutil.rmtree(path, ignore_errors=True)

    # ------------------------------------------------------------- what is there

    def folder(self, cell: Cell) -> str:
        """Where the cell's artifact lies or will lie."""
        return f"{self.root}/{cell.kind}/{folder_name(cell)}"

    def has(self, cell: Cell) -> bool:
        """Is the cell done? What this machine made but could not send to an object store is sent now."""
        return self.exists(f"{self.folder(cell)}/{MANIFEST}") or self._send(cell)

    def done(self, cells: Iterable[Cell]) -> set[str]:
        """The keys of those cells that are done: one listing per kind, not one request per cell."""
        found = set().union(*(self.finished(kind) for kind in KINDS))
        return {key(c) for c in cells if folder_name(c) in found}

    def manifest(self, cell: Cell) -> dict[str, Any]:
        """The record of a finished cell. Raises StoreError where it is missing, Damaged where it cannot be believed."""
        return self._manifest(cell)[0]

    def _manifest(self, cell: Cell) -> tuple[dict[str, Any], bytes]:
        """The manifest, and its bytes as they were seen."""
        path = f"{self.folder(cell)}/{MANIFEST}"
        if (text := self.read(path)) is None:
            raise StoreError(f"{path} does not exist: {slug(cell)} is not done")
        try:
            manifest = parse(text, path)
            if manifest["key"] != key(cell):
                raise Damaged(f"{path} is of key {manifest['key']}, not {key(cell)}")
        except Damaged as e:
            raise self._give_up(cell, text, e) from e
        return manifest, text

    # --------------------------------------------------------- writing and reading

    @contextmanager
    def publish(self, cell: Cell) -> Iterator[Draft]:
        """Fill the draft; on a clean exit it becomes the cell's artifact, on an error nothing becomes visible.

        Raises StoreError where the store does not answer or a disk is full.
        """
        with self.room(), self.workspace() as work:
            draft = Draft(work)
            yield draft
            record = {**identity(cell), **draft.record}
            try:
                self.commit(work, self.folder(cell), record)
            except (StoreError, FileNotFoundError) as e:
                raise self._keep(cell, work, record, e) from e
        self._tidy(cell)

    def _tidy(self, cell: Cell) -> None:
        """The cell is done: what was kept of tries is of no use any more."""
        self.forget_failure(cell)
        if isinstance(cell, Learn):
            self.remove(self._partial(cell))

    def _kept(self, cell: Cell) -> Path:
        return cache_dir() / "unsent" / f"{key(cell)[:24]}-{hashlib.sha256(self.uri.encode()).hexdigest()[:12]}"

    def _keep(self, cell: Cell, work: Path, record: dict[str, Any], e: Exception) -> Exception:
        """Put what could not be sent into this machine's cache: it may have taken hours. Returns what to raise."""
        if self.local:
            return e

        def make(to: Path) -> None:
            shutil.copytree(work, to / "files")
            (to / "record.json").write_text(json.dumps({"record": record, "files": files_of(work)}))

        shutil.rmtree(self._kept(cell), ignore_errors=True)
        kept = fill(self._kept(cell), make)
        return StoreError(f"{e}; what was computed is kept in {kept} and sent when this machine tries the cell again")

    def _send(self, cell: Cell) -> bool:
        """Send what an earlier try kept here, if it is whole. Is the cell done now?"""
        kept = self._kept(cell)
        if self.local or not kept.is_dir():
            return False
        said = json.loads((kept / "record.json").read_text())
        try:
            verify(kept / "files", said["files"])
        except Damaged:
            return False
        self.commit(kept / "files", self.folder(cell), said["record"])
        shutil.rmtree(kept, ignore_errors=True)
        self._tidy(cell)
        return True

    def fetch(self, cell: Cell) -> Path:
        """A local folder with the cell's files, every hash verified (once per Store).

        Raises StoreError where the cell is not done or the store does not answer; Damaged where the files are not those
        that the manifest names: then the artifact has been moved to damaged/, and the cell is not done any more.
        """
        if key(cell) not in self._verified:
            manifest, text = self._manifest(cell)
            try:
                with self.room():
                    found = self._local_copy(cell, manifest)
            except Damaged as e:
                raise self._give_up(cell, text, Damaged(f"{self.folder(cell)}/{e}")) from e
            self._verified[key(cell)] = found
        return self._verified[key(cell)]

    def _local_copy(self, cell: Cell, manifest: dict[str, Any]) -> Path:
        files = manifest["files"]
        if self.local:
            path = Path(self.folder(cell), manifest.get("payload", ""))  # where it was copied from an object store
            verify(path, files)
            return path
        # Named by content too: another store may hold other bytes under this key.
        path = cache_dir() / "artifacts" / f"{key(cell)[:24]}-{content(files)[:24]}"
        for last in (False, False, True):  # a copy that was damaged here, then one that was damaged on its way
            fill(path, lambda to: self.download(self.folder(cell), manifest, to))
            try:
                verify(path, files)
                break
            except Damaged:
                shutil.rmtree(path, ignore_errors=True)
                if last:
                    raise
        return path

    def _give_up(self, cell: Cell, manifest: bytes | None, e: Damaged) -> Damaged:
        """Move a damaged artifact out of the way, where that can be done; returns what to raise."""
        try:
            to = self.set_aside(self.folder(cell), manifest, str(e))
        except (OSError, StoreError) as other:
            return Damaged(f"{e}; it could not be moved out of the way ({other}): remove {self.folder(cell)}")
        if not to:
            return Damaged(f"{e}; {slug(cell)} was computed anew or moved meanwhile: it is looked at again next time")
        said = f"{e}; moved to {to}: the next run that needs {slug(cell)} computes it again"
        self.damaged.append(said)
        return Damaged(said)


if __name__ == "__main__":
    from ctp.artifacts import main

    sys.exit(main())
