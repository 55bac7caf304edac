"""The simulated runs: known makespans, bytes that add up, the whole paper on many GPUs; and the fit of cell times."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.plans import make as planned
from support.tinygrid import grid

from benchmarks.celltimes import Pace, assumed, fit, measured
from benchmarks.predict import Forecast, main
from benchmarks.simulate import Machines, simulate
from ctp.cells import Dense
from ctp.cells.cell import Compress, Evaluate, key
from ctp.cells.inputs import Model
from ctp.models.sources import Facts
from ctp.planning import cost, gridfile
from ctp.planning.graph import Node, Plan, longest_path
from ctp.planning.gridfile import Grid
from ctp.planning.pins import Pins
from ctp.planning.plan import make
from ctp.planning.resources import GIB
from ctp.storage.ref import identity
from ctp.storage.store import Store

ROOT = Path(__file__).parents[2]
FACTS = Facts(dtype="float32", context=None, parameters=1, layers=1, linear_parameters=1, in_features=(1,), vocab=1,
              width=1, refused={})  # fmt: skip
WHOLE = {"CPU": 1.0, "GPU": 1.0}


def graph(**inputs):
    """A plan of cells by name, each with the names of those it needs."""
    cells = {n: Compress(model=Model(name=n, revision="1", dtype="float32"), compression=Dense()) for n in inputs}
    nodes = {
        key(c): Node(c, key(c), tuple(key(cells[i]) for i in inputs[n].split()), (), FACTS) for n, c in cells.items()
    }
    return Plan("graph", Grid("graph", Path("graph.yaml"), "", (), {}), nodes)


def wall(plan, gpus, segments, machines=1, **bundles):
    """Seconds of a run; segments: name -> (hold, compute); bundles: name -> GPUs, one unless said."""
    names = {k: n.cell.model.name for k, n in plan.nodes.items()}
    taken = {k: {"CPU": 1.0, "GPU": bundles.get(name, 1.0)} for k, name in names.items()}
    ran = simulate(
        plan, taken, Machines(machines, gpus, 16), machines * gpus, lambda ks, _: [segments[names[k]] for k in ks]
    )
    assert sorted(k for t in ran.tasks for k in t.cells) == sorted(plan.nodes)
    return ran.wall, ran.busy


def test_a_chain_takes_its_sum_on_any_number_of_gpus():
    plan = graph(a="", b="a", c="b")
    for gpus in (1, 4):
        assert wall(plan, gpus, {"a": (1, 2), "b": (0, 3), "c": (4, 0)}) == (10, 10)


def test_independent_cells_fill_the_gpus():
    plan, seconds = graph(**dict.fromkeys("abcdef", "")), dict.fromkeys("abcdef", (1, 1))
    assert wall(plan, 1, seconds) == (12, 12)
    assert wall(plan, 4, seconds) == (4, 12)
    assert wall(plan, 3, seconds, machines=2) == (2, 12)


def test_a_diamond_waits_for_its_longer_side():
    plan, seconds = graph(a="", b="a", c="a", d="b c"), {"a": (0, 1), "b": (0, 5), "c": (0, 2), "d": (0, 1)}
    assert wall(plan, 2, seconds) == (7, 9)
    assert wall(plan, 1, seconds) == (9, 9)
    found, path = longest_path(plan, {k: sum(seconds[n.cell.model.name]) for k, n in plan.nodes.items()})
    assert (found, [plan.nodes[k].cell.model.name for k in path]) == (7, ["a", "b", "d"])


def test_cells_on_one_gpu_share_its_speed_but_not_their_loading():
    plan = graph(a="", b="")
    assert wall(plan, 1, {"a": (0, 3), "b": (0, 3)}, a=0.5, b=0.5) == (6, 6)
    assert wall(plan, 1, {"a": (3, 0), "b": (3, 0)}, a=0.5, b=0.5) == (3, 3)
    # b computes alone for 1 s and has 2 left; shared, a's 1 s takes 2 s; b's last second is its own.
    assert wall(plan, 1, {"a": (1, 1), "b": (0, 3)}, a=0.25, b=0.75) == (4, 4)


def test_a_cell_of_two_gpus_keeps_both():
    plan = graph(a="", b="", c="")
    assert wall(plan, 2, {"a": (0, 2), "b": (0, 2), "c": (0, 2)}, a=2.0) == (4, 8)
    with pytest.raises(ValueError, match="no machine"):
        wall(plan, 2, {"a": (0, 2), "b": (0, 2), "c": (0, 2)}, a=3.0)


# ------------------------------------------------------------------- cell times


def test_the_fit_finds_what_the_times_were_made_of():
    pace = fit([(x, 2.0 + x / 0.25) for x in (0.5, 1.0, 7.0)])
    assert (pace.fixed, pace.share, pace.cells) == (pytest.approx(2), pytest.approx(0.25), 3)
    assert pace.missed == pytest.approx(0, abs=1e-9)
    assert pace.seconds(3e12, 1e12) == (pytest.approx(2), pytest.approx(12))


def test_the_fit_makes_nothing_faster_than_it_was():
    assert fit([(0.0, 1.0), (0.0, 3.0)]) == Pace(2.0, math.inf, 2, 0.5)
    assert fit([(2.0, 8.0)]).fixed == 0  # of one size: all put down to the operations
    assert fit([(2.0, 8.0)]).share == pytest.approx(0.25)
    falling = fit([(1.0, 8.0), (2.0, 4.0)])  # the larger was faster: through the origin, 16 / 5 s a second of matmul
    assert (falling.fixed, falling.share) == (0, pytest.approx(5 / 16))
    assert fit([(2.0, 1.0), (4.0, 2.0)]).share == 1  # no faster than a matmul


def test_paces_come_from_a_stores_manifests(tmp_path, llama_folder):
    spec = grid(llama_folder)
    spec["recovery"] = [{**spec["recovery"], "k": k, "steps": steps} for k, steps in ((2, 6), (4, 600))]
    plan, store = planned(tmp_path / "g.yaml", **spec), Store(str(tmp_path / "store"))
    flops = {k: cost.of(n.cell, n.facts).flops for k, n in plan.nodes.items()}
    for k, n in plan.nodes.items():
        with store.publish(n.ref, identity(n.cell)) as draft:
            draft.record |= {"seconds": 3 + flops[k] / 0.5e6, "location": str(llama_folder)}
    found = measured(store, lambda dtype: 1e6)
    learned = found["learn", "soft_prompt"]
    assert (learned.fixed, learned.share, learned.cells) == (pytest.approx(3), pytest.approx(0.5), 2)
    assert found["compress", "dense"] == Pace(3.0, math.inf, 1)
    # Of a machine so fast that all cells of a kind are too small to tell: what all of them say.
    fast = measured(store, lambda dtype: 1e30)
    assert not fast["compress", "gptq"].own
    assert fast["compress", "gptq"].share == fast["compress", "sparsegpt"].share
    with pytest.raises(ValueError, match="no finished cell of: learn hard_prompt"):
        Forecast(planned(tmp_path / "g.yaml", **grid(llama_folder, recovery="hard_prompt")), found, 1, 1e9, GIB)


# -------------------------------------------------------------- the whole paper


@pytest.fixture(scope="module")
def paper():
    pins = Pins(provisional=True)
    plan = make(gridfile.load(str(ROOT / "grid" / "full_paper.yaml"), [], pins), pins)
    return Forecast(plan, assumed(plan.cells()), 100, 0.5e9, 80 * GIB)


@pytest.mark.parametrize("gpus", [8, 16, 64])
def test_the_paper_on_many_gpus(paper, gpus):
    found = paper.on(gpus, 8, 64)
    assert sorted(k for t in found.run.tasks for k in t.cells) == sorted(paper.plan.nodes)
    assert found.run.wall >= max(found.path, found.work / gpus)
    assert 0 < found.busy <= 1
    assert found.run.busy <= sum((t.ended - t.begun) * max(1, len(t.gpus)) for t in found.run.tasks) * (1 + 1e-9)
    began = {k: t.begun for t in found.run.tasks for k in t.cells}
    ended = {k: t.ended for t in found.run.tasks for k in t.cells}
    assert all(began[k] >= 0 for k in began)
    assert all(ended[i] <= ended[k] for k, n in paper.plan.nodes.items() for i in n.inputs)
    # With 8 and 16 GPUs the arithmetic limits, with 64 the longest path; neither can be beaten.
    assert found.run.wall <= 1.1 * max(found.path, found.work / gpus)


def test_bytes_add_up(paper):
    found = paper.on(64, 8, 64)
    nodes, costs = paper.plan.nodes, {k: cost.of(n.cell, n.facts) for k, n in paper.plan.nodes.items()}
    assert found.written == sum(c.stored for c in costs.values())
    read = 0.0
    for task in found.run.tasks:
        cell = nodes[task.cells[0]].cell
        if not isinstance(cell, Compress):
            source = cell.target if isinstance(cell, Evaluate) else cell.source
            assert all(nodes[k].inputs[0] == key(source) for k in task.cells)
            read += costs[key(source)].stored  # 0 for dense: it is read from its download
        read += sum(costs[k2].stored for k in task.cells if isinstance(nodes[k].cell, Evaluate)
                    for k2 in nodes[k].inputs[1:])  # fmt: skip
    assert found.read == pytest.approx(read, rel=1e-12)
    assert 0 < found.read_cached < found.read
    one = paper.on(1, 8, 64)
    sizes = {n.cell.model.name: 2 * n.facts.parameters for n in nodes.values() if isinstance(n.cell, Compress)}
    assert one.downloaded == sum(sizes.values())  # each float16 model once on the only machine
    used = {i for n in nodes.values() for i in n.inputs}
    assert one.read_cached == pytest.approx(sum(costs[k].stored for k in used), rel=1e-12)


def test_several_gpus_where_one_is_too_small(paper, capsys):
    assert main(["full_paper", "--gpus", "8", "--gpu-memory", "24"]) == 0
    said = capsys.readouterr().out
    assert "No GPU was measured" in said
    assert "Cells that need several GPUs of 24 GiB: 0" not in said


def test_mistakes_are_told(capsys):
    for args, text in (
        (["full_paper", "--gpus", "12"], "--gpus 12: not a multiple of --machine 8"),
        (["full_paper", "--gpus", "0"], "--gpus 0, --machine 8, --cores 64: at least 1 of each"),
        (["full_paper", "--measured", "nowhere"], "--measured needs --tflops"),
        (["full_paper", "--measured", "nowhere", "--tflops", "9"], "nothing is done there"),
    ):
        assert main(args) == 2
        assert text in capsys.readouterr().err


@pytest.mark.slow
def test_a_grid_joins_a_cluster_of_two_nodes():
    command = [sys.executable, "-m", "benchmarks.scaling", "--nodes", "2", "--compressions", "2", "--seconds",
               ".1", ".2", ".1"]  # fmt: skip
    done = subprocess.run(
        command, cwd=ROOT, text=True, capture_output=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    row = [c.strip() for c in done.stdout.splitlines()[-1].split("|")[1:-1]]
    assert row[:3] == ["2", "2", "10"]
    assert int(row[-1]) >= 2  # both nodes had a process that ran cells
