"""A tiny grid, planned, and a store: cells are executed in this process."""

import pytest
from support.tinygrid import grid, write_grid

from ctp.cells.runtime import Runtime
from ctp.common.files import Changed
from ctp.execution import execute
from ctp.planning import gridfile, plan
from ctp.planning.pins import Pins
from ctp.storage.ref import ref
from ctp.storage.store import Store


class Bench:
    """A plan, a store and what is needed to execute cells here."""

    def __init__(self, folder, model, **changes):
        self.pins = Pins()
        folder.mkdir(exist_ok=True)
        path = write_grid(folder / "g.yaml", grid(model, **changes))
        self.plan = plan.make(gridfile.load(str(path), [], self.pins), self.pins)
        self.store = Store(str(folder / "store"))
        self.runtime = Runtime(device="cpu", locations=self.pins.locations, checkpoint_seconds=0.0)
        self.cells = self.plan.cells()

    def execute(self, cell, report=lambda numbers: None):
        execute.execute(cell, self.store, self.runtime, report)

    def all(self, kind):
        """The cells of one kind."""
        return [c for c in self.cells if isinstance(c, kind)]


def fails(bench, cell, what):
    """Executing the cell tells that `what` has changed, and stores nothing."""
    with pytest.raises(Changed, match=rf"{what}.* has changed since it was pinned .*: run again"):
        bench.execute(cell)
    assert not bench.store.has(ref(cell))
