"""Folders with any name: MLflow's database is beside the store, whatever a URL makes of its characters."""

import os

import pytest
from support.tinytasks import own_task

from analysis.runs import existing
from ctp.data import tasks
from ctp.evaluation.tasks import build
from ctp.storage.store import Store
from ctp.tracking.entries import sqlite_file, tracking_uri
from ctp.tracking.experiment import Experiment


@pytest.mark.parametrize("name", ["a?b=c&uri=true", "100% #1 %41 ü;'"])
def test_mlflows_database_is_beside_the_store(tmp_path, monkeypatch, name):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    here = tmp_path / name
    (here / "results").mkdir(parents=True)
    monkeypatch.chdir(here)
    uri = tracking_uri(Store("results/store").uri)
    runs = Experiment(uri, "g")
    run = runs.client.create_run(runs.id).info.run_id
    runs.client.log_text(run, "all there", "a.txt")
    assert [f.path for f in runs.client.list_artifacts(run)] == ["a.txt"]
    assert os.listdir(tmp_path) == [name]
    assert {"mlflow.db", "mlartifacts"} <= set(os.listdir(here / "results"))
    assert existing(uri) == uri
    assert sqlite_file(uri) == here / "results" / "mlflow.db"
    assert Experiment(uri, "g").id == runs.id


def test_a_plain_folder_has_a_plain_address(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert tracking_uri(str(tmp_path / "store")) == f"sqlite:///{tmp_path / 'mlflow.db'}"
    assert sqlite_file("sqlite:///results/mlflow.db?timeout=5").name == "mlflow.db"
    assert sqlite_file("http://localhost:5000") is None


def test_a_tasks_rows_are_those_of_its_own_folder(tmp_path):
    """`datasets` takes * ? [ in a path for wildcards."""
    for name, rows in (("axb", 3), ("a*b", 4), ("a?b[c]", 5)):
        task = own_task(tmp_path / name, rows=rows)
        _, revision, location = tasks.locate(task)
        assert len(build(location, revision, 0).dataset["test"]) == rows
    with pytest.raises(ValueError, match="a folder with '::' in its name"):
        tasks.locate(own_task(tmp_path / "a::b"))
