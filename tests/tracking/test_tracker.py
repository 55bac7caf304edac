"""MLflow holds what the store holds, once, and comes back from it."""

import json
import re
import shutil
import time
from importlib.metadata import version

import mlflow
import pandas as pd
import pytest
from mlflow.tracking import MlflowClient
from support.bench import Bench
from support.gridruns import runs

from analysis import attach, transfer_matrix
from analysis.runs import AnalysisError, evaluations
from ctp import track
from ctp.cells.cell import Evaluate, Learn, key
from ctp.cells.events import Done, Failed, Progress, Skipped, Started
from ctp.planning.graph import Plan
from ctp.storage.ref import ref
from ctp.tracking import entries
from ctp.tracking.entries import TrackError, tracking_uri
from ctp.tracking.tracker import Tracker


def test_sync_writes_each_cell_once(finished, uri):
    assert Tracker(uri, finished.plan, finished.store).sync() == 10
    assert Tracker(uri, finished.plan, finished.store).sync() == 0
    found = {r.data.tags["ctp.key"]: r for r in runs(uri)}
    assert set(found) == set(finished.plan.nodes)
    assert all(r.info.status == "FINISHED" for r in found.values())


@pytest.fixture
def asked(monkeypatch):
    """Every search for runs that is made."""
    searches, search = [], MlflowClient.search_runs

    def counted(self, experiments, filter_string="", **how):
        searches.append(filter_string)
        return search(self, experiments, filter_string, **how)

    monkeypatch.setattr(MlflowClient, "search_runs", counted)
    return searches


def test_where_nothing_changed_one_run_is_looked_at(finished, uri, asked):
    Tracker(uri, finished.plan, finished.store).sync(whole=True)
    asked.clear()
    assert Tracker(uri, finished.plan, finished.store).sync(whole=True, trust=True) == 0
    assert Tracker(uri, finished.plan, finished.store).sync(trust=True) == 0  # of a part: the whole was checked
    assert len(asked) == 4
    assert asked[::2] == ["attributes.status = 'RUNNING'"] * 2  # did an invocation die?
    assert all("ctp.key` = '" in a for a in asked[1::2])
    assert Tracker(uri, finished.plan, finished.store).sync(whole=True) == 0
    assert "ctp.key` = '" not in asked[-1]  # without trust all are read


def test_an_emptied_experiment_is_filled_whatever_it_says(finished, uri):
    Tracker(uri, finished.plan, finished.store).sync(whole=True)
    client = MlflowClient(uri)
    for run in runs(uri):
        client.delete_run(run.info.run_id)
    assert Tracker(uri, finished.plan, finished.store).sync(whole=True, trust=True) == 10
    assert len(runs(uri)) == 10
    client.delete_experiment(client.get_experiment_by_name("g").experiment_id)
    with pytest.raises(TrackError, match="the experiment 'g' was deleted and keeps its name: `mlflow experiments rest"):
        Tracker(uri, finished.plan, finished.store)


def test_a_check_of_a_part_says_nothing_of_runs_that_left(finished, uri, tmp_path, llama_folder):
    Tracker(uri, finished.plan, finished.store).sync(whole=True)
    other = Bench(tmp_path, llama_folder, compression=["dense"], sources=[])
    Tracker(uri, other.plan, finished.store).sync(trust=True)
    assert len(evaluations("g")) == 6
    Tracker(uri, other.plan, finished.store).sync(whole=True, trust=True)
    assert list(evaluations("g").target) == ["dense"]
    Tracker(uri, finished.plan, finished.store).sync(whole=True, trust=True)
    assert len(evaluations("g")) == 6


def test_a_trusted_experiment_takes_new_cells_once(finished, uri, asked):
    """Runs of failed cells are found again; those of finished ones are neither read nor written twice."""
    last = finished.all(Evaluate)[-1]
    kept = {k: n for k, n in finished.plan.nodes.items() if k != key(last)}
    before = Plan("g", finished.plan.grid, kept)
    tracker = Tracker(uri, before, finished.store)
    tracker.runs.fail(finished.plan.nodes[key(last)], "ValueError: no", "")
    tracker.sync(whole=True)
    again = Tracker(uri, before, finished.store)
    assert again.sync(whole=True, trust=True) == 0
    again.writer.plan = finished.plan
    asked.clear()
    again.begin("test")
    again.tell(Done(key(last)))
    again.close("FINISHED")
    assert [a for a in asked if "ctp.kind" in a and "FINISHED" not in a] == []
    found = runs(uri)
    assert len(found) == 10
    assert {r.info.status for r in found} == {"FINISHED"}
    assert not any("ctp.error" in r.data.tags for r in found)


