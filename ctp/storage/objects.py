"""Folders in an object store, which cannot rename: an artifact's files come first, its manifest last."""

import re
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from fsspec.utils import glob_translate

from ctp.storage.folders import File, Folders, manifest_text
from ctp.storage.manifest import MANIFEST, PAYLOAD, FileEntry, Stored, files_of
from ctp.storage.remote import StoreError, connect, unsupported


class Objects(Folders):
    """An object store, for example `s3://bucket/study`.

    Each driver puts an artifact's files into a payload folder of its own, so that two drivers never mix their files.
    """

    local = False

    def find(self, path: str) -> dict[str, dict[str, Any]]:
        """Every file under a path, with what the store reports of it."""
        try:
            # Not fs.glob: it searches from the last folder before a bracket, which may be all of a bucket, and asks
            # object stores folder by folder.
            found: dict[str, dict[str, Any]] = self.fs.find(path, detail=True)
        except FileNotFoundError as e:
            raise StoreError(f"store {self.uri!r} cannot be read: {e}") from e
        return {p: f for p, f in found.items() if p != path}

    def files(self, folder: str) -> dict[str, File]:
        start = len(f"{self.root}/{folder}/")
        found = self.find(f"{self.root}/{folder}")
        return {p[start:]: File(int(f.get("size") or 0), _written(f)) for p, f in found.items()}

    def glob(self, folder: str, pattern: str) -> list[str]:
        wanted = re.compile(glob_translate(pattern))
        return [f"{self.root}/{folder}/{p}" for p in self.files(folder) if wanted.fullmatch(p)]

    def finished(self, folder: str) -> set[str]:
        found = ((p.split("/"), f) for p, f in self.files(folder).items() if f.size)
        return {parts[0] for parts, _ in found if parts[1:] == [MANIFEST]}

    def size(self, path: str) -> int | None:
        try:
            return int(self.fs.info(path).get("size") or 0)
        except (FileNotFoundError, NotADirectoryError):
            return None

    def stamp(self, path: str) -> int | None:
        return self.size(path)

    def _workspaces(self) -> None:
        return None

    def left_over(self) -> list[Path]:
        return []

    def commit(self, work: Path, target: str, record: Stored) -> bytes:
        return self.upload(work, target, record, files_of(work))

    def upload(self, work: Path, target: str, record: Stored, files: Mapping[str, FileEntry]) -> bytes:
        """As `commit`, of these files in `work`."""
        payload = f"payload-{uuid.uuid4().hex[:12]}"
        manifest = manifest_text(record, files, f"{payload}/")
        for name in files:
            self.fs.put_file(str(work / name), f"{target}/{payload}/{name}")
        if not self.put_new(target, manifest):
            self.remove(f"{target}/{payload}")
        return manifest

    def put_new(self, target: str, manifest: bytes) -> bool:
        """Put the manifest unless a whole artifact is there, in one step where the store can. Is it ours now?"""
        path = f"{target}/{MANIFEST}"
        if self.stands(target):
            return False
        try:
            self.fs.pipe_file(path, manifest, mode="create")
        except FileExistsError:
            return self.read(path) == manifest  # ours where a first try got through and only its answer was lost
        except Exception as e:
            if not unsupported(e):
                raise
            self.fs.pipe_file(path, manifest)
        return True

    def write(self, path: str, text: bytes) -> None:
        self.fs.pipe_file(path, text)

    def remove(self, path: str) -> None:
        self._remove_files(path, self.fs.find(path))

    def _remove_files(self, folder: str, files: list[str]) -> None:
        for file in sorted(files, key=lambda p: p != f"{folder}/{MANIFEST}"):  # the manifest first
            with suppress(FileNotFoundError):  # fs.rm would take brackets in a name for a pattern
                self.fs.rm_file(file)

    def _move(self, folder: str, target: str, manifest: bytes | None) -> bool:
        """Copy the artifact's files, then remove them."""
        text = (manifest or b"").decode(errors="replace")  # searched, not parsed: it may be damaged
        named = PAYLOAD.findall(text)
        files = []
        for path in self.find(folder):
            payload = PAYLOAD.match(path[len(folder) + 1 :])
            if payload is None or payload[0] in named:  # another driver is filling the payload folders that are not
                files.append(path)
        for path in files:
            with suppress(FileNotFoundError):
                self.fs.cp_file(path, f"{target}{path[len(folder) :]}")
        if self.read(f"{folder}/{MANIFEST}") != manifest:  # replaced while it was copied
            self.remove(target)
            return False
        self._remove_files(folder, files)
        return True


def _written(info: Mapping[str, Any]) -> float:
    """When a file was written, in seconds since 1970. Stores name it differently, or do not report it."""
    for name in ("LastModified", "last_modified", "updated", "mtime", "created"):
        value = info.get(name)
        if isinstance(value, datetime):
            return value.timestamp()
        if isinstance(value, int | float):
            return float(value)
    return time.time()


def open_folders(uri: str) -> Folders:
    """The folders at a path or fsspec URI. Raises StoreError on a bad URI."""
    fs, root, local = connect(uri)
    return Folders(fs, root, root) if local else Objects(fs, root, uri)
