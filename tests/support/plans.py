"""What tests share: see the names."""

from support.tinygrid import write_grid

from ctp.planning import gridfile, plan
from ctp.planning.pins import Pins


def make(path, **changes):
    pins = Pins()
    return plan.make(gridfile.load(str(write_grid(path, changes)), [], pins), pins)