def test_runs_hold_the_numbers_of_the_manifest_and_every_axis(finished, uri):
    Tracker(uri, finished.plan, finished.store).sync()
    found = {r.data.tags["ctp.key"]: r for r in runs(uri)}
    cell = next(c for c in finished.all(Evaluate) if c.recovery)
    run, metrics = found[key(cell)], finished.store.manifest(ref(cell))["metrics"]
    assert {n: run.data.metrics[n] for n in metrics} == metrics
    wanted = {"source": "gptq-3bit", "target": "dense", "dataset": "pydoc", "k": "4", "learned_on": "pydoc",
              "spec.recovery.recovery.lr": "0.01", "spec.measure.text.count": "4"}  # fmt: skip
    assert {n: run.data.params[n] for n in wanted} == wanted
    assert run.info.end_time - run.info.start_time == pytest.approx(
        1000 * finished.store.manifest(ref(cell))["seconds"], abs=2
    )


def test_learning_curves_are_replayed(finished, uri):
    Tracker(uri, finished.plan, finished.store).sync()
    cell = finished.all(Learn)[0]
    [run] = [r for r in runs(uri) if r.data.tags["ctp.key"] == key(cell)]
    curve = MlflowClient(uri).get_metric_history(run.info.run_id, "train/val_loss")
    history = json.loads((finished.store.fetch(ref(cell)) / "history.json").read_text())["history"]
    assert [(m.step, m.value) for m in curve] == [(p["step"], p["val_loss"]) for p in history]


def test_events_become_runs_and_a_failed_one_recovers(finished, uri):
    tracker = Tracker(uri, finished.plan, finished.store)
    learned = key(finished.all(Learn)[0])
    tracker.begin("test")
    tracker.tell(Started(learned))
    tracker.tell(Progress(key=learned, step=3, steps=9, loss=2.5, tokens_per_s=100.0))
    tracker.tell(Failed(learned, "ValueError: no", "here"))
    tracker.thread.stop()
    [run] = runs(uri)
    assert run.info.status == "FAILED"
    assert run.data.tags["ctp.error"] == "ValueError: no"
    assert run.data.metrics["train/loss"] == 2.5
    assert run.data.tags["mlflow.parentRunId"] == tracker.parent
    tracker.close("FAILED")
    after = {r.data.tags["ctp.key"]: r for r in runs(uri)}
    assert len(after) == 10
    assert after[learned].info.run_id == run.info.run_id
    assert after[learned].info.status == "FINISHED"
    assert MlflowClient(uri).get_run(tracker.parent).info.status == "FAILED"


def test_curves_have_one_point_a_step_however_often_it_was_told(finished, uri):
    """Live, told again after a resumption, and replayed from the history: all by one name, and each once."""
    cell = finished.all(Learn)[0]
    history = json.loads((finished.store.fetch(ref(cell)) / "history.json").read_text())["history"]
    told = [Progress(key=key(cell), steps=9, tokens_per_s=9.0, **p) for p in history]
    for last in (3, len(told)):  # the first invocation is cut off, the second one goes on from an earlier state
        tracker = Tracker(uri, finished.plan, finished.store)
        tracker.begin("test")
        tracker.tell(Started(key(cell)))
        for event in told[:last]:
            tracker.tell(event)
        tracker.thread.stop()
        assert not tracker.trouble
    [run] = runs(uri)
    assert "train/val_loss" in run.data.metrics  # before it is finished
    tracker.close("FINISHED")
    [run] = [r for r in runs(uri) if r.data.tags["ctp.key"] == key(cell)]
    for name in ("loss", "val_loss", "lr"):
        curve = MlflowClient(uri).get_metric_history(run.info.run_id, f"train/{name}")
        assert [(m.step, m.value) for m in curve] == [(p["step"], p[name]) for p in history if p[name] is not None]
    assert [n for n in run.data.metrics if "/" in n and not n.startswith("train/")] == []


