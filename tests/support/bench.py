"""What tests share: see the names."""

from support.tinygrid import grid, write_grid

from ctp.cells.runtime import Runtime
from ctp.execution import execute as execution_execute
from ctp.planning import gridfile, plan
from ctp.planning.pins import Pins
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
        execution_execute.execute(cell, self.store, self.runtime, report)

    def all(self, kind):
        return [c for c in self.cells if isinstance(c, kind)]
