"""The one face for authors of methods."""

import re
import subprocess
import sys
from pathlib import Path

from ctp import plugin

ROOT = Path(__file__).parents[1]


def test_every_name_resolves():
    assert len(set(plugin.__all__)) == len(plugin.__all__)
    for name in plugin.__all__:
        assert getattr(plugin, name).__name__ if isinstance(getattr(plugin, name), type) else getattr(plugin, name)
    assert not hasattr(plugin, "no_such_name")


def test_importing_it_imports_no_torch():
    code = "import sys, ctp.plugin; print({'torch', 'transformers', 'ray', 'mlflow'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_the_pages_for_authors_import_from_nowhere_else():
    for page in ("README.md", "docs/extend.md"):
        imported = re.findall(r"^\s*(?:from|import) (ctp[\w.]*)", (ROOT / page).read_text(), re.MULTILINE)
        assert set(imported) == {"ctp", "ctp.plugin"}, page
