"""Does an index have a wheel of every pin of requirements.lock, for each Python and platform that ctp runs on?

    python -m tools.platforms [--python 3.12 ...] [--platform linux-x86_64 ...]

Asks pip (25.2 or newer), by `pip index versions`, and fetches no wheel. Only package indexes are asked: what pip's
configuration names on this machine's disk (find-links, mirrors in folders) is left out, and so are constraints. What
torch's builds for CUDA bring along is not in the lock, and not looked for.

A pin that has no wheel for any platform is built here. Where that gives one wheel for all platforms it is pure Python
and counts as source only, else as missing. Prints a table and what is missing, by name. Then the exit code is 1.
"""

import argparse
import ast
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from packaging.requirements import Requirement

LOCK = Path(__file__).parents[1] / "requirements.lock"
PYTHONS = ("3.11", "3.12", "3.13")
GLIBC, MACOS = 28, 14  # the oldest systems that have a wheel of every pin: glibc 2.28, macOS 14
PLATFORMS = {  # name -> tags of its wheels
    "linux-x86_64": ["manylinux2014_x86_64", *(f"manylinux_2_{n}_x86_64" for n in range(5, GLIBC + 1))],
    "linux-arm64": ["manylinux2014_aarch64", *(f"manylinux_2_{n}_aarch64" for n in range(17, GLIBC + 1))],
    "macos-arm64": [f"macosx_{MACOS}_0_arm64"],
}
NO_PLATFORM = ["none"]  # wheels for every platform fit this one too, and no others
PYPI = "https://pypi.org/simple"
URLS = ("index-url", "extra-index-url")
WAYS = ("proxy", "cert", "client-cert", "trusted-host", "timeout", "default-timeout")
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")


class Answer(NamedTuple):
    """Pins of one Python and platform: those that have a wheel, that are source only, that are missing."""

    wheels: list[str]
    sources: list[str]
    missing: list[str]


def pins(lock: str) -> list[Requirement]:
    """The lines of a lock's text."""
    return [Requirement(pin) for line in lock.splitlines() if (pin := line.partition("#")[0].strip())]


def index_settings() -> tuple[dict[str, str], set[str]]:
    """An environment in which pip asks the indexes that it is set up for; the names of the settings left out."""
    listed = subprocess.run([*PIP, "config", "list"], capture_output=True, text=True, check=True).stdout
    kept, left_out = {"PIP_CONFIG_FILE": os.devnull}, set()
    for line in listed.splitlines():  # the environment's come first
        key, _, text = line.partition("=")
        name, value = key.rpartition(".")[2], ast.literal_eval(text)
        remote = " ".join(url for url in value.split() if urlsplit(url).scheme in ("http", "https"))
        if name in WAYS or (name in URLS and remote):
            kept.setdefault("PIP_" + name.upper().replace("-", "_"), value if name in WAYS else remote)
        if name not in (*WAYS, "disable-pip-version-check") and (name not in URLS or remote != " ".join(value.split())):
            left_out.add(name)
    return {**{n: v for n, v in os.environ.items() if not n.startswith("PIP_")}, **kept}, left_out


