"""What the wheel installs: ctp and nothing beside it, with the grids and the analysis in it."""

import os
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest
from hatchling.builders.wheel import WheelBuilder

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    [path] = WheelBuilder(str(ROOT)).build(directory=str(tmp_path_factory.mktemp("dist")), versions=["standard"])
    return ZipFile(path)


def test_ctp_is_all_that_is_installed(wheel):
    names = wheel.namelist()
    assert {n.partition("/")[0] for n in names} == {"ctp", next(n for n in names if ".dist-info/" in n).split("/")[0]}
    wanted = (
        "grids/demo.yaml",
        "analysis/paper.yaml",
        "analysis/report/templates/report.css",
        "models/known_models.json",
    )
    assert [n for n in wanted if f"ctp/{n}" not in names] == []
    assert [n for n in names if "__pycache__" in n] == []


@pytest.mark.parametrize(("name", "said"), [("tables", "usage: ctp tables"), ("report", "--log")])
def test_an_installed_ctp_uses_its_own_analysis(wheel, tmp_path, name, said):
    """Where the working folder has a package of that name, and Python looks there first."""
    wheel.extractall(tmp_path / "site")
    (tmp_path / "here" / "analysis").mkdir(parents=True)
    (tmp_path / "here" / "analysis" / "__init__.py").write_text("raise ImportError('the wrong one')")
    found = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "ctp", name, "--help"], cwd=tmp_path / "here", capture_output=True,
        text=True, timeout=120, check=False, env=os.environ | {"PYTHONPATH": str(tmp_path / "site")},
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    assert said in found.stdout
