"""One cell explained: found by key, name or words; what the manifest says."""

import json
import re

import pytest
from support.plans import make
from support.tinygrid import grid

from ctp.cells.cell import Learn, to_json
from ctp.cells.events import Progress
from ctp.cells.labels import slug
from ctp.common.terminal import size
from ctp.console import explain, heartbeat
from ctp.console.board import Board
from ctp.planning.gridtext import GridError
from ctp.storage.drivers import About
from ctp.storage.store import Store
from ctp.tracking.tracker import Tracker


@pytest.fixture
def graph(tmp_path, llama_folder):
    return make(tmp_path / "g.yaml", **grid(llama_folder))


def the_learned(graph):
    return next(n for n in graph.nodes.values() if isinstance(n.cell, Learn))


def test_found_by_key_slug_folder_and_words(graph):
    node = the_learned(graph)
    name = slug(node.cell)
    for text in (node.key, node.key[:8].upper(), name, f"results/store/learn/{name}-{node.key[:12]}/", "learn gptq"):
        assert explain.find(graph, text) is node


def test_several_and_none_are_answered_with_names(graph):
    with pytest.raises(GridError, match="6 cells of g are called so") as e:
        explain.find(graph, "ppl")
    assert sum(k[:12] in str(e.value.problems[0]) for k in graph.nodes) == 6
    with pytest.raises(GridError, match=r"did you mean .*tiny-llama_gptq-3bit"):
        explain.find(graph, "tiny-llama_gtpq-3bit")
    for nothing in ("", "  ", "zzzzzz"):
        with pytest.raises(GridError, match="no cell of g is called so"):
            explain.find(graph, nothing)


def test_a_finished_cell_says_what_it_cost_and_where_it_is(finished, tmp_path):
    node = the_learned(finished.plan)
    said = explain.explain(finished.plan, node.key, finished.store, f"sqlite:///{tmp_path}/none.db")
    manifest = finished.store.manifest(node.ref)
    assert said["manifest"] == manifest
    lines = explain.lines(said)
    [source] = node.inputs
    for name, value in (
        ("key", node.key),
        ("state", "done"),
        ("input", f"{source[:12]} tiny-llama_gptq-3bit (done)"),
        ("needed by", "3 cells"),
        ("folder", finished.store.folder(node.ref)),
        ("peak memory", size(manifest["peak_memory_bytes"])),
        ("MLflow", "no run yet"),
    ):
        assert f"  {name:<12} {value}" in lines
    metrics = [line.split()[1:] for line in lines if line.startswith("  metric ")]
    assert metrics == [[n, "=", f"{v:g}"] for n, v in sorted(manifest["metrics"].items())]
    assert len(metrics) > 3
    assert "  recovery.k = 4" in lines
    assert not (tmp_path / "none.db").exists()


def test_a_missing_and_a_failed_cell(graph, tmp_path):
    store = Store(str(tmp_path / "store"))
    node = the_learned(graph)
    said = explain.explain(graph, node.key, store, "sqlite:///none.db")
    assert said["state"] == "needs tiny-llama_gptq-3bit"
    assert said["expected"]["flops"] > 0
    store.failures.record(node.ref, to_json(node.cell), "ValueError: no", "trace")
    text = "\n".join(explain.lines(explain.explain(graph, node.key, store, "sqlite:///none.db")))
    assert "failed last time: ValueError: no" in text
    assert store.failures.uri(node.ref) in text


def test_a_cell_at_work_says_how_far(graph, tmp_path):
    store = Store(str(tmp_path / "store"))
    node, board = the_learned(graph), Board(graph, 10)
    board.update(Progress(key=node.key, step=3, steps=9, loss=2.0))
    store.folders.write(
        f"{store.folders.root}/running/g-0.json", heartbeat.record(board, About()).model_dump_json().encode()
    )
    said = explain.explain(graph, node.key, store, "sqlite:///none.db")
    assert re.fullmatch(r"running on .*, step 3/9, loss 2\.000", said["state"])


def test_the_mlflow_run_is_named(finished, uri, capsys):
    Tracker(uri, finished.plan, finished.store).sync()
    explain.show(finished.plan, the_learned(finished.plan).key, finished.store, uri, as_json=True)
    assert ", FINISHED" in json.loads(capsys.readouterr().out)["mlflow"]
