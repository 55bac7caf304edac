"""Numbers that MLflow would not take are refused before they are stored; what an older store has blocks nobody."""

import json
import math
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient
from support.mlflow_runs import runs

from ctp import track
from ctp.cells.cell import Evaluate, Learn, key
from ctp.cells.events import Done, Progress, Started
from ctp.execution.execute import check_finite
from ctp.storage.ref import ref
from ctp.tracking.entries import name_problem, safe
from ctp.tracking.tracker import Tracker

BAD = ["recall@5", "acc,none", "acc%", "a(b)", "f1+", "a\n", "", "/a", "a/", "a//b", "../a", "a/./b", "x" * 251, "a[0]"]


@pytest.mark.parametrize("name", BAD)
def test_a_name_that_mlflow_does_not_take_is_refused_with_what_is_allowed(name):
    with pytest.raises(ValueError, match=r"the metric '.*allowed: ") as e:
        check_finite({"ppl": 1.0, name: 1.0})
    assert name[:40].strip() in str(e.value)
    assert name_problem(safe(name)) == ""


@pytest.mark.parametrize("name", ["ppl", "a/b", "top-5 acc.", "f1:macro", "é", "x" * 250])
def test_a_name_that_it_takes_stays(name, uri):
    check_finite({name: 1.0})
    assert safe(name) == name


@pytest.mark.parametrize(
    ("metrics", "error", "said"),
    [
        ({1: 1.0}, ValueError, "the metric 1"),
        ({"a": None}, TypeError, "'a' is None"),
        ({"a": "1"}, TypeError, "not an int or a float"),
        ({"a": True}, TypeError, "not an int or a float"),
        ({"a": math.inf}, FloatingPointError, "'a' is inf"),
        ({"a": math.nan}, FloatingPointError, "'a' is nan"),
        ({"a": 10**400}, FloatingPointError, "'a' is 1"),
        ({"seconds": 1.0}, ValueError, "'seconds' has the name of a number that ctp itself keeps"),
        ({}, ValueError, "at least one"),
        (None, ValueError, "numbers by name are needed"),
        ([1.0], ValueError, "numbers by name are needed"),
    ],
)
def test_what_is_no_number_is_refused(metrics, error, said):
    with pytest.raises(error, match=said):
        check_finite(metrics, least=1)


def changed(store, cell, **changes):
    """The manifest as an older ctp could have left it."""
    path = Path(store.folder(ref(cell)), "manifest.json")
    path.write_text(json.dumps({**json.loads(path.read_bytes()), **changes}))


def test_what_an_older_store_has_is_said_and_everything_else_written(copied, uri, capsys):
    odd, broken = copied.all(Evaluate)[:2]
    changed(copied.store, odd, metrics={"ppl": 2.5, "recall@5": 1.0, "none": None}, text={"a@b": 1})
    changed(copied.store, broken, created="yesterday")
    for _ in range(2):  # and said again by the next
        assert track.main(["sync", str(copied.plan.grid.path), "--store", copied.store.uri]) == 0
        told = capsys.readouterr().err.splitlines()
        assert len([x for x in told if "recall@5" in x and "which the store has" in x]) == 1
        assert len([x for x in told if x.startswith("MLflow does not take") and "recall@5" not in x]) == 1
    found = {r.data.tags["ctp.key"]: r for r in runs(uri)}
    assert set(found) == set(copied.plan.nodes)
    assert found[key(odd)].data.metrics["ppl"] == 2.5
    assert found[key(odd)].data.tags["ctp.a_b"] == "1"
    assert {k: r.info.status for k, r in found.items()} == {
        k: "FAILED" if k == key(broken) else "FINISHED" for k in found
    }


def test_an_event_that_mlflow_does_not_take_holds_nobody_up(copied, uri, monkeypatch):
    """Neither while the grid runs nor at its end; its run is closed, and it is said."""
    bad, log = key(copied.all(Learn)[0]), MlflowClient.log_batch
    tracker = Tracker(uri, copied.plan, copied.store)

    def picky(self, run_id, *more, **how):
        if run_id == tracker.experiment.runs().get(bad, type("no", (), {"run_id": ""})).run_id and how.get("metrics"):
            raise ValueError("Invalid value for a metric")
        log(self, run_id, *more, **how)

    monkeypatch.setattr(MlflowClient, "log_batch", picky)
    tracker.begin("test")
    tracker.tell(Started(bad))
    tracker.tell(Progress(key=bad, step=1, steps=9, loss=2.0))
    for k in copied.plan.nodes:
        tracker.tell(Done(k))
    tracker.close("FINISHED")
    assert not tracker.trouble
    [line] = tracker.refused.values()
    assert "Invalid value for a metric" in line
    assert {r.data.tags["ctp.key"]: r.info.status for r in runs(uri)} == {
        k: "FAILED" if k == bad else "FINISHED" for k in copied.plan.nodes
    }


def test_settings_by_any_name_and_however_many_are_logged(copied, uri, monkeypatch):
    many = {f"spec.a@{i}" if i % 2 else f"spec.a_{i}": "x" * 7000 for i in range(250)}
    monkeypatch.setattr("ctp.tracking.entries.params", lambda cell: many)
    tracker = Tracker(uri, copied.plan, copied.store)
    assert tracker.sync() == len(copied.plan.nodes)
    assert tracker.refused == {}
    assert len(runs(uri)[0].data.params) == 250
