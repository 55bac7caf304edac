"""Importing what plans, describes and prints loads nothing that computes; `make lint` checks who imports whom.

A contract of import-linter sees every import that is written down, but not when it happens.
"""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LOADED = """
import importlib, pkgutil, sys
package = importlib.import_module(sys.argv[1])
for module in pkgutil.walk_packages(getattr(package, "__path__", []), package.__name__ + "."):
    importlib.import_module(module.name)
print(*sorted({"torch", "transformers", "ray", "mlflow", "pandas"} & sys.modules.keys()))
"""


@pytest.mark.parametrize("name", ["ctp.cells", "ctp.planning", "ctp.console", "ctp.grid", "ctp.plugin"])
def test_nothing_heavy_is_imported_before_it_is_used(name):
    run = subprocess.run([sys.executable, "-c", LOADED, name], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.split() == []