def test_the_run_of_an_invocation_says_what_it_was_and_what_came_of_it(finished, uri):
    cells = [key(c) for c in finished.cells]
    half = Plan("g", finished.plan.grid, {k: n for k, n in finished.plan.nodes.items() if k in cells[:6]})
    tracker = Tracker(uri, half, finished.store)
    tracker.begin("python -m ctp.grid g --api-key=abcdefgh", cells=6)
    for event in (*map(Done, cells[:4]), Failed(cells[4], "ValueError: no"), Skipped(cells[5], "needs it")):
        tracker.tell(event)
    tracker.close("FAILED")
    client = MlflowClient(uri)
    run = client.get_run(tracker.parent)
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d g", run.info.run_name)
    assert {n: v for n, v in run.data.metrics.items() if n != "grid/seconds"} == {
        "grid/cells": 6, "grid/done": 4, "grid/failed": 1, "grid/skipped": 1}  # fmt: skip
    assert run.data.params["torch"] == version("torch")
    assert set(run.data.params) == {"host", "ctp", "torch", "transformers"}
    assert "abcdefgh" not in run.data.tags["ctp.command"]
    manifests = mlflow.artifacts.load_dict(f"runs:/{tracker.parent}/manifests.json")
    assert manifests == {k: finished.store.manifest(half.nodes[k].ref) for k in half.nodes}


def test_manifests_are_cut_at_a_limit(monkeypatch):
    one = json.dumps({"files": {}})
    whole, count = entries.document({"a": one, "b": one})
    assert count == 2
    assert json.loads(whole) == {"a": {"files": {}}, "b": {"files": {}}}
    monkeypatch.setattr(entries, "LARGEST", len(whole) - 9)
    cut, count = entries.document({"a": one, "b": one})
    assert (list(json.loads(cut)), count) == (["a"], 1)


def test_files_are_attached_to_the_newest_invocation(finished, uri, tmp_path):
    file = tmp_path / "report_g.html"
    file.write_text("first")
    with pytest.raises(AnalysisError, match="has no experiment 'g'"):
        attach.attach("g", {"report.html": file})
    Tracker(uri, finished.plan, finished.store).sync()  # as after MLflow was emptied: cells, and no invocation
    with pytest.raises(AnalysisError, match="has no run of an invocation of 'g': `ctp track sync g`"):
        attach.attach("g", {"report.html": file})
    both = [Tracker(uri, finished.plan, finished.store) for _ in range(2)]
    for tracker in both:
        tracker.begin("test")
        tracker.close("FINISHED")
    for text in ("first", "second"):
        file.write_text(text)
        attach.attach("g", {"report.html": file, "figures/a.png": file})
    found = [{f.path for f in MlflowClient(uri).list_artifacts(t.parent)} for t in both]
    assert found == [{"grid.yaml"}, {"grid.yaml", "report.html", "figures"}]
    assert mlflow.artifacts.load_text(f"runs:/{both[1].parent}/report.html") == "second"


def test_cells_that_left_the_grid_leave_the_matrix(finished, uri, tmp_path, llama_folder):
    Tracker(uri, finished.plan, finished.store).sync(whole=True)
    assert len(evaluations("g")) == 6
    other = Bench(tmp_path, llama_folder, compression=["dense"], sources=[])
    Tracker(uri, other.plan, finished.store).sync(whole=True)
    assert list(evaluations("g").target) == ["dense"]
    Tracker(uri, finished.plan, finished.store).sync(whole=True)
    assert len(evaluations("g")) == 6


