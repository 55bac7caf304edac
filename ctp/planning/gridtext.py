"""The text of a grid file: found, read, built on what it `extends`, changed by `--set`, its definitions filled in."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from ctp.common.files import expanded, there
from ctp.common.messages import one_line, shown, unknown
from ctp.common.redact import scrub
from ctp.common.yaml import DEEPEST, MOST_BYTES, MOST_VALUES, parse_yaml

Settings = dict[str, object]  # of a grid file, as YAML gives them
_NAME = re.compile(r"\$([\w.-]+)")


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


def read(path: Path, seen: tuple[Path, ...] = ()) -> tuple[Settings, list[Path]]:
    """A file's settings over those of the file it extends, and the folders of both, its own first. Raises GridError."""
    raw = _parse_file(path)
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


def _parse_file(path: Path) -> Settings:
    try:
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
        if len(data) > MOST_BYTES:
            raise ValueError(f"more than {MOST_BYTES:,} bytes: a grid file is a page of settings")
        raw: object = parse_yaml(data.decode("utf-8"))
        if isinstance(raw, dict):
            return raw
        kind = "empty" if raw is None else f"a {type(raw).__name__}"
        raise ValueError(f"a grid file is a mapping of settings; this one is {kind}")
    except UnicodeDecodeError as e:
        raise GridError([f"{path}: byte {e.start} is {data[e.start]:#04x}: not UTF-8 text"]) from e
    except (OSError, ValueError) as e:
        raise GridError([f"{path}: {e}"]) from e


def _check_new(new: object, below: object, whole: Settings, path: Path) -> None:
    """Raise GridError for a new definition that nothing uses: a mistyped name, which would change nothing."""
    known = below if isinstance(below, Mapping) else {}
    used = set(_NAME.findall(yaml.safe_dump(whole)))
    for name in new if isinstance(new, Mapping) else ():
        if name not in known and str(name) not in used:
            raise GridError([f"{path}: define.{name}: nothing uses it; {unknown('definition', name, map(str, known))}"])


def _extends(value: object, path: Path) -> tuple[str, list[str]]:
    """(grid, keys of it that are left out) of `extends: NAME` or `extends: {grid: NAME, without: KEYS}`."""
    given = value if isinstance(value, Mapping) else {"grid": value}
    grid, without = given.get("grid"), given.get("without", [])
    without = without if isinstance(without, list) else [without]
    if not all(isinstance(x, str) for x in (grid, *without)) or given.keys() - {"grid", "without"}:
        raise GridError([f"{path}: extends = {shown(value)}: a grid, or {{grid: …, without: [keys left out]}}"])
    return str(grid), without


def merge(base: Mapping[str, object], top: Mapping[str, object]) -> Settings:
    """`top` over `base`: mappings are merged key by key, everything else is replaced."""
    out = dict(base)
    for name, value in top.items():
        old = out.get(name)
        out[name] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return out


def assign(raw: Settings, setting: str) -> None:
    """Apply one `--set path=value`; the path's steps are keys and list indices, joined by dots. Raises GridError."""
    path, value = _parse_setting(raw, setting)
    at: object = raw
    steps = path.split(".")
    while steps:
        name, steps = _next_name(steps, at)
        if isinstance(at, dict):
            at[name] = inner = at.get(name, {}) if steps else value
        elif isinstance(at, list) and re.fullmatch("-?[0-9]{1,9}", name) and -len(at) <= int(name) < len(at):
            at[int(name)] = inner = at[int(name)] if steps else value
        else:
            place = path.removesuffix(".".join(["", *steps]))
            kind = f"a list of {len(at)}" if isinstance(at, list) else type(at).__name__
            raise GridError([f"--set {setting}: no {shown(place)} here (its parent is {kind})"])
        at = inner


