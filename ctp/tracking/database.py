"""MLflow's SQLite file: made, checked, and moved aside where it is damaged. The store has all that was in it."""

import fcntl
import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from urllib.parse import quote

from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

from ctp.tracking.entries import sqlite_uri

BESIDE = ("-wal", "-shm", "-journal")  # what SQLite keeps beside a database that is open, or was when it was killed
TABLES = {"experiments", "runs"}


def damage(file: Path, whole: bool = False) -> str:
    """Why MLflow cannot use the file; empty where it can, or there is no file.

    whole: every page is checked. A database that is locked, or may not be read, is not called damaged.
    """
    try:
        if not os.stat(file).st_size:
            return "it is empty"
    except OSError:
        return ""
    # Only SQLite opens the file here: a process that closes a descriptor of its own loses SQLite's locks on it, and
    # another process then removes the WAL as if it were the last to close the database.
    try:
        with closing(sqlite3.connect(f"file:{quote(str(file))}?mode=rw", uri=True, timeout=5)) as db:
            tables = {row[0] for row in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            found = str(db.execute("PRAGMA quick_check(1)").fetchone()[0]) if whole else "ok"
    except sqlite3.OperationalError as e:
        return str(e) if "disk I/O error" in str(e) else ""
    except sqlite3.DatabaseError as e:
        return "it is no SQLite database" if "not a database" in str(e) else str(e)
    if found != "ok":
        return found.replace("\n", " ")
    return "tables of MLflow's are missing" if tables and not tables >= TABLES else ""


def set_aside(file: Path, whole: bool = False) -> str:
    """Move a damaged database out of the way; returns a sentence for the user, empty where it is not damaged."""
    with _locked(file.parent):
        if not (why := damage(file, whole)):
            return ""
        to = file.with_name(f"{file.name}.damaged-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}")
        file.rename(to)
        for end in BESIDE:
            with suppress(FileNotFoundError):
                Path(f"{file}{end}").rename(f"{to}{end}")
    return f"MLflow's database {file} was damaged ({why}) and moved to {to}"


def make(file: Path) -> None:
    """A new SQLite file where there is none, made by one process while others wait, in WAL mode (3 times as fast).

    MLflow needs a second for its tables and cannot use half of them, so the file gets its name when it is complete.
    """
    if file.exists():
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    with _locked(file.parent):
        if file.exists():
            return
        new = file.with_name(f"{file.name}.making")
        for leftover in file.parent.glob(f"{new.name}*"):
            leftover.unlink()
        SqlAlchemyStore(sqlite_uri(new), (file.parent / "mlartifacts").absolute().as_uri()).engine.dispose()
        with closing(sqlite3.connect(new)) as db:
            db.execute("PRAGMA journal_mode=WAL")
        for end in BESIDE:  # of a database that is gone: SQLite would write them into the new one
            Path(f"{file}{end}").unlink(missing_ok=True)
        new.rename(file)


def mark(file: Path | None) -> tuple[int, int] | None:
    """Tells whether the file is still the one that was opened; None where there is none."""
    try:
        found = os.stat(file) if file else None
    except OSError:
        return None
    return (found.st_dev, found.st_ino) if found else None


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Only one process at a time makes or moves databases in the folder."""
    at = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(at, fcntl.LOCK_EX)
        yield
    finally:
        os.close(at)
