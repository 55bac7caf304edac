"""What tests share: see the names."""

import pytest

from ctp.planning import gridfile, plan
from ctp.planning.gridtext import GridError
from ctp.planning.pins import Pins


def load(path, *settings):
    pins = Pins()
    found = gridfile.load(str(path), list(settings), pins)
    return found, plan.make(found, pins)


def problems(path, *settings):
    with pytest.raises(GridError) as caught:
        load(path, *settings)
    return [p.removeprefix(f"{path}: ") for p in caught.value.problems]