class Index:
    """What pip says of the indexes. hosts: where they are; left_out: names of settings."""

    def __init__(self) -> None:
        self.settings, self.left_out = index_settings()
        urls = f"{self.settings.get('PIP_INDEX_URL', PYPI)} {self.settings.get('PIP_EXTRA_INDEX_URL', '')}"
        self.hosts = [str(urlsplit(url).hostname) for url in urls.split()]

    def has(self, pin: Requirement, python: str, tags: Iterable[str]) -> bool:
        """Whether there is a wheel that pip would take there. Raises SystemExit where pip fails otherwise."""
        where = [f"--python-version={python}", *(f"--platform={tag}" for tag in tags)]
        done = self.pip("index", "versions", pin.name, "--json", "--pre", "--only-binary=:all:", *where)
        if done.returncode == 0:
            return any(pin.specifier.contains(v, prereleases=True) for v in json.loads(done.stdout)["versions"])
        if "No matching distribution found" in done.stderr:
            return False
        raise SystemExit(done.stderr)

    def is_pure(self, pin: Requirement) -> bool:
        """Whether a wheel made of its source runs everywhere. False too where none can be made."""
        with tempfile.TemporaryDirectory() as folder:
            self.pip("wheel", "--no-deps", f"--no-binary={pin.name}", f"--wheel-dir={folder}", str(pin))
            return any(Path(folder).glob("*-none-any.whl"))

    def pip(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run pip."""
        return subprocess.run([*PIP, *words], capture_output=True, text=True, env=self.settings, check=False)


def check(index: Index, pythons: list[str], platforms: list[str]) -> dict[tuple[str, str], Answer]:
    """Python and platform -> what there is of the lock's pins."""
    lock = pins(LOCK.read_text())
    ends = pythons[0], pythons[-1]  # packages name the oldest and sometimes the newest Python that they run on
    combinations = list(product(pythons, platforms))
    with ThreadPoolExecutor(2 * (os.cpu_count() or 1)) as pool:
        say(f"{len(lock)} pins: which have a wheel for every platform?")
        universal = pool.map(lambda pin: all(index.has(pin, python, NO_PLATFORM) for python in ends), lock)
        others = [pin for pin, everywhere in zip(lock, universal, strict=True) if not everywhere]
        say(f"{len(others)} pins: for which of {len(combinations)} Pythons and platforms?")
        asked = list(product(combinations, others))
        has = pool.map(lambda one: index.has(one[1], one[0][0], PLATFORMS[one[0][1]]), asked)
        there = {(combination, str(pin)) for (combination, pin), yes in zip(asked, has, strict=True) if yes}
    found = {name for _, name in there}
    sources = [str(pin) for pin in others if str(pin) not in found and index.is_pure(pin)]
    answers = {}
    for combination in combinations:
        binary = [str(pin) for pin in others if str(pin) not in sources]
        missing = [pin for pin in binary if (combination, pin) not in there]
        wheels = [str(pin) for pin in lock if str(pin) not in {*missing, *sources}]
        answers[combination] = Answer(wheels, sources, missing)
    return answers


def say(line: str) -> None:
    """Progress, for whoever waits."""
    print(line, file=sys.stderr, flush=True)


def table(answers: dict[tuple[str, str], Answer]) -> str:
    """One row a Python and platform."""
    lines = [f"{'Python':8}{'platform':14}{'pins':>6}{'wheels':>8}{'source only':>13}{'missing':>9}"]
    for (python, name), a in answers.items():
        w, s, m = map(len, a)
        lines.append(f"{python:8}{name:14}{w + s + m:6}{w:8}{s:13}{m:9}")
    return "\n".join(lines)


def notes(answers: dict[tuple[str, str], Answer], index: Index) -> list[str]:
    """What the table stands for, and what is missing."""
    sources = next(iter(answers.values())).sources
    return [
        f"asked: {', '.join(index.hosts)}; of pip's settings left out: {', '.join(sorted(index.left_out)) or 'none'}",
        f"platforms: glibc 2.{GLIBC} or newer, macOS {MACOS} or newer",
        f"source only, pure Python, built where it is installed: {', '.join(sources) or 'none'}",
        *(f"missing for Python {python} on {n}: {pin}" for (python, n), a in answers.items() for pin in a.missing),
    ]


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tools.platforms", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--python", nargs="+", default=PYTHONS, metavar="X.Y", help=f"default: {' '.join(PYTHONS)}")
    parser.add_argument("--platform", nargs="+", default=list(PLATFORMS), choices=PLATFORMS)
    args = parser.parse_args()
    index = Index()
    answers = check(index, list(args.python), args.platform)
    print(table(answers), *notes(answers, index), sep="\n")
    return int(any(a.missing for a in answers.values()))


if __name__ == "__main__":
    raise SystemExit(main())
