"""MLflow's SQLite file removed or damaged, before or while a grid runs: said in one line, made anew from the store."""

import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from support.gridruns import runs

from ctp.cells.cell import key
from ctp.cells.events import Done
from ctp.tracking import database as files
from ctp.tracking.entries import TrackError, sqlite_file
from ctp.tracking.tracker import Tracker


def garbage(file):
    file.write_bytes(b"no database at all" * 1000)


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def scrambled(file):
    data = file.read_bytes()
    file.write_bytes(data[:4096] + bytes(len(data) - 4096))


def removed(file):
    """And what SQLite kept beside it stays."""
    file.unlink()


def dropped(file):
    with sqlite3.connect(file) as db:
        db.execute("DROP TABLE runs")


def beside(file):
    return Path(str(file).removeprefix("sqlite:///"))


def all_there(uri, plan):
    found = runs(uri)
    assert {r.data.tags["ctp.key"] for r in found} == set(plan.nodes)
    assert {r.info.status for r in found} == {"FINISHED"}


@pytest.mark.parametrize("damage", [garbage, cut, dropped])
def test_a_database_that_was_damaged_before_is_made_anew(finished, uri, damage):
    file = beside(uri)
    Tracker(uri, finished.plan, finished.store).sync()
    damage(file)
    tracker = Tracker(uri, finished.plan, finished.store)
    tracker.sync(whole=True, trust=True)
    [line] = tracker.notes
    assert f"MLflow's database {file} was damaged" in line
    assert len(list(file.parent.glob("mlflow.db.damaged-*[0-9]"))) == 1
    all_there(uri, finished.plan)
    again = Tracker(uri, finished.plan, finished.store)
    assert again.sync(whole=True, trust=True) == 0
    assert again.notes == []


@pytest.mark.parametrize("damage", [removed, scrambled])
def test_a_database_that_is_lost_while_a_grid_runs_is_made_anew(finished, uri, damage):
    file, tracker = beside(uri), Tracker(uri, finished.plan, finished.store)
    tracker.begin("test")
    keys = [key(c) for c in finished.cells]
    tracker.tell(Done(keys[0]))
    tracker.thread.stop()
    damage(file)
    for k in keys[1:]:
        tracker.tell(Done(k))
    tracker.close("FINISHED")
    [line] = tracker.notes
    assert ("was removed or replaced while" if damage is removed else "was damaged") in line
    all_there(uri, finished.plan)
    assert tracker.client.get_run(tracker.parent).info.status == "FINISHED"
    assert Tracker(uri, finished.plan, finished.store).notes == []


def test_what_a_removed_database_left_beside_it_does_not_enter_the_next(finished, uri):
    file = beside(uri)
    Tracker(uri, finished.plan, finished.store).sync()
    open_one = sqlite3.connect(file)
    open_one.execute("SELECT count(*) FROM runs").fetchall()
    shutil.copy(f"{file}-wal", f"{file}.kept")
    file.unlink()
    open_one.close()
    Path(f"{file}.kept").rename(f"{file}-wal")
    tracker = Tracker(uri, finished.plan, finished.store)
    tracker.experiment.renew()
    tracker.sync()
    all_there(uri, finished.plan)
    assert files.damage(file, whole=True) == ""


def test_a_database_that_is_locked_or_may_not_be_read_is_not_called_damaged(uri, monkeypatch):
    file = beside(uri)
    holder = sqlite3.connect(file)
    holder.execute("BEGIN EXCLUSIVE")
    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *a, **how: connect(*a, **{**how, "timeout": 0.1}))
    assert files.damage(file, whole=True) == ""
    holder.close()
    monkeypatch.setattr(Path, "open", lambda *a, **how: (_ for _ in ()).throw(PermissionError(13, "no")))
    assert files.damage(file) == ""


def test_a_check_keeps_sqlites_locks_on_the_file(uri):
    """A process that closes any descriptor of a file loses all its locks on it. Another process that then closes the
    database takes itself for the last one and removes the WAL, and the next access here is a disk I/O error."""
    file, wal = beside(uri), beside(f"{uri}-wal")
    close = "import sqlite3, sys; db = sqlite3.connect(sys.argv[1]); db.execute('SELECT 1 FROM runs'); db.close()"
    with closing(sqlite3.connect(file)) as db:
        db.execute("SELECT count(*) FROM runs").fetchone()
        assert wal.exists()
        assert files.damage(file, whole=True) == ""
        subprocess.run([sys.executable, "-c", close, str(file)], check=True)
        assert wal.exists()


def test_a_server_is_never_taken_for_a_file(finished, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    assert sqlite_file("http://127.0.0.1:9") is None
    with pytest.raises(TrackError, match="cannot be reached"):
        Tracker("http://127.0.0.1:9", finished.plan, finished.store)
