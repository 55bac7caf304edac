"""Folders with a manifest under one root: a folder is visible whole or not at all.

`Folders` is a local folder: each one is made beside the others and becomes visible by one rename.
`ctp.storage.objects` does the same in object stores, which cannot rename.
"""

import errno
import glob
import json
import os
import shutil
import stat
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from ctp.common.files import flush, flush_entry
from ctp.storage.manifest import MANIFEST, Damaged, FileEntry, Manifest, Stored, files_of, parse, whole
from ctp.storage.ref import DIGITS
from ctp.storage.remote import StoreError, room, unreadable

DAMAGED, TEMPORARY = "damaged", ".tmp"
DAY = 24 * 3600.0
PULSE = 600.0  # seconds between two signs of life in the folder of what is being made
LEAST_ROOM = 2**20  # bytes that must be free before work begins
IN_THE_WAY = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)  # something is where a folder is to be renamed to


class File(NamedTuple):
    """Bytes, and when it was written, in seconds since 1970 (now, where a store does not report that)."""

    size: int
    time: float


class Folders:
    """A local folder, for example `results/store`. Paths begin with `root`, but for the names of folders in it.

    Methods raise StoreError where the store does not answer.
    """

    local = True

    def __init__(self, fs: Any, root: str, uri: str) -> None:
        self.fs, self.root, self.uri = fs, root, uri

    # -------------------------------------------------------------------- reading

    def glob(self, folder: str, pattern: str) -> list[str]:
        """Paths of files in a folder of the store, as they are now; * ? [ are wildcards in `pattern` only."""
        base = f"{self.root}/{folder}"
        return [f"{base}/{p}" for p in glob.glob(pattern, root_dir=base, include_hidden=True)]

    def files(self, folder: str) -> dict[str, File]:
        """Every file under a folder of the store, by its path in that folder; a link is a file."""
        base = f"{self.root}/{folder}"
        inside = os.scandir(base) if os.path.isdir(base) else ()
        # Somebody who had no room may have linked a folder to another disk.
        tops = [base, *(e.path for e in inside if e.is_symlink() and e.is_dir())]
        found = {}
        for at, folders, names in (step for top in tops for step in os.walk(top)):
            links = [n for n in folders if at != base and os.path.islink(f"{at}/{n}")]
            for path in (f"{at}/{name}" for name in (*names, *links)):
                info = os.lstat(path)
                found[path[len(base) + 1 :]] = File(info.st_size, info.st_mtime)
        return found

    def finished(self, folder: str) -> set[str]:
        """The names of the folders in there that have a manifest. An empty one, from a power cut, does not count."""
        return {p.split("/")[-2] for p in self.glob(folder, f"*/{MANIFEST}") if self.size(p)}

    def size(self, path: str) -> int | None:
        """Bytes of a file; None where there is none."""
        info = _stat(path)
        return info.st_size if info and stat.S_ISREG(info.st_mode) else None

    def stamp(self, path: str) -> object:
        """Something that differs once a file is replaced; None where there is none."""
        info = _stat(path)
        return (info.st_mtime_ns, info.st_size) if info else None

    def read(self, path: str) -> bytes | None:
        """The bytes of a small file; None where there is none, no bytes where it is a folder."""
        try:
            return bytes(self.fs.cat_file(path))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except IsADirectoryError:
            return b""
        except PermissionError as e:
            raise unreadable(path, e) from e

    def download(self, source: str, manifest: Manifest, target: Path) -> None:
        """Copy the files that the manifest of `source` names. Raises Damaged where one is missing."""
        (target / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True))
        for name in manifest["files"]:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            try:
                self.fs.get_file(f"{source}/{manifest.get('payload', '')}{name}", str(target / name))
            except FileNotFoundError as e:
                raise Damaged(f"{name} is missing, though the manifest names it") from e

    # -------------------------------------------------------------------- writing

    @contextmanager
    def workspace(self) -> Iterator[Path]:
        """An empty local folder to make something in. A full disk, also while it is used, raises StoreError."""
        with room(self.uri):
            work = Path(tempfile.mkdtemp(dir=self._workspaces(), prefix="ctp-"))
            ended = threading.Event()
            threading.Thread(target=_pulse, args=(work, ended), daemon=True).start()
            try:
                yield work
            finally:
                ended.set()
                shutil.rmtree(work, ignore_errors=True)

    def _workspaces(self) -> str | None:
        """Inside the store, so that becoming visible is one rename. None: the system's own temporary folder."""
        folder = f"{self.root}/{TEMPORARY}"
        os.makedirs(folder, exist_ok=True)
        if shutil.disk_usage(folder).free < LEAST_ROOM:  # before hours of work, not after them
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), folder)
        return folder

    def left_over(self) -> list[Path]:
        """What killed workers left unfinished: workspaces without a sign of life for a day."""
        found = []
        for path in Path(self.root, TEMPORARY).glob("*"):
            with suppress(FileNotFoundError):  # another driver's worker is done with it
                if time.time() - path.lstat().st_mtime > DAY:
                    found.append(path)
        return sorted(found)

    def commit(self, work: Path, target: str, record: Stored) -> bytes:
        """Make `work` visible as `target`. An artifact that is there already stays, and this one is dropped.

        Returns the manifest: the record and the files. Raises ValueError where `work` holds what no artifact can.
        """
        text = manifest_text(record, files_of(work), "")
        (work / MANIFEST).write_bytes(text)
        flush(work)
        self._rename(work, target)
        flush_entry(os.path.dirname(target))
        return text

    def _rename(self, work: Path, target: str) -> None:
        """Rename `work` to `target`, unless an artifact is there; an unfinished one is moved out of the way."""
        work.chmod(0o755)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        for _ in range(10):  # another may do the same at this moment
            try:
                work.rename(target)
                return
            except OSError as e:  # no check whether something is there: it may be gone by now
                if e.errno not in IN_THE_WAY:
                    raise
            if self.stands(target):
                return
            with suppress(OSError):
                self._move(target, f"{work.parent}/unfinished-{uuid.uuid4().hex[:12]}", None)
        raise StoreError(f"{target} cannot be written: something comes back there again and again")

    def stands(self, target: str) -> bool:
        """Is there a whole artifact, whose key its path contains? A damaged one is set aside."""
        path = f"{target}/{MANIFEST}"
        if (text := self.read(path)) is None:
            return False
        try:
            key = parse(text, path)["key"]
            expected = key if key[:DIGITS] in target else "another cell's"
            whole(text, path, expected, lambda n: self.size(f"{target}/{n}"))
        except Damaged as e:
            self.set_aside(target, text, str(e))
            return False
        return True

    def write(self, path: str, text: bytes) -> None:
        """Write a small file whole or not at all; what is there is replaced."""
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with self.workspace() as work:
            (work / "file").write_bytes(text)
            (work / "file").replace(path)

    def remove(self, path: str) -> None:
        """Remove a file or folder, its manifest first, so that a half removed artifact is not taken for done."""
        gone = f"{self.root}/{TEMPORARY}/removed-{uuid.uuid4().hex[:12]}"
        os.makedirs(os.path.dirname(gone), exist_ok=True)
        with suppress(FileNotFoundError):
            os.rename(path, gone)
            shutil.rmtree(gone) if os.path.isdir(gone) and not os.path.islink(gone) else os.unlink(gone)

    def set_aside(self, folder: str, manifest: bytes | None, why: str) -> str:
        """Move a damaged artifact to damaged/. manifest: as it was seen; an artifact with another one stays.

        Returns where it is now; empty where it was replaced or moved meanwhile.
        """
        if self.read(f"{folder}/{MANIFEST}") != manifest:
            return ""
        kind, name = folder.split("/")[-2:]
        target = f"{self.root}/{DAMAGED}/{kind}/{name}-{uuid.uuid4().hex[:8]}"
        if not self._move(folder, target, manifest):
            return ""
        about = {"why": why, "when": time.time(), "was": folder}
        self.write(f"{target}/damaged.json", json.dumps(about).encode())
        return target

    def _move(self, folder: str, target: str, manifest: bytes | None) -> bool:
        """Move an artifact unless its manifest is another one by now."""
        os.makedirs(os.path.dirname(target), exist_ok=True)
        try:
            os.rename(folder, target)
        except FileNotFoundError:
            return False
        if self.read(f"{target}/{MANIFEST}") == manifest:
            return True
        with suppress(OSError):  # a new one came in between: move it back, unless another is there by now
            os.rename(target, folder)
        return False


def manifest_text(record: Stored, files: Mapping[str, FileEntry], payload: str) -> bytes:
    """A manifest as it is written. payload: the folder of the files, "" or with a slash at the end."""
    return json.dumps({**record, "files": files, "payload": payload}, indent=1, sort_keys=True).encode()


def _stat(path: str) -> os.stat_result | None:
    try:
        return os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as e:
        raise unreadable(path, e) from e


def _pulse(work: Path, ended: threading.Event) -> None:
    """Touch the folder now and then: one without a sign of life for a day is removed."""
    while not ended.wait(PULSE):
        with suppress(OSError):
            os.utime(work)
