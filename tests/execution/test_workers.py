"""Trials in real workers: what a process loads, how often, and what becomes of cells that share a trial."""

from pathlib import Path

import pytest
import ray
from support.tinygrid import grid, write_grid

from ctp import cells
from ctp.cells.cell import Evaluate, key
from ctp.cells.events import Done, Failed, Started
from ctp.cells.runtime import Runtime
from ctp.planning import gridfile, plan, plugins
from ctp.planning.pins import Pins
from ctp.scheduling import tune
from ctp.scheduling.options import Options
from ctp.scheduling.walk import WORKER_DIED
from ctp.storage.ref import ref
from ctp.storage.store import Store

PLUGIN = Path(__file__).parents[1] / "plugins" / "counted.py"


@pytest.fixture(autouse=True)
def forgotten(monkeypatch):
    monkeypatch.setattr(cells.Measure, "registry", dict(cells.Measure.registry))
    monkeypatch.setattr(plugins, "_sources", {})


def run(tmp_path, model, measures, monkeypatch, **changes):
    """(outcome, events, what the finished evaluations measured) of a grid that is run on two cores."""
    monkeypatch.setattr(ray, "init", lambda start=ray.init, **how: start(num_cpus=2, **how))
    content = grid(model, recovery=[], sources=[], plugins=str(PLUGIN), measures=measures, **changes)
    pins = Pins()
    graph = plan.make(gridfile.load(str(write_grid(tmp_path / "g.yaml", content)), [], pins), pins)
    store, events = Store(str(tmp_path / "store")), []
    runtime = Runtime(device="cpu", locations=pins.locations, plugins=dict(graph.grid.plugins))
    outcome = tune.run(
        graph, set(graph.nodes), set(), store=store.uri, runtime=runtime, options=Options(), on_event=events.append,
    )  # fmt: skip
    measured = [c for c in graph.cells() if isinstance(c, Evaluate) and key(c) in outcome.done]
    return outcome, events, [store.manifest(ref(c))["metrics"] for c in measured]


def test_imports_and_models_are_paid_once_a_worker(tmp_path, llama_folder, monkeypatch):
    measures = [
        {"method": "counted", "index": list(range(20))},
        {"method": "counted", "index": 99, "mishap": "error"},
    ]
    outcome, events, found = run(tmp_path, llama_folder, measures, monkeypatch)
    assert len(outcome.done) == 3 + 3 * 20
    assert set(outcome.failed.values()) == {"ValueError: as asked"}
    assert len(outcome.failed) == 3  # one a target; those that shared its trial are done
    assert len({m["pid"] for m in found}) <= 2  # two cores, two processes
    assert 3 <= sum(m["loaded"] for m in found) <= 6  # three targets, each loaded once a process at most
    told = [type(e) for e in events]
    assert (told.count(Started), told.count(Done), told.count(Failed)) == (66, 63, 3)


@pytest.mark.slow
def test_a_worker_that_dies_takes_one_cell_with_it(tmp_path, llama_folder, monkeypatch):
    measures = [
        {"method": "counted", "index": list(range(6))},
        {"method": "counted", "index": 7, "mishap": "death"},
        {"method": "counted", "index": [8, 9]},
    ]
    outcome, _, found = run(tmp_path, llama_folder, measures, monkeypatch, compression="dense")
    assert list(outcome.failed.values()) == [WORKER_DIED]
    assert len(outcome.done) == 1 + 8
    assert len(found) == 8
