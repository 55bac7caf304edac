"""What README and docs show is what happens: their blocks run, their commands parse, their links lead somewhere."""

import os
import re
import shlex
from pathlib import Path

import mlflow
import pytest
import yaml
from adapters import save_lora
from pages import Block, Reader, blocks, one_after_the_other
from tinygrid import grid, model_folder, write_grid

import ctp
from ctp import cli, gridfile, models, plan, plugins
from ctp.methods import Compression, Measure, Recovery
from ctp.packaged_text import documents
from ctp.pins import Pins

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md")),
         ROOT / "grid" / "tasks" / "README.md"]  # fmt: skip


@pytest.fixture
def page(tmp_path, monkeypatch):
    """A folder to run a page in: no Ray, methods of its own forgotten afterwards, MLflow's address too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ctp.schedule.run", one_after_the_other)
    for family in (Compression, Measure, Recovery):
        monkeypatch.setattr(family, "registry", dict(family.registry))
    monkeypatch.setattr(plugins, "_sources", {})
    monkeypatch.setattr("sys.path", [*os.sys.path])
    before = mlflow.get_tracking_uri()
    yield tmp_path
    mlflow.set_tracking_uri(before)


def demo(folder, failing=False):
    """A finished grid `demo` in the working directory, as `ctp grid demo.yaml` leaves it."""
    content = grid(model_folder(folder / "tiny"))
    content["recovery"] |= {"k": [2, 4], "steps": 2, "validate_every": 1}
    if failing:  # one prompt asks for more text than there is
        wrong = content["recovery"] | {"k": 3, "text": content["recovery"]["text"] | {"count": 10**6}}
        content["recovery"] = [content["recovery"], wrong]
    write_grid(folder / "demo.yaml", content)
    assert cli.main(["grid", "demo.yaml"]) == (1 if failing else 0)


def test_the_mlflow_page(page):
    demo(page, failing=True)
    mlflow.set_tracking_uri("sqlite:///results/mlflow.db")
    reader = Reader()
    assert sum(reader.read(b) for b in blocks(ROOT / "docs" / "mlflow.md")) >= 15
    n = reader.names
    assert n["matrix"].shape == (3, 3)  # none, k = 2, k = 4
    assert set(n["won"].index) == {"dense", "gptq-3bit", "sparsegpt-50-4bit"}
    assert list(n["failed"]["params.k"]) == ["3"]
    assert "1000000" in n["failed"]["tags.ctp.error"].iloc[0]
    assert len(n["best"]) == 3
    assert len(n["written"]) == 3 + 3 + 9  # compressed; learned, the failed one too; measured
    assert len(n["learned"]) == 2
