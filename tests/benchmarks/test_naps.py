"""The cells that benchmarks.grid's throughput is made of."""

from benchmarks.grid import naps
from ctp.cells import Compression
from ctp.cells.runtime import Runtime
from ctp.execution.execute import execute
from ctp.planning import plugins
from ctp.storage.store import Store


def test_cells_that_sleep_are_stored(tmp_path, monkeypatch):
    monkeypatch.setattr(plugins, "_sources", {})
    monkeypatch.setattr(Compression, "registry", dict(Compression.registry))
    plan, pins = naps(tmp_path / "naps", 2)
    store = Store(str(tmp_path / "store"))
    runtime = Runtime(device="cpu", locations=pins.locations, plugins=dict(plan.grid.plugins))
    for cell in plan.cells():
        execute(cell, store, runtime, lambda event: None)
    assert store.done(plan.refs()) == plan.nodes.keys()
