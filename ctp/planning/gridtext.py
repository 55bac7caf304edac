"""The text of a grid file: found, read, built on what it `extends`, changed by `--set`, its definitions filled in."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ctp.common.files import expanded, there
from ctp.common.messages import one_line, shown, unknown
from ctp.common.redact import scrub
from ctp.common.yaml import DEEPEST, MOST_BYTES, MOST_VALUES, parse_yaml


class GridError(Exception):
    """What is wrong with a grid file: `problems` holds one line per mistake, each naming its place; `MOST` at most."""

    MOST = 20

    def __init__(self, problems: list[str]) -> None:
        lines = [one_line(scrub(p)) for p in problems[: self.MOST]]
        if len(problems) > self.MOST:
            lines.append(f"and {len(problems) - self.MOST:,} more mistakes")
        super().__init__("\n".join(lines))
        self.problems = lines


def grid_folders() -> list[Path]:
    """Where a bare NAME is looked for: ./grid, the checkout's grid, the grids installed with the package."""
    here = Path(__file__).parents[1]
    return [Path("grid"), here.parent / "grid", here / "grids"]


def find(name: str) -> Path:
    """The file of a grid given by name or path. Raises GridError."""
    if name.endswith((".yaml", ".yml")) or "/" in name:
        path = Path(name)
        if not there(path):
            raise GridError([f"there is no grid file {shown(name)}"])
        if not path.is_file():
            raise GridError([f"the grid file {shown(name)} is no file"])
        return path
    for folder in grid_folders():
        if there(path := folder / f"{name}.yaml"):
            return path
    names = {p.stem for f in grid_folders() for p in f.glob("*.yaml")}
    raise GridError([unknown("grid", name, names)])


def beside(path: str, folders: Sequence[Path]) -> Path:
    """A path as it stands in a grid file: of the working directory or, where that has none, of the file's folders."""
    given = expanded(path)
    return next((p for p in (given, *(f / given for f in folders)) if there(p)), given)


def read(path: Path, seen: tuple[Path, ...] = ()) -> tuple[dict[str, Any], list[Path]]:
    """What a file says over what it extends, and the folders of both, its own first. Raises GridError."""
    raw = _parsed(path)
    if not isinstance(raw, dict):
        kind = "empty" if raw is None else f"a {type(raw).__name__}"
        raise GridError([f"{path}: a grid file is a mapping of settings; this one is {kind}"])
    if "extends" not in raw:
        return raw, [path.parent]
    base, without = _extends(raw.pop("extends"), path)
    near = path.parent / (base if base.endswith((".yaml", ".yml")) else f"{base}.yaml")
    base_path = near if there(near) else find(base)
    if base_path.resolve() in seen:
        raise GridError([f"{path}: extends = {shown(base)} comes back to itself"])
    below, folders = read(base_path, (*seen, path.resolve()))
    if odd := [str(k) for k in without if k not in below]:
        raise GridError([f"{path}: extends.without: {unknown('key', odd[0], map(str, below))}"])
    whole = merge({k: v for k, v in below.items() if k not in without}, raw)
    _check_new(raw.get("define"), below.get("define"), whole, path)
    return whole, [path.parent, *folders]


