"""What another terminal sees of a run, what a run says at its end."""

import json
import platform
import socket
import threading
import time

import pytest
from support.atwork import at_work, graph, learned, listening, store  # noqa: F401 (fixtures)

from ctp import grid as command
from ctp.cells.cell import Evaluate, to_json
from ctp.cells.labels import slug
from ctp.console import heartbeat, pages, status, summary
from ctp.console.board import Board
from ctp.console.summary import Recovery, recoveries
from ctp.planning.states import Outcome
from ctp.storage import drivers
from ctp.storage.ref import identity, ref
from ctp.storage.store import Store


def wait_for(condition):
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_the_board_knows_pace_and_counts(graph):
    said = at_work(graph).snapshot()
    assert (said["total"], said["done"], said["failed"], said["skipped"]) == (10, 1, 1, 0)
    [cell] = said["cells"]
    assert cell["name"] == slug(graph.nodes[learned(graph)].cell)
    assert (cell["step"], cell["steps"], cell["loss"], cell["tokens_per_s"]) == (30, 100, 3.5, 99.0)
    assert cell["left"] == pytest.approx(70 * 10 / 20, rel=0.05)  # 20 steps in the ten seconds; some ms to tell


def test_status_of_a_run_from_elsewhere_while_it_lasts(graph, store):
    with heartbeat.beating(store, at_work(graph), {"mlflow": "http://u:secretpw@host:5000"}, seconds=0.05):
        wait_for(lambda: drivers.records(store, "g"))
        said = status.status(graph, Store(store.uri))
        text = "\n".join(status.lines(said))
    assert [d["state"] for d in said["drivers"]] == ["alive"]
    assert said["kinds"]["learn"] == {"running": 1}
    assert "2 of 10 cells ended; last sign" in text
    assert "step 30/100, loss 3.500, 99 tokens/s, about 35" in text
    assert "secretpw" not in json.dumps(said)
    assert not store.folders.glob("running", "*")  # gone with the run
    assert "No run of this grid" in "\n".join(status.lines(status.status(graph, store)))


def dead_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def test_a_page_is_named_where_it_answers(listening):
    port, dead = listening[0], dead_port()
    assert pages.where("Ray", f"http://127.0.0.1:{port}") == f"Ray: http://127.0.0.1:{port}"
    assert pages.where("MLflow", f"http://u:secretpw@localhost:{port}/x") == f"MLflow: http://***@localhost:{port}/x"
    assert pages.where("Ray", f"http://127.0.0.1:{dead}") == f"Ray: no answer from 127.0.0.1, port {dead}"
    assert pages.where("Ray", "") == ""


def test_a_host_that_is_silent_is_not_waited_for(monkeypatch):
    """192.0.2.0/24 is nobody's (RFC 5737): packets to it are lost, or refused at once."""
    begun = time.monotonic()
    assert pages.where("MLflow", "https://192.0.2.1") == "MLflow: no answer from 192.0.2.1, port 443"
    assert time.monotonic() - begun < 2


@pytest.mark.parametrize(("uri", "said"), [
    ("sqlite:////a b/mlflow.db", "MLflow: mlflow ui --backend-store-uri 'sqlite:////a b/mlflow.db'"),
    ("postgresql://u:secretpw@db/x", "MLflow: mlflow ui --backend-store-uri 'postgresql://***@db/x'"),
    ("databricks", "MLflow: databricks"), ("http://[", "MLflow: mlflow ui --backend-store-uri 'http://['"),
])  # fmt: skip
def test_a_database_has_no_page_but_a_command_that_opens_one(uri, said):
    assert pages.where("MLflow", uri) == said
    assert pages.where("MLflow", uri, platform.node()) == said
    assert pages.where("MLflow", uri, "far") == f"{said}  (on far)"


def test_what_only_another_machine_can_open_is_said_to_be_there(listening):
    """Something else may listen on that port here."""
    port, asked = listening
    assert pages.where("Ray", f"http://127.0.0.1:{port}", "far") == f"Ray: port {port} of far, open there alone"
    assert asked() == 0


def test_status_names_the_pages_of_a_run(graph, store, listening):
    about = {"mlflow": f"http://127.0.0.1:{dead_port()}", "ray": f"http://127.0.0.1:{listening[0]}"}
    with heartbeat.beating(store, at_work(graph), about, seconds=0.05):
        wait_for(lambda: drivers.records(store, "g"))
        told = status.lines(status.status(graph, store))
    assert f"  Ray: {about['ray']}" in told
    assert [line for line in told if "no answer from 127.0.0.1" in line]
    assert about["mlflow"] not in "\n".join(told)


def test_another_grid_of_this_store_is_not_told_of(graph, store):
    with heartbeat.beating(store, Board(graph, 1), {}, seconds=0.05):
        wait_for(lambda: store.folders.glob("running", "*.json"))
        assert drivers.records(store, "other") == []