def test_an_unreachable_server_is_said_in_seconds(finished, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(TrackError, match="cannot be reached"):
        Tracker("http://127.0.0.1:9", finished.plan, finished.store)


def test_track_sync_command(finished, uri, tmp_path, capsys):
    file = finished.plan.grid.path
    assert track.main(["sync", str(file), "--store", finished.store.uri]) == 0
    assert "10 runs written" in capsys.readouterr().out
    [parent] = mlflow.search_runs(
        experiment_names=["g"], filter_string="tags.`ctp.kind` = 'grid'", output_format="list"
    )
    assert "compression:" in mlflow.artifacts.load_text(f"{parent.info.artifact_uri}/grid.yaml")
    assert len(mlflow.artifacts.load_dict(f"{parent.info.artifact_uri}/manifests.json")) == 10
    assert set(parent.data.metrics) == {"grid/seconds"}  # it ran nothing
    assert track.main(["sync", str(file), "--store", finished.store.uri]) == 0
    assert len(mlflow.search_runs(experiment_names=["g"])) == 11  # a second time changes nothing
    assert track.main(["sync", str(tmp_path / "no.yaml")]) == 2


def test_matrix_equals_the_manifests(finished, uri, tmp_path, capsys):
    Tracker(uri, finished.plan, finished.store).sync()
    assert transfer_matrix.main(["g", "--csv", str(tmp_path / "m.csv")]) == 0
    assert "gptq-3bit prompt, k=4, pydoc" in capsys.readouterr().out
    table = evaluations("g")
    found = transfer_matrix.matrix(table, "ppl")
    assert list(found.index) == ["dense, no prompt", "no prompt", "gptq-3bit prompt, k=4, pydoc"]
    assert list(found.columns) == ["dense", "gptq-3bit", "sparsegpt-50-4bit"]
    for cell in finished.all(Evaluate):
        row = "gptq-3bit prompt, k=4, pydoc" if cell.recovery else "no prompt"
        assert found.loc[row, cell.target.compression.label] == finished.store.manifest(ref(cell))["metrics"]["ppl"]
    assert (found.loc["dense, no prompt"] == found.loc["no prompt", "dense"]).all()
    csv = (tmp_path / "m.csv").read_text().splitlines()
    assert len(csv) == 7
    assert transfer_matrix.main(["g", "--dataset", "nope"]) == 1
    assert "it has: pydoc" in capsys.readouterr().err


def test_the_readmes_three_lines(finished, uri):
    Tracker(uri, finished.plan, finished.store).sync()
    runs = mlflow.search_runs(
        experiment_names=["g"], filter_string="params.measure = 'perplexity' and tags.`ctp.current` = 'yes'"
    )
    axes = [f"params.{n}" for n in ("model", "dataset", "source", "k")]
    found = runs.pivot_table(index=axes, columns="params.target", values="metrics.ppl")
    ours = transfer_matrix.matrix(evaluations("g"), "ppl")
    assert found.loc[("tiny-llama", "pydoc", "none", "0"), "gptq-3bit"] == ours.loc["no prompt", "gptq-3bit"]


def test_two_runs_for_one_entry_are_an_error_not_a_mean(finished, uri, tmp_path, llama_folder):
    Tracker(uri, finished.plan, finished.store).sync()
    table = evaluations("g")
    double = table.assign(**{"spec.recovery.recovery.lr": "0.5"})
    import pandas as pd

    with pytest.raises(AnalysisError, match=r"differ in spec\.recovery\.recovery\.lr"):
        transfer_matrix.matrix(pd.concat([table, double]), "ppl")


@pytest.fixture
def server(monkeypatch):
    """MLflow's client asks this before each write; set `away` and it raises, as where the server is gone."""

    class Server:
        away, refused = False, 0

    def guard(name):
        real = getattr(MlflowClient, name)

        def call(self, *args, **how):
            if Server.away:
                Server.refused += 1
                raise ConnectionError("away")
            return real(self, *args, **how)

        monkeypatch.setattr(MlflowClient, name, call)

    for name in ("search_runs", "create_run", "log_batch", "set_tag", "update_run", "set_terminated", "log_text"):
        guard(name)
    return Server


def test_a_dead_server_never_holds_up_the_end(finished, uri, server):
    """After an error the thread waits before it tries again; closing writes all that was missed."""
    tracker = Tracker(uri, finished.plan, finished.store)
    tracker.begin("test")
    server.away = True
    learned = key(finished.all(Learn)[0])
    for step in range(50):
        tracker.tell(Progress(key=learned, step=step, steps=99, tokens_per_s=9.0))
    tracker.thread.stop()
    assert server.refused == 1
    assert "away" in tracker.trouble
    server.away = False
    tracker.close("FINISHED")
    assert len(runs(uri)) == 10
    [run] = [r for r in runs(uri) if r.data.tags["ctp.key"] == learned]
    assert len(MlflowClient(uri).get_metric_history(run.info.run_id, "train/tokens_per_s")) == 50


def test_what_waited_is_written_as_soon_as_the_server_is_back(finished, uri, server, monkeypatch):
    monkeypatch.setattr("ctp.tracking.background.PATIENCE", (0.1, 0.2))
    tracker = Tracker(uri, finished.plan, finished.store)
    tracker.begin("test")
    server.away = True
    for cell in finished.cells:
        tracker.tell(Done(key(cell)))
    end = time.monotonic() + 20
    while server.refused < 3 and time.monotonic() < end:
        time.sleep(0.05)
    assert runs_now(uri, server) == []
    server.away = False
    while len(runs(uri)) < 10 and time.monotonic() < end:
        time.sleep(0.1)
    assert len(runs(uri)) == 10
    assert tracker.trouble
    tracker.close("FINISHED")
    assert {r.info.status for r in runs(uri)} == {"FINISHED"}


def runs_now(uri, server):
    """The runs that are there while the server is away from others."""
    server.away, away = False, server.away
    try:
        return runs(uri)
    finally:
        server.away = away


def test_an_event_that_a_living_server_does_not_take_holds_nobody_up(finished, uri, monkeypatch):
    monkeypatch.setattr("ctp.tracking.background.PATIENCE", (0.05, 0.05))
    tracker = Tracker(uri, finished.plan, finished.store)
    handle, bad = tracker._handle, key(finished.cells[0])

    def picky(event):
        if event.key == bad:
            raise ValueError("no such metric name")
        handle(event)

    monkeypatch.setattr(tracker, "_handle", picky)
    tracker.begin("test")
    for cell in finished.cells[:3]:
        tracker.tell(Done(key(cell)))
    end = time.monotonic() + 20
    while len(runs(uri)) < 2 and time.monotonic() < end:
        time.sleep(0.05)
    assert {r.data.tags["ctp.key"] for r in runs(uri)} == {key(c) for c in finished.cells[1:3]}
    tracker.close("FINISHED")
    assert len(runs(uri)) == 10


def test_no_database_is_made_by_asking(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert transfer_matrix.main(["g"]) == 1
    assert "there is no MLflow database" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_nothing_to_read_is_said(uri):
    with pytest.raises(AnalysisError, match="no experiment 'nope'"):
        evaluations("nope")


def test_default_database_lies_beside_the_store(monkeypatch, tmp_path):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert tracking_uri(str(tmp_path / "r" / "store")) == f"sqlite:///{tmp_path}/r/mlflow.db"
    monkeypatch.chdir(tmp_path)
    assert tracking_uri("s3://bucket/store") == f"sqlite:///{tmp_path}/results/mlflow.db"


def test_several_seeds_are_a_mean_and_its_spread(finished, uri):
    Tracker(uri, finished.plan, finished.store).sync()
    table = evaluations("g")
    again = table[table.source != "none"].assign(seed="1", ppl=lambda t: t.ppl + 2)
    shown = transfer_matrix.spread(pd.concat([table, again]), "ppl")
    prompted = table[(table.source != "none") & (table.target == "dense")].ppl.iloc[0]
    assert shown.at["gptq-3bit prompt, k=4, pydoc", "dense"] == f"{prompted + 1:.2f} ± 1.41 (2)"
    assert "±" not in shown.loc["no prompt", "dense"]


def test_matrix_survives_an_emptied_mlflow(finished, uri, tmp_path, monkeypatch):
    Tracker(uri, finished.plan, finished.store).sync()
    before = transfer_matrix.matrix(evaluations("g"), "ppl")
    again = f"sqlite:///{tmp_path / 'again.db'}"
    mlflow.set_tracking_uri(again)
    Tracker(again, finished.plan, finished.store).sync()
    assert transfer_matrix.matrix(evaluations("g"), "ppl").equals(before)
    shutil.rmtree(tmp_path / "mlartifacts", ignore_errors=True)


def test_runs_say_what_they_may_be_compared_with(finished, uri):
    """A run that an older ctp wrote gets the tags by the next sync; a study that was renamed is renamed there too."""
    Tracker(uri, finished.plan, finished.store).sync()
    before = {r.data.tags["ctp.key"]: r for r in runs(uri)}
    evaluations_ = [before[key(c)] for c in finished.all(Evaluate)]
    for name in ("ctp.data", "ctp.protocol"):
        assert len({r.data.tags[name] for r in evaluations_}) == 1
        assert len(evaluations_[0].data.tags[name]) == 12
    client, one = MlflowClient(uri), evaluations_[0].info.run_id
    assert client.list_artifacts(one) == []  # a perplexity's only file repeats its metrics
    client.delete_tag(one, "ctp.data")
    client.set_tag(one, "ctp.studies", "old")
    assert Tracker(uri, finished.plan, finished.store).sync() == 0
    tags = client.get_run(one).data.tags
    assert (tags["ctp.data"], tags["ctp.studies"]) == (evaluations_[1].data.tags["ctp.data"], "g")


def test_data_and_protocol_tell_other_texts_from_other_ways_of_asking():
    from ctp.cells import Dense, Perplexity, Task
    from ctp.cells.cell import Compress
    from ctp.cells.labels import fingerprints

    target = Compress(model={"name": "m", "revision": "r"}, compression=Dense())

    def prints(method, **fields):
        found = fingerprints(Evaluate(target=target, measure=method(**fields)))
        return found["data"], found["protocol"]

    text = {"dataset": "c4", "split": "validation", "seq_len": 1024, "revision": "a"}
    base = prints(Perplexity, text=text)
    other, longer = (prints(Perplexity, text=text | c) for c in ({"revision": "b"}, {"seq_len": 2048}))
    assert (other[0] != base[0], other[1]) == (True, base[1])
    assert (longer[0], longer[1] != base[1]) == (base[0], True)
    zero, five = prints(Task, name="piqa", revision="r"), prints(Task, name="piqa", revision="r", shots=5)
    assert (zero[0], zero[1] != five[1]) == (five[0], True)
