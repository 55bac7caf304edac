"""Folders with a manifest under one root, a local folder or any fsspec URI: seen whole or not at all.

Locally a folder is made beside the others and becomes visible by one rename. An object store has no rename: there the
files go into a folder of their own inside, and the manifest that names them comes last.
"""

import errno
import glob
import json
import os
import re
import shutil
import stat
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from ctp.common.files import flush, flush_entry, matches
from ctp.storage.manifest import MANIFEST, Damaged, check_files, files_of, parse, whole
from ctp.storage.remote import StoreError, connect, room, unreadable, unsupported

DAMAGED, TEMPORARY = "damaged", ".tmp"
DAY = 24 * 3600.0
PULSE = 600.0  # seconds between two signs of life in the folder of what is being made
_PAYLOAD = re.compile("payload-[0-9a-f]{12}")
LEAST_ROOM = 2**20  # bytes free, below which nothing is begun
IN_THE_WAY = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)  # a folder, or something else, is where one is renamed to


class Folders:
    """What lies under one root, for example `results/store` or `s3://bucket/study`."""

    def __init__(self, uri: str) -> None:
        self.fs, self.root = connect(uri)
        self.local = isinstance(self.fs, LocalFileSystem)
        self.uri = self.root if self.local else uri

    # -------------------------------------------------------------------- reading

    def glob(self, folder: str, pattern: str) -> list[str]:
        """Paths of the files in a folder of the store, as they are now; * ? [ are wildcards in `pattern` only.

        Raises StoreError where the store does not answer.
        """
        base = f"{self.root}/{folder}"
        if self.local:  # by far faster: folders whose files the pattern names are not listed
            return [f"{base}/{p}" for p in glob.glob(pattern, root_dir=base, include_hidden=True)]
        return [p for p in self.find(base) if matches(p[len(base) + 1 :], pattern)]

    def finished(self, folder: str) -> set[str]:
        """The names of what has a manifest in a folder of the store. An empty one, from a power cut, is none."""
        base = f"{self.root}/{folder}"
        if self.local:
            inside = os.listdir(base) if os.path.isdir(base) else ()
            return {name for name in inside if self.size(f"{base}/{name}/{MANIFEST}")}
        names = ((p[len(base) + 1 :].split("/"), f) for p, f in self.find(base).items())
        return {n[0] for n, f in names if len(n) == 2 and n[1] == MANIFEST and f.get("size")}

    def find(self, path: str) -> dict[str, dict[str, Any]]:
        """Every file under a path of an object store, with what the store says of it. Raises StoreError."""
        try:
            # Not fs.glob: it searches from the last folder before a bracket, which may be all of a bucket, and asks
            # object stores folder by folder.
            found: dict[str, dict[str, Any]] = self.fs.find(path, detail=True)
        except FileNotFoundError as e:
            raise StoreError(f"store {self.uri!r} cannot be read: {e}") from e
        return {p: f for p, f in found.items() if p != path}

    def read(self, path: str) -> bytes | None:
        """The bytes of a small file; None where there is none, no bytes where it is a folder. Raises StoreError."""
        try:
            return bytes(self.fs.cat_file(path))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except IsADirectoryError:
            return b""
        except PermissionError as e:
            raise unreadable(path, e) from e

    def size(self, path: str) -> int | None:
        """Bytes of a file; None where there is none. Raises StoreError."""
        try:
            if not self.local:
                return int(self.fs.info(path).get("size") or 0)
            found = os.stat(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as e:
            raise unreadable(path, e) from e
        return found.st_size if stat.S_ISREG(found.st_mode) else None

    def download(self, source: str, manifest: Mapping[str, Any], target: Path) -> None:
        """Bring the files that the manifest of `source` names. Raises Damaged where one is missing."""
        (target / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True))
        for name in manifest["files"]:
            place = f"{source}/{manifest.get('payload', '')}{name}"
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            try:
                self.fs.get_file(place, str(target / name))
            except FileNotFoundError as e:
                raise Damaged(f"{name} is missing, though the manifest names it") from e

    @contextmanager
    def inspected(self, source: str, manifest: Mapping[str, Any], name: str) -> Iterator[Path]:
        """A local folder with one of the files that the manifest of `source` names. Raises as `download`."""
        if self.local:
            yield Path(source, manifest.get("payload", ""))  # of a store that was copied from an object store
            return
        with self.workspace() as work:
            self.download(source, {**manifest, "files": {name: manifest["files"][name]}}, work)
            yield work

    # -------------------------------------------------------------------- writing

    @contextmanager
    def workspace(self) -> Iterator[Path]:
        """An empty folder; inside a local store, so that becoming visible is one rename. Raises StoreError if full."""
        parent = f"{self.root}/{TEMPORARY}" if self.local else None
        if parent:
            os.makedirs(parent, exist_ok=True)
            if shutil.disk_usage(parent).free < LEAST_ROOM:  # before hours of work, not after them
                raise OSError(28, os.strerror(28), parent)
        work = Path(tempfile.mkdtemp(dir=parent, prefix="ctp-"))
        gone = threading.Event()
        threading.Thread(target=_pulse, args=(work, gone), daemon=True).start()
        try:
            yield work
        finally:
            gone.set()
            shutil.rmtree(work, ignore_errors=True)

    def commit(self, work: Path, target: str, record: Mapping[str, Any]) -> bytes:
        """Make `work` visible as `target`. Where another worker was first, its artifact stands and this is dropped.
        Returns the manifest.

        Raises ValueError where something in `work` is no file that an artifact can hold.
        """
        check_files(work)
        listing = files_of(work)
        # In an object store two racers must not write over each other's files: each has a folder of its own.
        payload = "" if self.local else f"payload-{uuid.uuid4().hex[:12]}/"
        text = json.dumps({**record, "files": listing, "payload": payload}, indent=1, sort_keys=True).encode()
        if self.local:
            (work / MANIFEST).write_bytes(text)
            flush(work)
            self._rename(work, target)
            flush_entry(os.path.dirname(target))
            return text
        for name in listing:
            self.fs.put_file(str(work / name), f"{target}/{payload}{name}")
        if not self._put_new(target, text):
            self.remove(f"{target}/{payload.rstrip('/')}")
        return text

    def _rename(self, work: Path, target: str) -> None:
        """Rename `work` to `target`, unless an artifact is there; an unfinished one is moved out of the way."""
        work.chmod(0o755)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        for _ in range(10):  # another may do the same at this moment
            try:
                work.rename(target)
                return
            except OSError as e:  # what was in the way may be gone by now: a look at it would not tell
                if e.errno not in IN_THE_WAY:
                    raise
            if self._stands(target):
                return
            aside = work.with_name(f"unfinished-{uuid.uuid4().hex[:12]}")
            with suppress(OSError):
                os.rename(target, aside)
                if self._stands(str(aside), target):  # finished since we looked: back with it
                    os.rename(aside, target)
        raise StoreError(f"{target} cannot be written: something comes back there again and again")

    def _put_new(self, target: str, manifest: bytes) -> bool:
        """Put the manifest unless there is a whole one, in one step where the store can do that. Does ours stand?"""
        path = f"{target}/{MANIFEST}"
        if self._stands(target):
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

    def _stands(self, target: str, called: str = "") -> bool:
        """Is there an artifact, whole, and of the key that it is called by? A damaged one is set aside."""
        path = f"{target}/{MANIFEST}"
        if (text := self.read(path)) is None:
            return False
        try:
            own = parse(text, path)["key"]
            whole(
                text,
                path,
                own if own[:12] in (called or target) else "another cell's",
                lambda n: self.size(f"{target}/{n}"),
            )
        except Damaged as e:
            self.set_aside(target, text, str(e))
            return False
        return True

    def write(self, path: str, text: bytes) -> None:
        """A small file, whole or not at all; what is there is replaced."""
        if not self.local:
            self.fs.pipe_file(path, text)
            return
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with self.workspace() as work:
            (work / "file").write_bytes(text)
            (work / "file").replace(path)

    # ------------------------------------------------------------------- removing

    def remove(self, path: str) -> None:
        """Remove a file or folder, its manifest first: what is being removed is not taken for done."""
        if self.local:
            aside = f"{self.root}/{TEMPORARY}/removed-{uuid.uuid4().hex[:12]}"
            os.makedirs(os.path.dirname(aside), exist_ok=True)
            with suppress(FileNotFoundError):
                os.rename(path, aside)
                shutil.rmtree(aside) if os.path.isdir(aside) and not os.path.islink(aside) else os.unlink(aside)
            return
        own = f"{path}/{MANIFEST}"
        for file in sorted(self.fs.find(path), key=lambda p: p != own):  # fs.rm takes brackets in a name for a pattern
            with suppress(FileNotFoundError):
                self.fs.rm_file(file)

    def set_aside(self, folder: str, manifest: bytes | None, why: str) -> str:
        """Move a damaged artifact to damaged/. manifest: as it was seen: what was put there since then stays.

        Returns where it is now; empty where another was faster.
        """
        if self.read(f"{folder}/{MANIFEST}") != manifest:
            return ""
        kind, name = folder.split("/")[-2:]
        to = f"{self.root}/{DAMAGED}/{kind}/{name}-{uuid.uuid4().hex[:8]}"
        if not (self._rename_aside(folder, to, manifest) if self.local else self._copy_aside(folder, to, manifest)):
            return ""
        self.write(f"{to}/damaged.json", json.dumps({"why": why, "when": time.time(), "was": folder}).encode())
        return to

    def _rename_aside(self, folder: str, to: str, manifest: bytes | None) -> bool:
        os.makedirs(os.path.dirname(to), exist_ok=True)
        try:
            os.rename(folder, to)
        except FileNotFoundError:
            return False
        if self.read(f"{to}/{MANIFEST}") == manifest:
            return True
        with suppress(OSError):  # a new one came in between: back with it, unless there is one again
            os.rename(to, folder)
        return False

    def _copy_aside(self, folder: str, to: str, manifest: bytes | None) -> bool:
        # Not what others are bringing just now: each has a payload folder of its own.
        own = _PAYLOAD.search((manifest or b"").decode(errors="replace"))
        inner = {p: p[len(folder) + 1 :] for p in self.find(folder)}
        files = [p for p, n in inner.items() if not n.startswith("payload-") or (own and n.startswith(f"{own[0]}/"))]
        for file in files:
            with suppress(FileNotFoundError):
                self.fs.cp_file(file, f"{to}{file[len(folder) :]}")
        if self.read(f"{folder}/{MANIFEST}") != manifest:
            self.remove(to)
            return False
        for file in sorted(files, key=lambda p: p != f"{folder}/{MANIFEST}"):
            with suppress(FileNotFoundError):
                self.fs.rm_file(file)
        return True

    # ---------------------------------------------------------------------- within

    def room(self) -> AbstractContextManager[None]:
        """What fails in here because a disk is full becomes one StoreError that says so."""
        return room(self.uri)


def _pulse(work: Path, gone: threading.Event) -> None:
    """Say now and then that somebody is still at it: what gave no sign for a day is removed."""
    while not gone.wait(PULSE):
        with suppress(OSError):
            os.utime(work)
