"""MLflow's SQLite file: is it whole, and out of the way where it is not. The store has all that it held of a grid."""

import fcntl
import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from urllib.parse import quote

MAGIC = b"SQLite format 3\0"
BESIDE = ("-wal", "-shm", "-journal")  # what SQLite keeps beside a database that is open, or was when it was killed
TABLES = {"experiments", "runs"}


def damage(file: Path, whole: bool = False) -> str:
    """What makes the file no database that MLflow can go on with; empty where nothing does, or there is none.

    whole: every page is looked at. A database that is locked, or may not be read, is not called damaged.
    """
    try:
        with file.open("rb") as opened:
            head = opened.read(len(MAGIC))
    except OSError:
        return ""
    if head != MAGIC:
        return "it is no SQLite database" if head else "it is empty"
    try:
        with closing(sqlite3.connect(f"file:{quote(str(file))}?mode=rw", uri=True, timeout=5)) as db:
            tables = {row[0] for row in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            found = str(db.execute("PRAGMA quick_check(1)").fetchone()[0]) if whole else "ok"
    except sqlite3.OperationalError as e:
        return str(e) if "disk I/O error" in str(e) else ""
    except sqlite3.DatabaseError as e:
        return str(e)
    if found != "ok":
        return found.replace("\n", " ")
    return "tables of MLflow's are missing" if tables and not tables >= TABLES else ""


def set_aside(file: Path, whole: bool = False) -> str:
    """Move a damaged database out of the way; returns what to say, empty where it is not damaged."""
    with locked(file.parent):
        if not (why := damage(file, whole)):
            return ""
        to = file.with_name(f"{file.name}.damaged-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}")
        file.rename(to)
        for end in BESIDE:
            with suppress(FileNotFoundError):
                Path(f"{file}{end}").rename(f"{to}{end}")
    return f"MLflow's database {file} was damaged ({why}) and moved to {to}"


def clear(file: Path) -> None:
    """Remove what a database left that is gone: SQLite would write it into the next one of that name."""
    for end in BESIDE:
        Path(f"{file}{end}").unlink(missing_ok=True)


def mark(file: Path | None) -> tuple[int, int] | None:
    """By which it is known whether the file is still the one that was opened; None where there is none."""
    try:
        found = os.stat(file) if file else None
    except OSError:
        return None
    return (found.st_dev, found.st_ino) if found else None


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One process at a time in here, of those that make or move databases in the folder."""
    at = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(at, fcntl.LOCK_EX)
        yield
    finally:
        os.close(at)
