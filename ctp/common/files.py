"""This machine's cache, files and folders that are written whole or not at all, hashes, and paths."""

import errno
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def cache_dir() -> Path:
    """CTP_CACHE, else `ctp` in the user's cache folder (XDG_CACHE_HOME)."""
    chosen = os.environ.get("CTP_CACHE")
    return Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ctp"


@contextmanager
def _beside(target: Path) -> Iterator[Path]:
    """An empty folder next to `target`; what is left of it on the way out is removed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def fill(target: Path, make: Callable[[Path], None]) -> Path:
    """The folder `target`, made by `make(empty folder)` where it is missing. Atomic: a second maker drops its copy."""
    if target.exists():
        return target
    with _beside(target) as work:
        try:
            make(work)
            work.rename(target)
        except OSError:
            if not target.exists():
                raise
    return target


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `target` on a clean exit; after an error nothing is left of it.

    Raises ValueError where `target` holds something: nothing is overwritten.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} is not empty: nothing is overwritten")
    with _beside(target) as work:
        yield work
        work.chmod(0o755)
        work.replace(target)


@contextmanager
def new_file(target: Path) -> Iterator[Path]:
    """A path to write to, which becomes `target` on a clean exit; after an error nothing is left of it."""
    with _beside(target) as work:
        yield work / target.name
        (work / target.name).replace(target)


def write_json(path: Path, value: Any) -> None:
    """Write whole or not at all."""
    with new_file(path) as work:
        work.write_text(json.dumps(value, indent=1, sort_keys=True))


def flush(folder: Path) -> None:
    """Wait until every file in the folder, and the folders themselves, are safe from a power cut."""
    for path in (*folder.rglob("*"), folder):
        flush_entry(path)


def flush_entry(path: str | Path) -> None:
    """Wait until this file, or the names in this folder, are on the disk, where the file system supports that."""
    at = os.open(path, os.O_RDONLY)
    try:
        os.fsync(at)
    except OSError as e:
        if e.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(at)


def sha256_file(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


Stamp = tuple[str, int, int, int, int, int]
# Nanoseconds: file systems keep times in steps of up to two seconds, and a second write within one shows no change.
SETTLED = 2e9
_digests: dict[tuple[str, tuple[Stamp, ...]], str] = {}  # of this process


def stamps(files: Iterable[Path]) -> tuple[Stamp, ...]:
    """Of each file: resolved path, device, inode, size, times of writing and of change, in nanoseconds since 1970.

    The time of change (ctime) cannot be set, so that a file unpacked over another with the same size and times differs.
    Raises OSError where a file is missing.
    """
    found = ((f, f.stat()) for f in files)
    return tuple((str(f.resolve()), s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for f, s in found)


def settled(seen: tuple[Stamp, ...], now: int) -> bool:
    """Would a write after `now` (nanoseconds since 1970) show in the stamps?"""
    return all(stamp[-1] < now - SETTLED for stamp in seen)


def hashed_once(what: str, files: Sequence[Path], compute: Callable[[], str]) -> str:
    """compute(), a hash of the files of the kind `what`, remembered in this process by their `stamps`.

    Raises ValueError where a file changes meanwhile.
    """
    before, begun = stamps(files), time.time_ns()
    if (known := _digests.get((what, before))) is not None:
        return known
    found = compute()
    if stamps(files) != before:
        raise ValueError(f"{files[0].parent} changes while it is read: wait until it is whole, and run again")
    if settled(before, begun):
        _digests[what, before] = found
    return found


def digest(files: Sequence[Path], anew: bool = False) -> str:
    """One digest of several files' names and bytes, remembered by `stamps`, on this machine and in this process.

    anew: trust only what this process has hashed itself. Raises ValueError where a file changes meanwhile.
    """
    here = "files", stamps(files)
    memo = cache_dir() / "digests" / (hashlib.sha256(repr(here[1]).encode()).hexdigest() + ".json")
    known = here in _digests
    if not known and not anew and memo.exists():
        return str(json.loads(memo.read_text())["sha256"])
    found = hashed_once("files", files, lambda: _digest(files))
    if here in _digests and not known:
        write_json(memo, {"sha256": found})
    return found


def _digest(files: Sequence[Path]) -> str:
    whole = hashlib.sha256()
    for f in sorted(files, key=lambda f: f.name):
        whole.update(f"{f.name}\0{sha256_file(f)}\n".encode())
    return whole.hexdigest()


class Changed(ValueError):
    """What is read is not what was pinned."""


def check_same(what: str, revision: str, files: Callable[[], Sequence[Path]]) -> None:
    """Raises Changed, naming `what`, unless the digest of the files that `files` finds is `revision`."""
    found: Sequence[Path] = ()
    try:
        found = files()
        if not found or "sha256:" + digest(found, anew=True) == revision:
            return
    except OSError as e:
        raise changed(what, f"{e.filename or ''}: {e.strerror or e}") from e
    raise changed(what, f"last written: {max(found, key=lambda f: f.stat().st_ctime_ns).name}")


def changed(what: str, why: str) -> Changed:
    """The error for what has changed since it was pinned, in one sentence."""
    return Changed(f"{what} has changed since it was pinned ({why}): run again, which computes what depends on it anew")


def expanded(text: str | Path) -> Path:
    """The path, `~` replaced where there is such a user."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        return Path(text)


def there(path: Path) -> bool:
    """Is there something at the path?"""
    try:
        return path.exists()
    except (OSError, ValueError):  # too long, a null byte
        return False


def folder_named(text: str) -> Path | None:
    """The folder that a text names, None where there is none."""
    path = expanded(text)
    return path if text and there(path) and path.is_dir() else None