@pytest.mark.parametrize(("owner", "ago", "state"), [
    (None, 0, "alive"), (None, 120, "silent"), ("dead here", 5, "dead"), ("elsewhere/x 1 2", 30, "alive"),
    ("elsewhere/x 1 2", 3600, "silent"),
])  # fmt: skip
def test_stale_and_dead_drivers_are_said_to_be(graph, store, owner, ago, state):
    record = heartbeat._record(Board(graph, 3), {})
    if owner:
        mine = record["signs"]["ctp.owner"].split()[0]
        record["signs"]["ctp.owner"] = f"{mine} 999999999 1" if owner == "dead here" else owner
    record["signs"]["ctp.alive"] = str(int(time.time()) - ago)
    path = f"{store.folders.root}/running/g-0.json"
    store.folders.write(path, json.dumps(record).encode())
    store.folders.write(f"{store.folders.root}/running/g-torn.json", b'{"grid": "g"')
    [found] = drivers.records(store, "g")
    assert found["state"] == state
    text = "\n".join(status.lines(status.status(graph, store)))
    assert ("STALE" in text, "is gone" in text) == (state != "alive", state == "dead")
    with heartbeat.beating(store, Board(graph, 3), {}):
        kept = state != "dead" and ago < 600
        assert bool(store.folders.read(path)) is kept


def test_a_store_that_is_away_does_not_hold_up_the_run(graph, store, monkeypatch):
    def away(*args):
        raise OSError("away")

    monkeypatch.setattr(store.folders, "write", away)
    with heartbeat.beating(store, Board(graph, 3), {}, seconds=0.01):
        time.sleep(0.05)
        assert [t for t in threading.enumerate() if t.name == "heartbeat"]
    assert not [t for t in threading.enumerate() if t.name == "heartbeat"]


def test_failures_and_interruptions_are_told_with_their_files(graph, store):
    cells = graph.cells()
    store.failures.record(ref(cells[1]), to_json(cells[1]), "ValueError: too few windows", "traceback")
    store.states.save(
        graph.nodes[learned(graph)].ref,
        identity(graph.nodes[learned(graph)].cell),
        40,
        lambda f: (f / "x").write_text("x"),
    )
    said = status.status(graph, store)
    assert [(c["error"], c["file"]) for c in said["failed"]] == [
        ("ValueError: too few windows", store.failures.uri(ref(cells[1])))
    ]
    assert [c["state"] for c in said["interrupted"]] == ["interrupted at step 40"]
    assert said["kinds"]["compress"] == {"waiting": 2, "failed": 1}


def test_watching_ends_when_all_is_done(finished, capsys):
    status.show(finished.plan, finished.store, as_json=True, watch=True)
    said = json.loads(capsys.readouterr().out)
    assert said["done"] == said["cells"] == 10


def test_watching_goes_on_while_something_is_missing(graph, store, capsys):
    def stop(seconds):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        status.show(graph, store, as_json=False, watch=True, wait=stop)
    assert "0 of 10 cells done" in capsys.readouterr().out


@pytest.mark.parametrize("args", [["--json"], ["--watch"], ["--plan", "--status"], ["--status", "--explain", "x"],
                                  ["--dag"], ["--dag", "--plan", "--json"]])  # fmt: skip
def test_options_that_do_not_go_together(args, capsys):
    assert command.main(["demo", *args]) == 2
    assert args[0] in capsys.readouterr().err


# ------------------------------------------------------------------- at the end


def test_recoveries_are_those_of_the_manifests(finished):
    found = recoveries(finished.plan, finished.plan.nodes, finished.store)

    def ppl(label, prompted):
        [cell] = [c for c in finished.all(Evaluate)
                  if c.target.compression.label == label and bool(c.recovery) is prompted]  # fmt: skip
        return finished.store.manifest(ref(cell))["metrics"]["ppl"]

    expected = {
        (ppl("dense", False), ppl(label, False), ppl(label, True))
        for label in ("gptq-3bit", "sparsegpt-50-4bit")
        if ppl(label, False) > ppl("dense", False)
    }
    assert {(r.dense, r.compressed, r.prompted) for r in found} == expected
    assert [r.share for r in found] == sorted((r.share for r in found), reverse=True)


def test_a_share_is_what_was_won_of_what_was_lost():
    assert Recovery("x", dense=10.0, compressed=20.0, prompted=12.5).share == 0.75
    assert Recovery("x", dense=10.0, compressed=20.0, prompted=21.0).share == pytest.approx(-0.1)


def test_summary_says_what_is_new_and_how_to_try_again(finished, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["grid", "g.yaml", "--where", "k>=4"])
    monkeypatch.setattr(summary, "recoveries", lambda *args: [Recovery("a", 10, 20, 12), Recovery("b", 10, 20, 22)])
    keys = list(finished.plan.nodes)
    outcome = Outcome(done=set(keys[:3]), failed={keys[4]: "ValueError: no"})
    summary.summarise(finished.plan, outcome, 65.0, finished.store)
    out = capsys.readouterr().out
    assert "best recovery: 80 % of the perplexity lost (20.00 -> 12.00, dense 10.00): a" in out
    assert "worst recovery: -20 % of the perplexity lost" in out
    assert "python -m ctp.grid g.yaml --where 'k>=4' --retry-failed" in out
    assert "new: " in out
