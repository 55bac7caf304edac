"""Whatever a person hands in by mistake: exit code 2 and one clear line in seconds, before anything runs."""

import copy
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.badgrids import BILLION_LAUGHS, FILES, KEYS, LACKING, SECONDS, VALUES
from support.tinygrid import model_folder

from ctp import grid
from ctp.common.yaml import parse_yaml

GRIDS = Path(__file__).parents[2] / "grid"


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


@pytest.mark.parametrize(
    ("name", "place", "value", "said"),
    [
        (
            "full_paper",
            ("define", "opt-1.3b", "name"),
            "facebook/opt-1.3",
            "models[0]: 'facebook/opt-1.3' is no folder",
        ),
        ("full_paper", ("define", "prompt", "steps"), "many", "recovery.steps = 'many': should be a valid integer"),
        ("full_paper", ("define", "c4", "dataset"), "C4", "unknown data set 'C4'; did you mean 'c4'?"),
        (
            "paper_code",
            ("define", "prompt", "dtype"),
            "float64",
            "dtype = 'float64': should be 'float32' or 'bfloat16'",
        ),
        ("paper_code", ("define", "promt"), {"k": 1}, "define.promt: nothing uses it; unknown definition 'promt'"),
        ("controls", ("extends", "grid"), "full_papr", "unknown grid 'full_papr'; did you mean 'full_paper'?"),
        ("controls", ("define", "seeds"), list(range(3000)), "cells; at most 100,000: make several grids of it"),
        ("controls", ("studies", "own_prompt", "transfer"), "none", "transfer = 'none': allowed: all, own"),
        ("full_paper_small", ("define", "latency", "repeats"), 0, "repeats = 0: should be greater than 0"),
        ("full_paper_small", ("calibration", "count"), -24, "calibration.count = -24: should be greater than 0"),
    ],
)
def test_what_others_build_on(refused, name, place, value, said):
    raw = parse_yaml((GRIDS / f"{name}.yaml").read_text())
    assert said in refused(put(raw, place, value))


def test_many_mistakes_are_told_in_a_few_lines(tmp_path, capsys, demo):
    file = tmp_path / "grid.yaml"
    file.write_text(yaml.safe_dump(put(demo, ("sources",), list(range(3000)))))
    assert grid.main([str(file), "--plan"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 21
    assert lines[-1] == "error: and 2,980 more mistakes"


@pytest.mark.parametrize("axes", [{"k": list(range(1, 200)), "seed": list(range(200))}, {"k": list(range(1, 4002))}])
def test_more_cells_than_anybody_runs(refused, demo, axes):
    assert "at most" in refused(put(demo, ("recovery",), {**demo["recovery"][0], **axes}))


# Anything at all, anywhere in a grid: planned or refused, never an exception.
scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20), st.sampled_from(["$k", "all", "dense"])
)
trees = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from(["method", "from", "text", "dataset", "path", "name", "revision", "k"]), inner, max_size=3
        ),
    ),
    max_leaves=6,
)


def places(value, at=()):
    yield at
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, v in inner:
        yield from places(v, (*at, name))


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_anything_anywhere(data, demo, tmp_path, capsys):
    place = data.draw(st.sampled_from([p for p in places(demo) if p]))
    file = tmp_path / "grid.yaml"
    file.write_text(yaml.safe_dump(put(demo, place, data.draw(trees))), "utf-8", "surrogatepass")
    assert grid.main([str(file), "--plan", "--store", str(tmp_path / "store")]) in (0, 2)
    assert all(line.isprintable() for line in capsys.readouterr().err.splitlines())


# ---------------------------------------------------------------------- command line


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--set", "compression"], "--set 'compression': write path=value"),
        (["--set", "=1"], "--set '=1': write path=value"),
        (["--set", "recovery.7.k=1"], "no 'recovery.7' here (its parent is a list of 1)"),
        (["--set", "recovery." + "a." * 3000 + "b=1"], "a path of 3002 steps; at most 40"),
        (["--set", "models=&a [*a]"], "the value is not YAML that ctp reads: an anchor that stands for something with"),
        (["--set", "models=" + "[" * 3000], "the value is not YAML that ctp reads: line 1"),
        (["--set", "recovery.0.k=" + "9" * 5000], "whole numbers are below 2^63"),
        (["--set", 'models="\\x1b[2J"'], "models = '\\x1b[2J': the control character U+001B"),
        (["--where", "k"], "--where 'k': write axis=value"),
        (["--where", "colour=red"], "unknown axis 'colour'"),
        (["--where", "\x1b[2J=1"], "write axis=value"),
        (["--where", "k>x"], "k is not a number"),
        (["--data", "/no/such"], "--data '/no/such': there is no such folder"),
        (["--data", "\0"], "--data '\\x00': there is no such folder"),
    ],
)
def test_settings_and_slices(refused, demo, args, said):
    assert said in refused(demo, *args)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--batch", "many"], "argument --batch: 'many': must be a whole number from 1 to 1,000,000,000"),
        (["--batch", "0"], "argument --batch: '0': must be a whole number"),
        (["--batch", "-4"], "argument --batch: '-4': must be a whole number"),
        (["--batch", "1e30"], "argument --batch: '1e30': must be a whole number"),
        (["--batch", "9" * 5000], "must be a whole number"),
        (["--cpus", "nan"], "argument --cpus: 'nan': must be a whole number"),
        (["--gpu-memory", "9" * 400], "argument --gpu-memory: "),
        (["--tflops", "inf"], "argument --tflops: 'inf': must be a whole number"),
        (["--checkpoint-seconds", "nan"], "argument --checkpoint-seconds: 'nan': must be a number of seconds, from 0"),
        (["--checkpoint-seconds", "soon"], "argument --checkpoint-seconds: 'soon': must be a number of seconds"),
        (["--checkpoint-seconds=-1"], "argument --checkpoint-seconds: '-1': must be a number of seconds"),
        (["--stage", "both"], "argument --stage: invalid choice: 'both' (choose from 'build', 'transfer')"),
        (["--device", "tpu"], "argument --device: invalid choice: 'tpu' (choose from 'auto', 'cpu', 'cuda')"),
        (["--store", ""], "argument --store: '': must be a folder or an fsspec URI"),
        (["--store", "\0"], "argument --store: '\\x00': must be a folder"),
        (["--nope"], "unrecognized arguments: --nope"),
    ],
)
def test_arguments(capsys, args, said):
    with pytest.raises(SystemExit) as ended:
        grid.main(["demo", "--plan", *args])
    [line] = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2
    assert line.startswith("error: ")
    assert said in line


@pytest.mark.parametrize(
    "name", ["", "..", "/", "/tmp", "\0", "a\0.yaml", "y" * 300, "y" * 300 + ".yaml", "\x1b[2J", "~"]
)
def test_names_of_no_grid(capsys, name):
    assert grid.main([name, "--plan"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "grid" in line
    assert line.isprintable()


@pytest.mark.parametrize("content", [BILLION_LAUGHS, "models: a\nmodels: b\n"])
def test_the_real_command_line_ends_in_seconds(tmp_path, content):
    file = tmp_path / "grid.yaml"
    file.write_text(content)
    begun = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    found = subprocess.run(
        [sys.executable, "-m", "ctp.grid", str(file)], cwd=GRIDS.parent, capture_output=True, text=True, check=False
    )
    assert found.returncode == 2
    assert len(found.stderr.splitlines()) == 1
    assert found.stdout == ""
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - begun < SECONDS
