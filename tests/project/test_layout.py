"""Where tests are: one folder for each package, and what they share in tests/support alone."""

import ast
from pathlib import Path

import pytest
from support.longest import LONG

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests"
# Code outside ctp/, the project as a whole, and what needs more than code: a cluster, kills, a GPU, all models.
OTHERS = {"analysis", "benchmarks", "tools", "project", "cluster", "faults", "gpu", "zoo"}


def imported(file: Path) -> set[str]:
    """Modules that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{a.name}" for a in node.names)}
    return found


def test_no_test_file_imports_another():
    names = {f.stem for f in TESTS.rglob("test_*.py")}
    assert len(names) > 50
    for file in TESTS.rglob("*.py"):
        for module in imported(file):
            assert not names & set(module.split(".")), f"{file.relative_to(ROOT)} imports {module}"


def test_each_folder_of_code_is_a_package():
    """import-linter sees packages only."""
    for root in ("ctp", "analysis", "benchmarks", "tools"):
        for folder in {f.parent for f in (ROOT / root).rglob("*.py")} - {ROOT / "benchmarks" / "peers"}:
            assert (folder / "__init__.py").is_file(), folder.relative_to(ROOT)


def test_each_folder_is_one_of_the_code():
    packages = {f.parent.name for f in (ROOT / "ctp").glob("*/__init__.py")} | OTHERS
    folders = {f.parent.name for f in TESTS.rglob("test_*.py") if f.parent != TESTS}
    assert len(folders) > 10
    assert folders <= packages


@pytest.mark.parametrize("file", sorted((TESTS / "support").glob("*.py")), ids=lambda f: f.stem)
def test_a_shared_module_tells_what_it_holds(file):
    assert ast.get_docstring(ast.parse(file.read_text()))


def test_the_files_that_begin_first_are_there():
    assert [name for name in LONG if not (TESTS / name).is_file()] == []
