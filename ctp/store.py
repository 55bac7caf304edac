"""Artifacts on any fsspec URI: one folder per cell, and `manifest.json` written last means done.

    {root}/{kind}/{slug}-{key[:12]}/      payload files and manifest.json
    {root}/partial/{slug}-{key[:12]}/     state of a prompt that is still being learned
    {root}/failed/{slug}-{key[:12]}.json  why the last try failed

Nothing that is done is overwritten, and nothing is read whose bytes are not those the manifest names.
"""

import glob
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from ctp.cache import cache_dir, fill, sha256_file
from ctp.labels import slug
from ctp.spec import KINDS, Cell, canonical, key, to_json

DEFAULT_STORE = "results/store"
MANIFEST = "manifest.json"
DAY = 24 * 3600.0


def default_store() -> str:
    """CTP_STORE, else results/store."""
    return os.environ.get("CTP_STORE") or DEFAULT_STORE


class StoreError(Exception):
    """The store cannot be reached or written, or what it holds is not what its manifest says."""


@dataclass
class Draft:
    """An artifact in the making: fill `path` with files and `record` with what the manifest shall say."""

    path: Path
    record: dict[str, Any] = field(default_factory=dict)


class Store:
    """Artifacts under one root, for example `results/store` or `s3://bucket/study`."""

    def __init__(self, uri: str) -> None:
        try:
            self.fs, root = fsspec.core.url_to_fs(uri)
        except (ValueError, ImportError) as e:
            raise StoreError(f"store {uri!r}: {e}") from e
        self.local = isinstance(self.fs, LocalFileSystem)
        self.root = str(Path(root).resolve()) if self.local else root.rstrip("/")
        self.uri = self.root if self.local else uri
        self._verified: dict[str, Path] = {}

    def check_writable(self) -> None:
        """Write and remove a small file. Raises StoreError where that fails."""
        probe = f"{self.root}/.probe-{uuid.uuid4().hex}"
        try:
            self.fs.makedirs(self.root, exist_ok=True)
            self.fs.pipe_file(probe, b"ctp")
            self.fs.rm_file(probe)
            self._sweep()
        except Exception as e:  # whatever the object store's client raises
            raise StoreError(f"store {self.uri!r} cannot be written: {type(e).__name__}: {e}") from e

    def _sweep(self) -> None:
        """What killed workers left unfinished goes after a day: nobody writes one artifact for so long."""
        for path in Path(self.root, ".tmp").glob("*") if self.local else ():
            if time.time() - path.stat().st_mtime > DAY:
                shutil.rmtree(path, ignore_errors=True)

    # ------------------------------------------------------------- what is there

    def folder(self, cell: Cell) -> str:
        """Where the cell's artifact lies or will lie."""
        return f"{self.root}/{cell.kind}/{_name(cell)}"

    def glob(self, folder: str, pattern: str) -> list[str]:
        """Paths of the files in a folder of the store, as they are now; * ? [ are wildcards in `pattern` only.

        Raises StoreError where the store does not answer.
        """
        base = f"{self.root}/{folder}"
        if self.local:  # by far faster: folders whose files the pattern names are not listed
            return [f"{base}/{p}" for p in glob.glob(pattern, root_dir=base, include_hidden=True)]
        try:
            self.fs.invalidate_cache()
            # Not fs.glob: it searches from the last folder before a bracket, which may be all of a bucket, and asks
            # object stores folder by folder.
            paths = [str(p) for p in self.fs.find(base)]
        except Exception as e:  # whatever the object store's client raises
            raise StoreError(f"store {self.uri!r} cannot be read: {type(e).__name__}: {e}") from e
        return [p for p in paths if _matches(p[len(base) + 1 :], pattern)]

    def has(self, cell: Cell) -> bool:
        """Is the cell done?"""
        return bool(self.fs.exists(f"{self.folder(cell)}/{MANIFEST}"))

    def done(self, cells: Iterable[Cell]) -> set[str]:
        """The keys of those cells that are done: one listing per kind, not one request per cell."""
        found = {path.split("/")[-2] for kind in KINDS for path in self.glob(kind, f"*/{MANIFEST}")}
        return {key(c) for c in cells if _name(c) in found}

    def manifest(self, cell: Cell) -> dict[str, Any]:
        """The record of a finished cell. Raises StoreError where it is missing or another cell's."""
        path = f"{self.folder(cell)}/{MANIFEST}"
        try:
            manifest: dict[str, Any] = json.loads(self.fs.cat_file(path))
        except FileNotFoundError as e:
            raise StoreError(f"{path} does not exist: {slug(cell)} is not done") from e
        except json.JSONDecodeError as e:
            raise StoreError(f"{path} is not JSON ({e}); remove that folder to compute it again") from e
        if manifest["key"] != key(cell):
            raise StoreError(f"{path} is of key {manifest['key']}, not {key(cell)}")
        return manifest

    # --------------------------------------------------------- writing and reading

    @contextmanager
    def publish(self, cell: Cell) -> Iterator[Draft]:
        """Fill the draft; on a clean exit it becomes the cell's artifact, on an error nothing becomes visible."""
        with self._workspace() as work:
            draft = Draft(work)
            yield draft
            self._commit(work, self.folder(cell), {**self._identity(cell), **draft.record})
        self.forget_failure(cell)
        self._remove(self._partial(cell))

    def fetch(self, cell: Cell) -> Path:
        """A local folder with the cell's files, every hash verified (once per Store). Raises StoreError."""
        if key(cell) not in self._verified:
            self._verified[key(cell)] = self._local_copy(cell, self.manifest(cell)["files"])
        return self._verified[key(cell)]

    def _local_copy(self, cell: Cell, files: dict[str, Any]) -> Path:
        if self.local:
            path = Path(self.folder(cell))
            _verify(path, files)
            return path
        # Named by content too: another store may hold other bytes under this key.
        content = hashlib.sha256(canonical(files).encode()).hexdigest()
        path = cache_dir() / "artifacts" / f"{key(cell)[:24]}-{content[:24]}"
        if path.exists():
            try:
                _verify(path, files)
                return path
            except StoreError:
                shutil.rmtree(path)  # the copy was damaged on this machine
        fill(path, lambda to: self._download(self.folder(cell), to))
        try:
            _verify(path, files)
        except StoreError:
            shutil.rmtree(path)
            raise
        return path

    def save_partial(self, cell: Cell, step: int, write: Any) -> None:
        """Keep the state that `write(folder)` writes, as of `step`; older states go once it is safe."""
        base = self._partial(cell)
        older = self._partial_steps(cell)
        with self._workspace() as work:
            write(work)
            self._commit(work, f"{base}/step-{step:09d}", {**self._identity(cell), "step": step})
        for path in older:
            if path != f"{base}/step-{step:09d}":
                self._remove(path)

    @contextmanager
    def partial(self, cell: Cell) -> Iterator[Path | None]:
        """A local copy of the newest whole saved state of the cell, or None."""
        for source in reversed(self._partial_steps(cell)):
            with self._workspace() as work:
                try:
                    self._download(source, work)
                    manifest = json.loads((work / MANIFEST).read_text())
                    _verify(work, manifest["files"])
                except (OSError, ValueError, StoreError):
                    continue  # torn while the machine died: an older one may be whole
                yield work
                return
        yield None

    # ------------------------------------------------------------------- failures

    def record_failure(self, cell: Cell, error: str, trace: str) -> None:
        """Keep why the last try failed, for the next plan to say."""
        path = self._failure(cell)
        self.fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
        record = {"key": key(cell), "error": error, "traceback": trace, "spec": to_json(cell)}
        self.fs.pipe_file(path, json.dumps(record, indent=1).encode())

    def forget_failure(self, cell: Cell) -> None:
        """The cell is done: its old failure says nothing any more."""
        if self.fs.exists(self._failure(cell)):
            self.fs.rm_file(self._failure(cell))

    def failures(self) -> dict[str, str]:
        """key -> the last error, of every cell whose last try failed."""
        found = {}
        for path in self.glob("failed", "*.json"):
            try:
                record = json.loads(self.fs.cat_file(path))
                found[record["key"]] = record["error"]
            except (ValueError, KeyError, OSError):
                continue  # cut off while it was written: the cell is missing all the same
        return found

    def started(self) -> dict[str, int]:
        """Folder name of a cell -> the step it had reached, of every cell that was interrupted."""
        paths = self.glob("partial", f"*/step-*/{MANIFEST}")
        return {p.split("/")[-3]: int(p.split("/")[-2].removeprefix("step-")) for p in sorted(paths)}

    # ---------------------------------------------------------------------- within

    def _partial(self, cell: Cell) -> str:
        return f"{self.root}/partial/{_name(cell)}"

    def _partial_steps(self, cell: Cell) -> list[str]:
        found = self.glob(f"partial/{_name(cell)}", f"step-*/{MANIFEST}")
        return sorted(p.removesuffix(f"/{MANIFEST}") for p in found)

    def _failure(self, cell: Cell) -> str:
        return f"{self.root}/failed/{_name(cell)}.json"

    @staticmethod
    def _identity(cell: Cell) -> dict[str, Any]:
        return {"key": key(cell), **to_json(cell), "version": cell.VERSION, "inputs": [key(i) for i in cell.inputs]}

    @contextmanager
    def _workspace(self) -> Iterator[Path]:
        """An empty folder; inside a local store, so that becoming visible is one rename."""
        parent = f"{self.root}/.tmp" if self.local else None
        if parent:
            os.makedirs(parent, exist_ok=True)
        work = Path(tempfile.mkdtemp(dir=parent, prefix="ctp-"))
        try:
            yield work
        finally:
            shutil.rmtree(work, ignore_errors=True)

    def _commit(self, work: Path, target: str, record: dict[str, Any]) -> None:
        """Make `work` visible as `target`. Where another worker was first, its artifact stands and this is dropped."""
        files = sorted(p for p in work.rglob("*") if p.is_file())
        listing = {str(p.relative_to(work)): {"sha256": sha256_file(p), "size": p.stat().st_size} for p in files}
        # In an object store two racers must not write over each other's files: each has a folder of its own.
        payload = "" if self.local else f"payload-{uuid.uuid4().hex[:12]}/"
        manifest = {**record, "files": listing, "payload": payload}
        (work / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True))
        if self.local:
            _move(work, Path(target))
            return
        for name in listing:
            self.fs.put_file(str(work / name), f"{target}/{payload}{name}")
        if self.fs.exists(f"{target}/{MANIFEST}"):
            self._remove(f"{target}/{payload.rstrip('/')}")
        else:
            self.fs.put_file(str(work / MANIFEST), f"{target}/{MANIFEST}")

    def _download(self, source: str, target: Path) -> None:
        manifest = json.loads(self.fs.cat_file(f"{source}/{MANIFEST}"))
        places = {MANIFEST: MANIFEST} | {name: f"{manifest['payload']}{name}" for name in manifest["files"]}
        for name, place in places.items():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            try:
                self.fs.get_file(f"{source}/{place}", str(target / name))
            except FileNotFoundError as e:
                raise StoreError(f"{source}/{place} is missing, though the manifest names it: remove {source}") from e

    def _remove(self, path: str) -> None:
        if self.local:
            if os.path.exists(path):
                shutil.rmtree(path)
            return
        for file in self.fs.find(path):  # fs.rm would take brackets in a name for a pattern
            self.fs.rm_file(file)


def _move(work: Path, target: Path) -> None:
    """Rename `work` to `target`, unless a finished artifact is there; an unfinished one is moved out of the way."""
    target.parent.mkdir(parents=True, exist_ok=True)
    work.chmod(0o755)
    try:
        work.rename(target)
    except OSError:
        if (target / MANIFEST).exists():
            return
        target.rename(work.with_name(f"unfinished-{uuid.uuid4().hex[:12]}"))
        work.rename(target)


def _matches(path: str, pattern: str) -> bool:
    """As a shell does: a * ends at the next slash."""
    parts, wanted = path.split("/"), pattern.split("/")
    return len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted))


def _name(cell: Cell) -> str:
    return f"{slug(cell)[:150]}-{key(cell)[:12]}"  # file names end at 255 bytes


def _verify(folder: Path, files: dict[str, dict[str, Any]]) -> None:
    for name, said in files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != said["size"] or sha256_file(path) != said["sha256"]:
            raise StoreError(f"{path} is not the file that its manifest names (torn or changed): remove {folder}")


if __name__ == "__main__":
    from ctp.artifacts import main

    sys.exit(main())
