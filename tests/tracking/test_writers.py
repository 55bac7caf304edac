"""Invocations that died, and several at once: MLflow ends with one run a cell, and none that is left running."""

import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlflow
import pytest
from mlflow.tracking import MlflowClient
from support.bench import Bench
from support.mlflow_runs import runs

from analysis import transfer_matrix
from analysis.runs import evaluations
from ctp.cells.cell import Learn, key, to_json
from ctp.cells.events import Done, Progress, Started
from ctp.machine import process
from ctp.storage.ref import ref
from ctp.tracking.database import make
from ctp.tracking.entries import PARENT
from ctp.tracking.experiment import FEW
from ctp.tracking.tracker import Tracker


def died(uri, plan, store, learning=(), tags=()):
    """An invocation that began, was learning these cells, and is no more; returns its run."""
    tracker = Tracker(uri, plan, store)
    tracker.begin("test")
    tracker.thread.stop()
    for cell in learning:
        tracker._handle(Started(key(cell)))
    for name, value in dict(tags or {"ctp.owner": f"{process._machine()} {2**22 + 1} 17"}).items():
        tracker.client.set_tag(tracker.parent, name, value)
    return tracker.parent


def statuses(uri):
    """Of the runs of invocations, by id; of cells, by key."""
    client = MlflowClient(uri)
    every = client.search_runs([client.get_experiment_by_name("g").experiment_id])
    return {r.data.tags.get("ctp.key", r.info.run_id): r.info.status for r in every}


def test_what_a_dead_invocation_left_running_is_ended(finished, uri, tmp_path, llama_folder):
    unfinished = Bench(tmp_path / "none", llama_folder)  # the same cells, nothing done
    learned = finished.all(Learn)
    parent = died(uri, unfinished.plan, unfinished.store, learned)
    assert statuses(uri) == {parent: "RUNNING", key(learned[0]): "RUNNING"}
    tracker = Tracker(uri, unfinished.plan, unfinished.store)
    assert (tracker.sync(), tracker.ended) == (0, 2)
    assert statuses(uri) == {parent: "KILLED", key(learned[0]): "KILLED"}
    died(uri, finished.plan, finished.store, learned)
    assert Tracker(uri, finished.plan, finished.store).sync() == 10  # by now all is done
    assert sorted(statuses(uri).values()) == ["FINISHED"] * 10 + ["KILLED"] * 2


def test_no_trust_where_an_invocation_died(finished, uri):
    """It may have left a run twice, in an experiment that says it was checked."""
    Tracker(uri, finished.plan, finished.store).sync(whole=True)
    cell = finished.cells[-1]
    twin = Tracker(uri, finished.plan, finished.store)
    twin.experiment._runs = {}
    twin.runs.finish(finished.plan.nodes[key(cell)])
    assert len(runs(uri)) == 11
    assert Tracker(uri, finished.plan, finished.store).sync(whole=True, trust=True) == 0
    assert len(runs(uri)) == 11  # it looks at one run only
    died(uri, finished.plan, finished.store, finished.all(Learn))
    Tracker(uri, finished.plan, finished.store).sync(whole=True, trust=True)
    assert len(runs(uri)) == 10
    assert sorted(statuses(uri).values()) == ["FINISHED"] * 10 + ["KILLED"]


@pytest.mark.parametrize(("age", "status"), [(10, "RUNNING"), (3600, "KILLED")])
def test_an_invocation_on_another_machine_lives_as_long_as_it_says(finished, uri, age, status, monkeypatch):
    now = time.time()
    monkeypatch.setattr("time.time", lambda: now - 2 * 3600)
    parent = died(uri, finished.plan, finished.store, tags={"ctp.owner": "elsewhere/b/pid:[1] 17 4"})
    monkeypatch.setattr("time.time", lambda: now)
    MlflowClient(uri).set_tag(parent, "ctp.alive", str(int(now - age)))
    Tracker(uri, finished.plan, finished.store).sync()
    assert statuses(uri)[parent] == status
    if status == "KILLED":
        assert MlflowClient(uri).get_run(parent).info.end_time == 1000 * int(now - age)


def test_a_living_invocation_keeps_its_cells(finished, uri, tmp_path, llama_folder):
    unfinished = Bench(tmp_path / "none", llama_folder)
    [learned] = finished.all(Learn)
    first = died(uri, unfinished.plan, unfinished.store, [learned])
    living = Tracker(uri, unfinished.plan, unfinished.store)
    living.begin("test")
    living._handle(Started(key(learned)))  # takes over what the dead one was at
    Tracker(uri, unfinished.plan, unfinished.store).sync(whole=True)
    assert statuses(uri) == {first: "KILLED", living.parent: "RUNNING", key(learned): "RUNNING"}
    assert runs(uri)[0].data.tags[PARENT] == living.parent
    living.close("KILLED")
    assert set(statuses(uri).values()) == {"KILLED"}


