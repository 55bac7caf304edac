"""What the store tells a plan: why cells are stale, how long they are going to take."""

import json
import subprocess
import sys

import pytest
from support.plans import make
from support.tinygrid import grid

from ctp import grid as command
from ctp.cells.cell import Compress, Evaluate, Learn
from ctp.console import preview
from ctp.machine.arithmetic import cpu_rates
from ctp.planning import cost, history, states
from ctp.planning.graph import longest_path
from ctp.planning.resources import GIB
from ctp.planning.states import Kind, State
from ctp.storage.ref import ref
from ctp.storage.store import Store


def changed(finished, tmp_path, llama_folder, change):
    content = grid(llama_folder)
    change(content)
    return make(tmp_path / "changed.yaml", **content)


def reasons(graph, store):
    why, read = history.stale(graph, states.states(graph, store), store)
    return {graph.nodes[k].cell.kind: str(w) for k, w in reversed(why.items())}, len(why), len(read)


def test_a_changed_setting_is_named_and_followed(finished, tmp_path, llama_folder):
    def change(content):
        content["recovery"] |= {"steps": 12, "lr": 0.5}

    found, stale, read = reasons(changed(finished, tmp_path, llama_folder, change), finished.store)
    assert found["learn"] == "stale: recovery.steps was 6, is 12; recovery.lr was 0.01, is 0.5"
    assert found["evaluate"] == str(history.FOLLOWS)
    assert (stale, read) == (4, 1)  # only the manifest that can say something was read


def test_a_changed_input_is_told_of_once_and_its_setting_named(finished, tmp_path, llama_folder):
    graph = changed(finished, tmp_path, llama_folder, lambda c: c["calibration"].update(seed=7))
    found, stale, read = reasons(graph, finished.store)
    assert found["compress"] == "stale: calibration.seed was 0, is 7"
    assert found["learn"] == str(history.FOLLOWS)
    assert (stale, read) == (8, 2)  # not the dense model and its own evaluation


def test_another_version_is_named(finished, monkeypatch):
    cells = {type(n.cell): n for n in finished.plan.nodes.values()}
    manifest = finished.store.manifest(ref(cells[Learn].cell))
    assert history.differences(cells[Learn], {**manifest, "version": 1}) == "VERSION of learn was 1, is 3"
    other = {**manifest, "inputs": ["0" * 64]}
    assert history.differences(cells[Learn], other) == "its source was made by another VERSION"


def test_a_damaged_cell_is_damaged_whatever_else_has_its_name(finished, tmp_path, llama_folder):
    graph = changed(finished, tmp_path, llama_folder, lambda c: c["calibration"].update(seed=7))
    state = states.states(graph, finished.store)
    k = next(k for k, n in graph.nodes.items() if isinstance(n.cell, Compress) and not state[k].done)
    why, _ = history.stale(graph, state | {k: State(Kind.DAMAGED, "manifest.json is not JSON")}, finished.store)
    assert k not in why
    assert why


def test_nothing_is_stale_in_a_store_that_has_it_all_or_nothing(finished, tmp_path):
    for store in (finished.store, Store(str(tmp_path / "empty"))):
        assert history.stale(finished.plan, states.states(finished.plan, store), store) == ({}, {})


def look(graph, store, **changes):
    state = states.states(graph, store)
    todo = states.undone(state)
    given = {"device": 24 * GIB, "tflops": 100, "batch": 4, "price": 2.5, "pace": cost.gpu_pace(100), "at_once": 0}
    return preview.look(graph, state, todo, store, preview.Assumed(**(given | changes)))


def test_time_is_measured_where_the_like_was_and_scaled(finished, tmp_path, llama_folder):
    graph = changed(finished, tmp_path, llama_folder, lambda c: c["recovery"].update(steps=12))
    seen = look(graph, finished.store)
    [k] = [k for k in seen.todo if isinstance(graph.nodes[k].cell, Learn)]
    [old] = [n for n in finished.plan.nodes.values() if isinstance(n.cell, Learn)]
    manifest = finished.store.manifest(old.ref)
    ratio = cost.of(graph.nodes[k].cell, old.facts).flops / cost.of(old.cell, old.facts).flops
    assert seen.expected[k].seconds == pytest.approx(manifest["seconds"] * ratio)
    assert seen.expected[k].memory == manifest["peak_memory_bytes"]
    assert seen.expected[k].device == "cpu"
    # A CPU's seconds are no GPU's hours: money goes by the cost model.
    assert seen.expected[k].gpu_hours == pytest.approx(seen.costs[k].hours(100))
    text = "\n".join(preview.totals(seen))
    assert "4 of 4 cells: as long as similar cells in this store took, on cpu (*)" in text
    assert f"= {seen.gpu_hours * 2.5:.2f}" in text


def test_what_is_of_another_size_says_nothing_of_the_time(finished, tmp_path, llama_folder):
    graph = changed(finished, tmp_path, llama_folder, lambda c: c["recovery"].update(steps=60_000))
    seen = look(graph, finished.store)
    [k] = [k for k in seen.todo if isinstance(graph.nodes[k].cell, Learn)]
    assert seen.expected[k].device == ""
    assert seen.expected[k].seconds == pytest.approx(3600 * seen.costs[k].hours(100))