def _parse_setting(raw: Settings, setting: str) -> tuple[str, object]:
    """The path and the value of `path=value`."""
    path, equals, text = setting.partition("=")
    steps, definitions = path.split("."), raw.get("define")
    if not equals or not path:
        raise GridError([f"--set {shown(setting)}: write path=value, for example recovery.0.steps=10"])
    if path == "extends":
        raise GridError([f"--set {shown(setting)}: what a file extends is part of the file"])
    if steps[0] == "define" and isinstance(definitions, dict):
        name = ".".join(steps[1:])
        if not any(f"{name}.".startswith(f"{n}.") for n in definitions):
            raise GridError([f"--set {setting}: {unknown('definition', ''.join(steps[1:2]), definitions)}"])
    if len(steps) > DEEPEST:
        raise GridError([f"--set {shown(setting)}: a path of {len(steps)} steps; at most {DEEPEST}"])
    try:
        return path, parse_yaml(text)
    except ValueError as e:
        raise GridError([f"--set {setting}: the value is not YAML that ctp reads: {e}"]) from e


def _next_name(steps: list[str], at: object) -> tuple[str, list[str]]:
    """The next key or index, and the steps after it. A key may hold dots itself (opt-1.3b): the longest there is."""
    for size in range(len(steps), 1, -1):
        if isinstance(at, dict) and (name := ".".join(steps[:size])) in at:
            return name, steps[size:]
    return steps[0], steps[1:]


def define(raw: Settings) -> Settings:
    """The file with every `$name` replaced by its definition in `define`, and `{from: $name, …}` by that with changes.

    Definitions may use each other. `$$` stands for a dollar sign. Raises GridError with every name that is not defined.
    """
    definitions = raw.get("define") or {}
    if not isinstance(definitions, Mapping):
        raise GridError([f"define = {shown(definitions)}: a mapping of names to what they stand for"])
    filling = _Filling(definitions)
    out = filling.mapping({k: v for k, v in raw.items() if k != "define"}, "", ())
    for name in definitions:
        filling.definition(str(name), f"define.{name}", ())
    if filling.problems or out is None:
        raise GridError(list(dict.fromkeys(filling.problems)))
    return out


class _Filling:
    """Replaces names by definitions; mistakes go to `problems`. `within`: the definitions that a value is part of."""

    def __init__(self, definitions: Mapping[str, object]) -> None:
        self.definitions = definitions
        self.problems: list[str] = []
        self.circles: set[frozenset[str]] = set()
        self.values = 0

    def value(self, value: object, place: str, within: tuple[str, ...]) -> object:
        self.values += 1
        if self.values > 10 * MOST_VALUES:
            raise GridError([f"define: written out, the definitions are more than {10 * MOST_VALUES:,} values"])
        if isinstance(value, str):
            name = _NAME.fullmatch(value)
            if name:
                return self.definition(name[1], place, within)
            return value[1:] if value.startswith("$$") else value
        if isinstance(value, list):
            return [self.value(v, f"{place}[{i}]", within) for i, v in enumerate(value)]
        return self.mapping(value, place, within) if isinstance(value, Mapping) else value

    def mapping(self, value: Mapping[str, object], place: str, within: tuple[str, ...]) -> Settings | None:
        before = len(self.problems)
        filled = {k: self.value(v, f"{place}.{k}".removeprefix("."), within) for k, v in value.items()}
        base = filled.pop("from", {})
        if isinstance(base, Mapping):
            return merge(base, filled)
        if len(self.problems) == before:  # else the mistake in `from` is among them
            self.problems.append(f"{place}.from = {shown(value['from'])}: must name the definition of a mapping")
        return None

    def definition(self, name: str, place: str, within: tuple[str, ...]) -> object:
        if len(within) > DEEPEST:
            raise GridError([f"{place}: more than {DEEPEST} definitions that stand for each other in turn"])
        if name in within:
            circle = frozenset(within[within.index(name) :])
            if circle not in self.circles:
                self.problems.append(f"{place} = '${name}': the definition comes back to itself")
            self.circles.add(circle)
        elif name not in self.definitions:
            self.problems.append(f"{place} = '${name}': {unknown('definition', name, self.definitions)}")
        else:
            return self.value(self.definitions[name], f"define.{name}", (*within, name))
        return None