def test_signs_of_life(monkeypatch):
    tags, now = process.signs(), time.time()
    assert process.is_alive(tags, 0.0)
    machine, pid, start = tags["ctp.owner"].split(" ")
    for other in (f"{machine} {pid} 1{start}", f"{machine} {2**22 + 1} {start}"):  # the process id of another one now
        assert not process.is_alive({**tags, "ctp.owner": other}, now)
    assert process.is_alive({"ctp.owner": "elsewhere 1 2", "ctp.alive": str(int(now))}, 0.0)
    assert not process.is_alive({}, now - process.DEAD_SECONDS - 1)  # as ctp wrote them once
    assert process.is_alive({}, now)


def test_a_process_of_which_only_the_exit_code_is_left_is_dead():
    child = subprocess.Popen(["true"])
    end = time.monotonic() + 10
    while process._started(child.pid) and time.monotonic() < end:
        time.sleep(0.01)
    assert Path(f"/proc/{child.pid}").exists()
    assert process._started(child.pid) == ""
    child.wait()


@pytest.mark.parametrize("few", [FEW, 0])
def test_two_drivers_at_once_leave_one_run_a_cell(finished, uri, monkeypatch, few):
    """Each has read the experiment before the other wrote; whoever closes last sees both runs of a cell."""
    monkeypatch.setattr("ctp.tracking.experiment.FEW", few)
    both = [Tracker(uri, finished.plan, finished.store) for _ in range(2)]
    for tracker in both:
        assert tracker.experiment.runs() == {}
    learned, rest = finished.all(Learn)[0], finished.cells
    for tracker in both:
        tracker.begin("test")
        tracker._handle(Started(key(learned)))
    for tracker in both:
        for cell in rest:
            tracker.tell(Done(key(cell)))
        tracker.thread.stop()
    twice = runs(uri)
    assert len(twice) == 20
    for tracker in both:
        tracker.close("FINISHED")
    assert len(runs(uri)) == 10
    assert {r.info.run_id for r in runs(uri)} == {
        min(r.info.run_id for r in twice if r.data.tags["ctp.key"] == k) for k in finished.plan.nodes
    }
    assert set(statuses(uri).values()) == {"FINISHED"}
    assert Tracker(uri, finished.plan, finished.store).sync(whole=True) == 0
    transfer_matrix.matrix(evaluations("g"), "ppl")  # raises where an entry is there twice


def test_a_run_deleted_while_it_is_written_is_found_again(finished, uri, monkeypatch):
    monkeypatch.setattr("ctp.tracking.background.PATIENCE", (0.05, 0.05))
    tracker, learned = Tracker(uri, finished.plan, finished.store), finished.all(Learn)[0]
    tracker.begin("test")
    tracker._handle(Started(key(learned)))
    mine = tracker.experiment.runs()[key(learned)].run_id
    other = Tracker(uri, finished.plan, finished.store)
    other.experiment._runs = {}
    other._handle(Started(key(learned)))
    tracker.client.delete_run(mine)
    tracker.tell(Progress(key=key(learned), step=3, steps=9, loss=2.5))
    tracker.close("FINISHED")
    [run] = [r for r in runs(uri) if r.data.tags["ctp.key"] == key(learned)]
    assert run.info.status == "FINISHED"
    told = {m.step: m.value for m in MlflowClient(uri).get_metric_history(run.info.run_id, "train/loss")}
    assert told[3] == 2.5


def test_failures_come_back_into_an_emptied_mlflow(finished, uri, tmp_path, llama_folder):
    bench = Bench(tmp_path / "none", llama_folder)
    cell = bench.cells[0]
    bench.store.failures.record(ref(cell), to_json(cell), "ValueError: no such text", "Traceback: here")
    assert Tracker(uri, bench.plan, bench.store).sync(whole=True) == 1
    assert Tracker(uri, bench.plan, bench.store).sync(whole=True) == 0
    [run] = runs(uri)
    assert (run.info.status, run.data.tags["ctp.error"]) == ("FAILED", "ValueError: no such text")
    assert mlflow.artifacts.load_text(f"{run.info.artifact_uri}/traceback.txt") == "Traceback: here"
    Tracker(uri, bench.plan, finished.store).sync(whole=True)  # it has been done since
    assert set(statuses(uri).values()) == {"FINISHED"}
    assert not any("ctp.error" in r.data.tags for r in runs(uri))


def test_a_database_whose_maker_was_killed_is_made_anew(tmp_path):
    (tmp_path / "mlflow.db.making").write_bytes(b"SQLite format 3, or the first half of it")
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(make, [tmp_path / "mlflow.db"] * 2))
    assert [p.name for p in tmp_path.iterdir()] == ["mlflow.db"]
    assert MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}").search_experiments()
