"""Where this machine keeps what can be made again: converted models, fetched artifacts, digests."""

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def cache_dir() -> Path:
    """CTP_CACHE, else `ctp` in the user's cache folder (XDG_CACHE_HOME)."""
    if own := os.environ.get("CTP_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ctp"


def fill(target: Path, make: Callable[[Path], None]) -> Path:
    """The folder `target`, made by `make(empty folder)` where it is missing. Atomic: a second maker drops its copy."""
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        make(work)
        work.rename(target)
    except OSError:
        if not target.exists():
            raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


def flush(folder: Path) -> None:
    """Wait until the disk holds every file in the folder, and the folders themselves: a power cut takes none of it."""
    for path in (*folder.rglob("*"), folder):
        flush_entry(path)


def flush_entry(path: str | Path) -> None:
    """Wait until the disk holds this file, or the names in this folder where the file system can tell."""
    at = os.open(path, os.O_RDONLY)
    try:
        os.fsync(at)
    except OSError as e:
        if e.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(at)


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `target` on a clean exit; after an error nothing is left of it.

    Raises ValueError where `target` holds something: nothing is overwritten.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} is not empty: nothing is overwritten")
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield work
        work.chmod(0o755)
        work.replace(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def write_json(path: Path, value: Any) -> None:
    """Write whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fd, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(fd, "w") as f:
            json.dump(value, f, indent=1, sort_keys=True)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def sha256_file(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def digest(files: list[Path]) -> str:
    """One digest of several files' names and bytes, remembered by path, size and time of change."""
    stats = [(str(f.resolve()), (s := f.stat()).st_size, s.st_mtime_ns) for f in files]
    memo = cache_dir() / "digests" / (hashlib.sha256(repr(stats).encode()).hexdigest() + ".json")
    if memo.exists():
        return str(json.loads(memo.read_text())["sha256"])
    whole = hashlib.sha256()
    for f in sorted(files, key=lambda f: f.name):
        whole.update(f"{f.name}\0{sha256_file(f)}\n".encode())
    write_json(memo, {"sha256": whole.hexdigest()})
    return whole.hexdigest()
