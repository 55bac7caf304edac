"""Artifacts on any fsspec URI: one folder per cell, and `manifest.json` written last means done.

    {root}/{kind}/{slug}-{key[:12]}/   payload files and manifest.json
    {root}/partial/, {root}/failed/    of cells that are not done: see ctp.storage.partial
    {root}/damaged/{kind}/             artifacts whose bytes are not those that were put there

Nothing that is done is overwritten, and nothing is read whose bytes are not those the manifest names: such an artifact
is moved to damaged/, and its cell is computed again.
"""

import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ctp.cells.cell import KINDS, Cell, Learn, key
from ctp.cells.labels import slug
from ctp.common.files import cache_dir, fill
from ctp.storage.folders import DAY, TEMPORARY
from ctp.storage.manifest import MANIFEST, Damaged, content, files_of, lacking, verify, whole
from ctp.storage.partial import Unfinished, folder_name, identity
from ctp.storage.remote import StoreError

__all__ = ["DEFAULT_STORE", "MANIFEST", "Damaged", "Draft", "Store", "StoreError", "default_store"]

DEFAULT_STORE = "results/store"
READERS = 16  # manifests of an object store that are read at a time


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
        self._seen: dict[str, tuple[Any, dict[str, Any]]] = {}  # a manifest's path -> when it was read; its files

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
        return self._state(cell, None) == "" or self._send(cell)

    def done(self, cells: Iterable[Cell]) -> set[str]:
        """The keys of those cells that are done: see `look`."""
        return self.look(cells)[0]

    def look(self, cells: Iterable[Cell]) -> tuple[set[str], dict[str, str]]:
        """(keys of those cells that are done, key -> what is wrong of those whose artifact is damaged).

        One listing per kind, and each manifest is read once per Store. Raises StoreError.
        """
        listed = {kind: self._listed(kind) for kind in KINDS}
        there = [c for c in cells if folder_name(c) in listed[c.kind]]
        with ThreadPoolExecutor(1 if self.local else READERS) as pool:
            state = map if self.local else pool.map
            found = list(state(lambda c: (key(c), self._state(c, listed[c.kind][folder_name(c)])), there))
        return {k for k, why in found if why == ""}, {k: why for k, why in found if why}

    def repair(self, cells: Iterable[Cell]) -> set[str]:
        """Move damaged artifacts of these cells out of the way; returns the keys of those that are not done for it."""
        known = {key(c): c for c in cells}
        damaged = self.look(known.values())[1]
        for k, why in damaged.items():
            self._give_up(known[k], self.read(f"{self.folder(known[k])}/{MANIFEST}"), Damaged(why))
        return set(damaged)

    def _listed(self, kind: str) -> dict[str, dict[str, int] | None]:
        """Folders of a kind; in an object store with the files of each, by name, and their sizes."""
        base = f"{self.root}/{kind}"
        if self.local:
            return dict.fromkeys(os.listdir(base) if os.path.isdir(base) else ())
        found: dict[str, dict[str, int]] = {}
        for path, said in self.find(base).items():
            name, _, inner = path[len(base) + 1 :].partition("/")
            found.setdefault(name, {})[inner] = int(said.get("size") or 0)
        return dict(found)

    def _state(self, cell: Cell, files: Mapping[str, int] | None) -> str | None:
        """Empty where the cell is done, None where it has no artifact, else what is wrong with that.

        files: sizes of what is in the folder, where that is known.
        """
        folder = self.folder(cell)
        size = self._sizes(cell) if files is None else files.get
        path = f"{folder}/{MANIFEST}"
        stamp = _stamp(path) if self.local else size(MANIFEST)
        if stamp is None:
            return None
        if (seen := self._seen.get(path)) and seen[0] == stamp:
            lack = lacking(seen[1], size)
            return lack and f"{folder}/{lack}"
        if (text := self.read(path)) is None:
            return None
        try:
            manifest = whole(text, path, key(cell), size)
        except Damaged as e:
            return str(e)
        self._seen[path] = stamp, {n: manifest[n] for n in ("files", "payload") if n in manifest}
        return ""

    def _sizes(self, cell: Cell) -> Callable[[str], int | None]:
        folder = self.folder(cell)
        return lambda name: self.size(f"{folder}/{name}")

    def manifest(self, cell: Cell) -> dict[str, Any]:
        """The record of a finished cell. Raises StoreError where it is missing, Damaged where it cannot be believed."""
        return self._manifest(cell)[0]

    def _manifest(self, cell: Cell) -> tuple[dict[str, Any], bytes]:
        """The manifest, and its bytes as they were seen."""
        path = f"{self.folder(cell)}/{MANIFEST}"
        if (text := self.read(path)) is None:
            raise StoreError(f"{path} does not exist: {slug(cell)} is not done")
        try:  # of an object store one request for each file: who needs them finds out
            manifest = whole(text, path, key(cell), self._sizes(cell) if self.local else None)
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
            record = {**draft.record, **identity(cell)}
            try:
                text = self.commit(work, self.folder(cell), record)
            except (StoreError, FileNotFoundError) as e:
                raise self._keep(cell, work, record, e) from e
        if not self.local:  # where a listing says that it has another size, another's stands
            self._seen[f"{self.folder(cell)}/{MANIFEST}"] = len(text), json.loads(text)
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
        try:
            said = json.loads((kept / "record.json").read_text())
            verify(kept / "files", said["files"])
        except (Damaged, OSError, ValueError, KeyError, TypeError):  # torn as this machine died: it is computed again
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


def _stamp(path: str) -> tuple[int, int] | None:
    """By which it is known whether a local file is the one that was read; None where there is none."""
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return found.st_mtime_ns, found.st_size
