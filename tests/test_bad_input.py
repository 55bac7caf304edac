"""Whatever a person hands in by mistake: exit code 2 and one clear line in seconds, before anything runs."""

import copy
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from badgrids import BILLION_LAUGHS, FILES, KEYS, LACKING, VALUES
from hypothesis import given, settings
from hypothesis import strategies as st
from tinygrid import model_folder

from ctp import grid
from ctp.gridtext import parse_yaml

GRIDS = Path(__file__).parents[1] / "grid"
SECONDS = 3


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> dict:
    """The demo with a tiny model in its real one's place."""
    folder = model_folder(tmp_path_factory.mktemp("models") / "tiny", context=512)
    return parse_yaml((GRIDS / "demo.yaml").read_text()) | {"models": str(folder)}


def put(raw, place, value):
    """A copy of `raw` with a value at a place, new keys included."""
    whole = copy.deepcopy(raw)
    at = whole
    for step in place[:-1]:
        at = at[step]
    at[place[-1]] = value
    return whole


def without(raw, place, instead=None):
    """A copy of `raw` without the key at a place, or with it under another name."""
    whole = copy.deepcopy(raw)
    at = whole
    for step in place[:-1]:
        at = at[step]
    value = at.pop(place[-1])
    if instead:
        at[instead] = value
    return whole


@pytest.fixture
def refused(tmp_path, capsys):
    """Plan a grid that is wrong; gives the one line that tells it, without the file's name."""

    def plan(content, *args) -> str:
        file = tmp_path / "grid.yaml"
        if isinstance(content, dict):
            content = yaml.safe_dump(content, sort_keys=False)
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        begun = time.monotonic()
        code = grid.main([str(file), "--plan", "--store", str(tmp_path / "store"), *args])
        seconds = time.monotonic() - begun
        out, err = capsys.readouterr()
        assert (code, out) == (2, "")
        [line] = err.splitlines()
        assert line.startswith("error: ")
        assert line.isprintable()
        assert len(line) < 2000
        assert seconds < SECONDS
        assert not (tmp_path / "store").exists()
        return line.removeprefix(f"error: {file}: ")

    return plan


# ------------------------------------------------------------------------ grid files


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_no_grid(refused, name):
    content, said = FILES[name]
    assert said in refused(content)


def shown(place) -> str:
    """A place as errors name it."""
    return "".join(f"[{s}]" if isinstance(s, int) else f".{s}" for s in place).lstrip(".")


@pytest.mark.parametrize("place", VALUES, ids=shown)
def test_a_value_that_no_setting_has(refused, demo, place):
    for value in VALUES[place]:
        line = refused(put(demo, place, value))
        assert line.startswith(str(place[0])), line
        assert str(place[-1]) in line or "unknown" in line or "needs" in line, line


@pytest.mark.parametrize("place", KEYS, ids=shown)
def test_a_key_mistyped_is_told_with_the_right_one(refused, demo, place):
    wrong = place[-1][:-1] + "e" + place[-1][-1]
    said = refused(put(demo, (*place[:-1], wrong), 1))
    assert f"unknown key '{wrong}'; did you mean '{place[-1]}'" in said


@pytest.mark.parametrize("place", LACKING, ids=shown)
def test_a_key_left_out(refused, demo, place):
    line = refused(without(demo, place))
    assert f"{place[-1]} is missing" in line or f"needs a '{place[-1]}'" in line
