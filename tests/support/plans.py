"""Plans of grid files that a test writes, and the problems that loading finds in them."""

import pytest
from support.tinygrid import write_grid

from ctp.planning import gridfile, plan
from ctp.planning.gridtext import GridError
from ctp.planning.pins import Pins


def load(path, *settings):
    """(the grid, its plan) of the file at `path`, with settings as on the command line."""
    pins = Pins()
    found = gridfile.load(str(path), list(settings), pins)
    return found, plan.make(found, pins)


def make(path, **content):
    """The plan of this content, written to `path`."""
    return load(write_grid(path, content))[1]


def problems(path, *settings):
    """The lines that loading fails with, without the file's name."""
    with pytest.raises(GridError) as caught:
        load(path, *settings)
    return [p.removeprefix(f"{path}: ") for p in caught.value.problems]
