"""Two things of one short name in a grid are refused while planning, wherever they come from."""

import shutil

import pytest
import yaml
from support.adapters import save_lora
from support.tiny import tiny_llama
from support.tinygrid import VOCAB, grid, model_folder
from support.tinytasks import own_task

from ctp.planning import gridfile, gridtext
from ctp.planning.pins import Pins
from ctp.planning.plan import make


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return model_folder(tmp_path_factory.mktemp("models") / "m")


def refused(path, content):
    (path / "g.yaml").write_text(yaml.safe_dump(content))
    pins = Pins()
    with pytest.raises(gridtext.GridError) as e:
        make(gridfile.load(str(path / "g.yaml"), [], pins), pins)
    (problem,) = e.value.problems
    return problem


def test_two_models_of_one_name(tmp_path, model):
    other = model_folder(tmp_path / "m", seed=1)
    said = refused(tmp_path, grid(model, models=[str(model), str(other)]))
    assert f"2 models are called 'm' ({min(str(model), str(other))}, " in said
    studies = {"a": {"models": str(model)}, "b": {"models": str(other)}}
    shared = {n: v for n, v in grid(model).items() if n != "models"}
    assert "2 models are called 'm'" in refused(tmp_path, {"studies": studies, **shared})


def test_the_same_model_twice_is_one(tmp_path, model):
    shutil.copytree(model, tmp_path / "m")
    content = grid(model, models=[str(model), str(tmp_path / "m")])
    (tmp_path / "g.yaml").write_text(yaml.safe_dump(content))
    pins = Pins()
    assert len(make(gridfile.load(str(tmp_path / "g.yaml"), [], pins), pins).nodes) == 10


def test_two_adapters_of_one_name(tmp_path, model):
    paths = [str(save_lora(tiny_llama(vocab=VOCAB), tmp_path / n / "a", r=r)) for n, r in (("x", 2), ("y", 3))]
    said = refused(tmp_path, grid(model, recovery={"method": "adapter", "path": paths}))
    assert f"2 adapters are called 'a' ({paths[0]}, {paths[1]})" in said


def test_two_checkpoints_of_one_name(tmp_path, model):
    paths = [str(model_folder(tmp_path / n / "c", seed=i)) for i, n in enumerate("xy")]
    alone = [{"compression": {"method": "checkpoint", "path": p}, "sources": "all"} for p in paths]
    shared = {n: v for n, v in grid(model).items() if n not in ("compression", "sources")}
    said = refused(tmp_path, {"studies": dict(zip("ab", alone, strict=True)), **shared})
    assert f"2 checkpoints are called 'c' ({paths[0]}, {paths[1]})" in said


def test_two_tasks_of_one_name(tmp_path, model):
    paths = [own_task(tmp_path / n, rows=i) for i, n in ((3, "x"), (4, "y"))]
    said = refused(tmp_path, grid(model, measures={"method": "task", "name": paths}))
    assert f"2 tasks are called 'sums' ({paths[0]}, {paths[1]})" in said
