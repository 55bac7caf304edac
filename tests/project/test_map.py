"""The map in CONTRIBUTING, the walkthrough, and every path that a page names, against the tree as it is."""

import ast
import re
from pathlib import Path

import pytest

from tools import map as tree

ROOT = Path(__file__).parents[2]
PAGES = [p for p in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")) if p.name != "CHANGELOG.md"]
STEPS = re.findall(r"`(\w+(?:/\w+)*\.py)::([\w.]+)`", (ROOT / "docs" / "walkthrough.md").read_text())


def test_the_map_is_up_to_date():
    text = tree.PAGE.read_text()
    assert text == tree.page(text), "make map"


def test_a_module_without_a_docstring_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(tree, "ROOT", tmp_path)
    (tmp_path / "new.py").write_text("x = 1\n")
    with pytest.raises(ValueError, match=r"new\.py: no docstring"):
        tree.sentence(tmp_path / "new.py")
    (tmp_path / "new.py").write_text('"""Eq. (1) on\ntwo lines. And more.\n\nMore.\n"""\n')
    assert tree.sentence(tmp_path / "new.py") == "Eq. (1) on two lines."


def defined(file: Path) -> set[str]:
    """Functions and classes of a file, and methods as CLASS.METHOD."""
    found = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            found.add(node.name)
            found |= {f"{node.name}.{m.name}" for m in node.body if isinstance(m, ast.FunctionDef)}
    return found


@pytest.mark.parametrize(("file", "name"), dict.fromkeys(STEPS))
def test_the_walkthrough_names_what_exists(file, name):
    assert name in defined(ROOT / file)


def test_the_walkthrough_passes_through_every_stage():
    assert {Path(file).parts[1] for file, _ in STEPS if file.startswith("ctp/")} >= {
        "grid.py", "planning", "cells", "scheduling", "execution", "storage", "tracking",
    }  # fmt: skip
    assert "analysis/transfer_matrix.py" in {file for file, _ in STEPS}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_paths_that_a_page_names_exist(page):
    named = re.findall(
        r"`((?:analysis|benchmarks|ctp|docs|grid|tests|tools)/(?:[\w./]*(?:/|\.\w+))?)(?:::[\w.]+)?`", page.read_text()
    )
    assert [path for path in dict.fromkeys(named) if "NAME" not in path and not (ROOT / path).exists()] == []
