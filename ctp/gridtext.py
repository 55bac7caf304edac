"""The text of a grid file: found, read, built on what it `extends`, changed by `--set`, its definitions filled in."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ctp.names import unknown


class GridError(Exception):
    """What is wrong with a grid file: `problems` holds one line per mistake, each naming its place."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


def grid_folders() -> list[Path]:
    """Where a bare NAME is looked for: ./grid, the checkout's grid, the grids installed with the package."""
    here = Path(__file__).parent
    return [Path("grid"), here.parent / "grid", here / "grids"]


def find(name: str) -> Path:
    """The file of a grid given by name or path. Raises GridError."""
    if name.endswith((".yaml", ".yml")) or "/" in name:
        path = Path(name)
        if not path.is_file():
            raise GridError([f"there is no grid file {name!r}"])
        return path
    for folder in grid_folders():
        if (path := folder / f"{name}.yaml").is_file():
            return path
    names = {p.stem for f in grid_folders() for p in f.glob("*.yaml")}
    raise GridError([unknown("grid", name, names)])


def beside(path: str, folders: Sequence[Path]) -> Path:
    """A path as it stands in a grid file: of the working directory or, where that has none, of the file's folders."""
    given = Path(path).expanduser()
    return next((p for p in (given, *(f / given for f in folders)) if p.exists()), given)


class _Loader(yaml.SafeLoader):
    """YAML with 1e-3 as a number, and a repeated key as an error."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def _unique(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [k.value for k, _ in node.value if k.tag != "tag:yaml.org,2002:merge"]
    for k in keys:
        if keys.count(k) > 1:
            raise yaml.constructor.ConstructorError(None, None, f"the key {k!r} appears twice", node.start_mark)
    loader.flatten_mapping(node)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:map", _unique)


def parse_yaml(text: str) -> Any:
    """YAML as grid files and `--set` understand it. Raises yaml.YAMLError."""
    return yaml.load(text, Loader=_Loader)


def read(path: Path, seen: tuple[Path, ...] = ()) -> tuple[dict[str, Any], list[Path]]:
    """What a file says over what it extends, and the folders of both, its own first. Raises GridError."""
    try:
        raw = parse_yaml(path.read_text())
    except (yaml.YAMLError, OSError, ValueError) as e:  # a date that no calendar has is a ValueError
        raise GridError([f"{path}: {' '.join(str(e).split())}"]) from e
    if not isinstance(raw, dict):
        raise GridError([f"{path}: a grid file is a mapping"])
    if "extends" not in raw:
        return raw, [path.parent]
    base, without = _extends(raw.pop("extends"), path)
    near = path.parent / (base if base.endswith((".yaml", ".yml")) else f"{base}.yaml")
    base_path = near if near.is_file() else find(base)
    if base_path.resolve() in seen:
        raise GridError([f"{path}: extends = {base!r} comes back to itself"])
    below, folders = read(base_path, (*seen, path.resolve()))
    if odd := [str(k) for k in without if k not in below]:
        raise GridError([f"{path}: extends.without: {unknown('key', odd[0], map(str, below))}"])
    whole = merge({k: v for k, v in below.items() if k not in without}, raw)
    _check_new(raw.get("define"), below.get("define"), whole, path)
    return whole, [path.parent, *folders]


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
    if not isinstance(said.get("grid"), str) or said.keys() - {"grid", "without"}:
        raise GridError([f"{path}: extends = {value!r}: a grid, or {{grid: …, without: [keys left out]}}"])
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
        raise GridError([f"--set {setting!r}: write path=value, for example recovery.0.steps=10"])
    if path == "extends":
        raise GridError([f"--set {setting!r}: what a file extends is part of the file"])
    at: Any = raw
    steps = path.split(".")
    named = raw.get("define")
    if steps[0] == "define" and isinstance(named, dict):
        rest = ".".join(steps[1:])
        if not any(rest == str(n) or rest.startswith(f"{n}.") for n in named):
            raise GridError([f"--set {setting}: {unknown('definition', steps[1] if len(steps) > 1 else '', named)}"])
    while steps:
        # A name may hold dots itself (opt-1.3b): the longest that is there is meant.
        known = at if isinstance(at, dict) else {}
        size = next((n for n in range(len(steps), 0, -1) if ".".join(steps[:n]) in known), 1)
        step, steps = ".".join(steps[:size]), steps[size:]
        try:
            index: Any = int(step) if isinstance(at, list) else step
            if not steps:
                at[index] = parse_yaml(text)
            else:
                at = at[index] if isinstance(at, list) else at.setdefault(step, {})
        except yaml.YAMLError as e:
            raise GridError([f"--set {setting}: the value is not YAML: {' '.join(str(e).split())}"]) from e
        except (ValueError, IndexError, TypeError, AttributeError) as e:
            here = path.removesuffix(".".join(["", *steps]))
            kind = f"a list of {len(at)}" if isinstance(at, list) else type(at).__name__
            raise GridError([f"--set {setting}: no {here!r} here (its parent is {kind})"]) from e


# ------------------------------------------------------------------- definitions


def define(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The file with every `$name` replaced by what `define` says of it, and `{from: $name, …}` by that with changes.

    Definitions may use each other. `$$` stands for a dollar sign. Raises GridError with every name that is not defined.
    """
    given = raw.get("define") or {}
    if not isinstance(given, Mapping):
        raise GridError([f"define = {given!r}: a mapping of names to what they stand for"])
    problems: list[str] = []

    def named(name: str, place: str, within: tuple[str, ...]) -> Any:
        if name in within:
            problems.append(f"{place} = '${name}': the definition comes back to itself")
        elif name not in given:
            problems.append(f"{place} = '${name}': {unknown('definition', name, given)}")
        else:
            return filled(given[name], f"define.{name}", (*within, name))
        return None

    def filled(value: Any, place: str, within: tuple[str, ...] = ()) -> Any:
        if isinstance(value, str) and value.startswith("$$"):
            return value[1:]
        if isinstance(value, str) and (match := _NAME.fullmatch(value)):
            return named(match[1], place, within)
        if isinstance(value, list):
            return [filled(v, f"{place}[{i}]", within) for i, v in enumerate(value)]
        if not isinstance(value, Mapping):
            return value
        own = {k: filled(v, f"{place}.{k}" if place else str(k), within) for k, v in value.items()}
        base = own.pop("from", {})
        if not isinstance(base, Mapping):
            problems.append(f"{place}.from = {value['from']!r}: must name the definition of a mapping")
            return None
        return merge(base, own)

    out: dict[str, Any] = filled({k: v for k, v in raw.items() if k != "define"}, "")
    for name in given:
        named(str(name), f"define.{name}", ())
    if problems:
        raise GridError(list(dict.fromkeys(problems)))
    return out


_NAME = re.compile(r"\$([\w.-]+)")