def test_the_longest_path_ends_what_takes_longest(finished):
    plan = finished.plan
    weights = {Compress: 5.0, Learn: 100.0, Evaluate: 1.0}
    seconds = {k: weights[type(n.cell)] for k, n in plan.nodes.items()}
    total, path = longest_path(plan, seconds)
    assert total == 106.0
    assert [plan.nodes[k].cell.kind for k in path] == ["compress", "learn", "evaluate"]
    assert longest_path(plan, {}) == (0.0, [])
    only = {k: s for k, s in seconds.items() if not isinstance(plan.nodes[k].cell, Learn)}
    assert longest_path(plan, only)[0] == 6.0


def test_plan_groups_and_says_why(finished, tmp_path, llama_folder, capsys):
    graph = changed(finished, tmp_path, llama_folder, lambda c: c["recovery"].update(steps=12))
    assert command.main([str(tmp_path / "changed.yaml"), "--plan", "--store", finished.store.uri,
                         "--gpu-hour-price", "2"]) == 0  # fmt: skip
    out = capsys.readouterr().out
    assert "6 done, 4 to run" in out
    assert "stale: recovery.steps was 6, is 12" in out
    assert "Longest path" in out
    assert "x 2 =" in out
    lines = [line.split() for line in out.splitlines() if line.startswith("changed  tiny-llama")]
    assert [line[2:8] for line in lines] == [
        ["compress", "3", "3", "-", "-", "-"], ["learn", "1", "-", "-", "-", "1"], ["evaluate", "6", "3", "-", "-", "3"]
    ]  # fmt: skip
    assert command.main([str(tmp_path / "changed.yaml"), "--plan", "--json", "--store", finished.store.uri]) == 0
    said = json.loads(capsys.readouterr().out)
    assert {c["key"]: c["to_run"] for c in said["cells"]} == {k: k not in finished.plan.nodes for k in graph.nodes}
    assert said["total"]["seconds"] > 0
    assert said["longest_path"]["cells"][0] in graph.nodes


@pytest.mark.parametrize("price", ["-1", "nan", "much", "1e99"])
def test_a_price_is_a_number(price, capsys):
    with pytest.raises(SystemExit) as e:
        command.main(["demo", "--plan", f"--gpu-hour-price={price}"])
    assert e.value.code == 2
    assert "must be a number" in capsys.readouterr().err


def test_without_a_gpu_it_goes_by_the_rate_of_this_cpu(finished, tmp_path, monkeypatch):
    """A laptop's CPU is ten thousand times slower than a GPU: seconds assumed for one mean nothing on the other."""
    monkeypatch.setattr("ctp.planning.cost.cpu_rates", lambda: {"float32": 50e9, "bfloat16": 200e9})
    monkeypatch.setattr(
        "ctp.planning.cost.computed_in", lambda dtype, device: "bfloat16" if dtype == "bfloat16" else "float32"
    )
    pace = cost.cpu_pace(2)
    cell = next(n.cell for n in finished.plan.nodes.values() if isinstance(n.cell, Learn))
    work = cost.Cost(flops=6e12, stored=0, memory=0)
    assert pace.seconds(cell, work) == pytest.approx(cost.LOADING + 6e12 / (cost.SHARE * 2 * 50e9))
    half = cell.model_copy(update={"recovery": cell.recovery.model_copy(update={"precision": "bf16"})})
    assert pace.seconds(half, work) == pytest.approx(cost.LOADING + 6e12 / (cost.SHARE * 2 * 200e9))
    assert pace.seconds(cell, cost.Cost(0, 0, 0)) == 0
    seen = look(finished.plan, Store(str(tmp_path / "empty")), pace=pace, at_once=2)
    text = "\n".join(preview.totals(seen))
    assert "on this machine, 2 cells at a time" in text
    assert "60% of the 100 GFLOP/s" in text
    longest = longest_path(finished.plan, {k: e.seconds for k, e in seen.expected.items()})[0]
    assert max(longest, seen.seconds / 2) + preview.STARTING < seen.seconds + preview.STARTING
    assert preview.as_json(seen, [])["total"]["assumed"] == pace.about


def test_a_gpu_is_assumed_where_one_is_or_is_spoken_of(monkeypatch, tmp_path, capsys):
    for has, options, cpu in [
        (False, [], True), (True, [], False), (True, ["--device", "cpu"], True), (False, ["--tflops", "50"], False),
        (False, ["--device", "cuda"], False), (False, ["--address", "auto"], False),
        (False, ["--gpu-memory", "80"], False), (False, ["--gpu-hour-price", "2"], False),
    ]:  # fmt: skip
        monkeypatch.setattr("ctp.grid.has_gpu", lambda has=has: has)
        monkeypatch.setattr("ctp.grid.gpu_memory", lambda gib: 24 * GIB)
        assert command.main(["demo", "--plan", "--store", str(tmp_path / "s"), *options]) == 0
        assert ("on this machine" in capsys.readouterr().out) == cpu


def test_looking_imports_nothing_heavy(tmp_path):
    cpu_rates()  # measured once a machine, with torch
    code = ("import sys; from ctp import grid; "
            "assert grid.main(['demo', sys.argv[1], '--store', sys.argv[2]]) == 0; "
            "heavy = {'torch', 'transformers', 'ray', 'mlflow', 'pandas', 'rich'} & set(sys.modules); "
            "assert not heavy, heavy")  # fmt: skip
    for option in ("--plan", "--status"):
        subprocess.run([sys.executable, "-c", code, option, str(tmp_path / "s")], check=True, capture_output=True)