def _parsed(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
        if len(data) > MOST_BYTES:
            raise ValueError(f"more than {MOST_BYTES:,} bytes: a grid file is a page of settings")
        return parse_yaml(data.decode("utf-8"))
    except UnicodeDecodeError as e:
        raise GridError([f"{path}: byte {e.start} is {data[e.start]:#04x}: not UTF-8 text"]) from e
    except (OSError, ValueError) as e:
        raise GridError([f"{path}: {e}"]) from e


def _check_new(own: Any, below: Any, whole: dict[str, Any], path: Path) -> None:
    """Raise GridError for a definition that is new and used by nothing: a mistyped name, which would change nothing."""
    known = below if isinstance(below, Mapping) else {}
    used = set(_NAME.findall(yaml.safe_dump(whole)))
    for name in own if isinstance(own, Mapping) else ():
        if name not in known and str(name) not in used:
            raise GridError([f"{path}: define.{name}: nothing uses it; {unknown('definition', name, map(str, known))}"])


def _extends(value: Any, path: Path) -> tuple[str, list[str]]:
    """(grid, keys of it that are left out) of `extends: NAME` or `extends: {grid: NAME, without: KEYS}`."""
    said = value if isinstance(value, Mapping) else {"grid": value}
    without = said.get("without", [])
    without = without if isinstance(without, list) else [without]
    plain = all(isinstance(x, str) for x in (said.get("grid"), *without))
    if not plain or said.keys() - {"grid", "without"}:
        raise GridError([f"{path}: extends = {shown(value)}: a grid, or {{grid: …, without: [keys left out]}}"])
    return said["grid"], without


def merge(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    """`top` over `base`: mappings are merged key by key, everything else is replaced."""
    out = dict(base)
    for name, value in top.items():
        old = out.get(name)
        out[name] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return out


def assign(raw: dict[str, Any], setting: str) -> None:
    """Apply one `--set path=value`; the path's steps are keys and list indices, joined by dots. Raises GridError."""
    path, eq, text = setting.partition("=")
    if not eq or not path:
        raise GridError([f"--set {shown(setting)}: write path=value, for example recovery.0.steps=10"])
    if path == "extends":
        raise GridError([f"--set {shown(setting)}: what a file extends is part of the file"])
    at: Any = raw
    steps = path.split(".")
    named = raw.get("define")
    if steps[0] == "define" and isinstance(named, dict):
        rest = ".".join(steps[1:])
        if not any(rest == str(n) or rest.startswith(f"{n}.") for n in named):
            raise GridError([f"--set {setting}: {unknown('definition', steps[1] if len(steps) > 1 else '', named)}"])
    if len(steps) > DEEPEST:
        raise GridError([f"--set {shown(setting)}: a path of {len(steps)} steps; at most {DEEPEST}"])
    try:
        value = parse_yaml(text)
    except ValueError as e:
        raise GridError([f"--set {setting}: the value is not YAML that ctp reads: {e}"]) from e
    while steps:
        # A name may hold dots itself (opt-1.3b): the longest that is there is meant.
        known = at if isinstance(at, dict) else {}
        size = next((n for n in range(len(steps), 0, -1) if ".".join(steps[:n]) in known), 1)
        step, steps = ".".join(steps[:size]), steps[size:]
        try:
            index: Any = int(step) if isinstance(at, list) else step
            if not steps:
                at[index] = value
            else:
                at = at[index] if isinstance(at, list) else at.setdefault(step, {})
        except (ValueError, IndexError, TypeError, AttributeError) as e:
            here = path.removesuffix(".".join(["", *steps]))
            kind = f"a list of {len(at)}" if isinstance(at, list) else type(at).__name__
            raise GridError([f"--set {setting}: no {shown(here)} here (its parent is {kind})"]) from e


def define(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The file with every `$name` replaced by what `define` says of it, and `{from: $name, …}` by that with changes.

    Definitions may use each other. `$$` stands for a dollar sign. Raises GridError with every name that is not defined.
    """
    given = raw.get("define") or {}
    if not isinstance(given, Mapping):
        raise GridError([f"define = {shown(given)}: a mapping of names to what they stand for"])
    problems: list[str] = []
    circles: set[frozenset[str]] = set()
    filled_in = 0

    def named(name: str, place: str, within: tuple[str, ...]) -> Any:
        if len(within) > DEEPEST:
            raise GridError([f"{place}: more than {DEEPEST} definitions that stand for each other in turn"])
        if name in within:
            circle = frozenset(within[within.index(name) :])
            if circle not in circles:
                problems.append(f"{place} = '${name}': the definition comes back to itself")
            circles.add(circle)
        elif name not in given:
            problems.append(f"{place} = '${name}': {unknown('definition', name, given)}")
        else:
            return filled(given[name], f"define.{name}", (*within, name))
        return None

    def filled(value: Any, place: str, within: tuple[str, ...] = ()) -> Any:
        nonlocal filled_in
        filled_in += 1
        if filled_in > 10 * MOST_VALUES:
            raise GridError([f"define: written out, the definitions are more than {10 * MOST_VALUES:,} values"])
        if isinstance(value, str) and value.startswith("$$"):
            return value[1:]
        if isinstance(value, str) and (match := _NAME.fullmatch(value)):
            return named(match[1], place, within)
        if isinstance(value, list):
            return [filled(v, f"{place}[{i}]", within) for i, v in enumerate(value)]
        if not isinstance(value, Mapping):
            return value
        before = len(problems)
        own = {k: filled(v, f"{place}.{k}" if place else str(k), within) for k, v in value.items()}
        base = own.pop("from", {})
        if not isinstance(base, Mapping):
            if len(problems) == before:  # else it is told already
                problems.append(f"{place}.from = {shown(value['from'])}: must name the definition of a mapping")
            return None
        return merge(base, own)

    out: dict[str, Any] = filled({k: v for k, v in raw.items() if k != "define"}, "")
    for name in given:
        named(str(name), f"define.{name}", ())
    if problems:
        raise GridError(list(dict.fromkeys(problems)))
    return out


_NAME = re.compile(r"\$([\w.-]+)")
