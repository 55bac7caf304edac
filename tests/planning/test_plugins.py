"""Methods in a user's own file."""

from pathlib import Path

import pytest
from support.gridfiles import load, problems
from support.tinygrid import grid, write_grid

from ctp.cells import Recovery
from ctp.planning import plugins

SOURCE = """
from typing import Literal
from ctp.plugin import Recovery

class Shout(Recovery):
    method: Literal["shout"] = "shout"
    volume: int = 11

    def recover(self, job):
        return {}
"""


@pytest.fixture(autouse=True)
def forgotten(monkeypatch):
    monkeypatch.setattr(Recovery, "registry", dict(Recovery.registry))
    monkeypatch.setattr(plugins, "_sources", {})


def test_a_file_beside_the_grid_adds_a_method(tmp_path, llama_folder):
    (tmp_path / "shout.py").write_text(SOURCE)
    path = write_grid(tmp_path / "g.yaml", grid(llama_folder, plugins="shout.py", recovery={"method": "shout"}))
    found, graph = load(path)
    assert found.studies[0].recoveries[0].volume == 11
    assert found.plugins == {"shout": SOURCE}
    assert len(graph.nodes) == 10
    assert problems(path, "recovery.volum=3") == [
        "recovery.volum: unknown key 'volum'; did you mean 'volume'? Allowed: method, volume"
    ]


def test_a_workers_process_gets_it_from_the_source():
    plugins.load({"shout": SOURCE})
    assert Recovery.registry["shout"].__module__ == "ctp_plugin_shout"
    first = Recovery.registry["shout"]
    plugins.load({"shout": SOURCE})
    assert Recovery.registry["shout"] is first
    plugins.load({"shout": SOURCE.replace("11", "12")})
    assert Recovery.registry["shout"]().volume == 12


def test_no_method_is_replaced_and_mistakes_name_the_file(tmp_path, llama_folder):
    (tmp_path / "thief.py").write_text(SOURCE.replace("shout", "soft_prompt"))
    (tmp_path / "broken.py").write_text("import nothing_like_that")
    names = ["thief.py", "broken.py", "gone.py", 5]
    found = problems(write_grid(tmp_path / "g.yaml", grid(llama_folder, plugins=names)))
    assert found[0].startswith("plugins = 'thief.py': ValueError: method 'soft_prompt' is there already: ctp.cells")
    assert found[1].startswith("plugins = 'broken.py': ModuleNotFoundError: No module named 'nothing_like_that'")
    assert found[2] == "plugins = 'gone.py': there is no such file, here or beside the grid file"
    assert found[3] == "plugins = 5: the path of a .py file, or the name of an installed module"


def test_a_method_that_nothing_does_is_refused(tmp_path, llama_folder):
    idle = SOURCE.partition("    def recover")[0]
    (tmp_path / "idle.py").write_text(idle)
    found = problems(write_grid(tmp_path / "g.yaml", grid(llama_folder, plugins="idle.py")))
    assert found == ["plugins = 'idle.py': the method 'shout' needs a function recover(self, job)"]
    derived = idle.replace("import Recovery", "import Recovery\nfrom ctp.cells import RandomPrompt")
    (tmp_path / "murmur.py").write_text(derived.replace("(Recovery)", "(RandomPrompt)").replace("shout", "murmur"))
    load(write_grid(tmp_path / "g.yaml", grid(llama_folder, plugins="murmur.py")))


def test_the_readme_shows_the_plugin_that_is_tested():
    root = Path(__file__).parents[2]
    shown = (root / "tests" / "plugins" / "mean_prompt.py").read_text()
    assert f"```python\n{shown}```" in (root / "README.md").read_text()
    assert len(shown.splitlines()) <= 30
