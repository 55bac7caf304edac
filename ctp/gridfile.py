"""A grid file, read and validated: YAML in, studies out, one error per mistake.

A study names models, compressions, recoveries and measures; every list below a field is an axis. Keys at the top level
are what all `studies` share; a file without `studies` is one study itself. `extends` builds on another file.
"""

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import TypeAdapter, ValidationError

from ctp.inputs import Model, Spec, Windows
from ctp.methods import (
    AnyCompression,
    AnyMeasure,
    AnyRecovery,
    Compression,
    Learned,
    Measure,
    Method,
    Perplexity,
    Recovery,
)
from ctp.names import unknown
from ctp.pins import Pins

STUDY_KEYS = ("models", "compression", "calibration", "recovery", "sources", "targets", "transfer", "measures")
FILE_KEYS = ("description", "extends", "datasets", "studies", *STUDY_KEYS)
Transfer = Literal["all", "own"]


class GridError(Exception):
    """What is wrong with a grid file: `problems` holds one line per mistake, each naming its place."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


@dataclass(frozen=True)
class Study:
    """One study, validated and pinned. `sources` and `targets` are labels of `compressions`."""

    name: str
    models: tuple[Model, ...]
    compressions: tuple[Compression, ...]
    calibration: tuple[Windows, ...]
    recoveries: tuple[Recovery, ...]
    sources: tuple[str, ...]
    targets: tuple[str, ...]
    transfer: Transfer
    measures: tuple[Measure, ...]


@dataclass(frozen=True)
class Grid:
    """A validated grid file."""

    name: str
    path: Path
    text: str  # the file after `extends` and `--set`, as YAML
    studies: tuple[Study, ...]


# ---------------------------------------------------------------- finding, reading


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


def _read(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    try:
        raw = parse_yaml(path.read_text())
    except (yaml.YAMLError, OSError, ValueError) as e:  # a date that no calendar has is a ValueError
        raise GridError([f"{path}: {' '.join(str(e).split())}"]) from e
    if not isinstance(raw, dict):
        raise GridError([f"{path}: a grid file is a mapping; allowed keys: {', '.join(FILE_KEYS)}"])
    if "extends" not in raw:
        return raw
    base = str(raw.pop("extends"))
    beside = path.parent / (base if base.endswith((".yaml", ".yml")) else f"{base}.yaml")
    base_path = beside if beside.is_file() else find(base)
    if base_path.resolve() in seen:
        raise GridError([f"{path}: extends = {base!r} comes back to itself"])
    return merge(_read(base_path, (*seen, path.resolve())), raw)


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
    for i, step in enumerate(steps):
        last = i == len(steps) - 1
        here = ".".join(steps[: i + 1])
        try:
            index: Any = int(step) if isinstance(at, list) else step
            if last:
                at[index] = parse_yaml(text)
            else:
                at = at[index] if isinstance(at, list) else at.setdefault(step, {})
        except yaml.YAMLError as e:
            raise GridError([f"--set {setting}: the value is not YAML: {' '.join(str(e).split())}"]) from e
        except (ValueError, IndexError, TypeError, AttributeError) as e:
            size = f"a list of {len(at)}" if isinstance(at, list) else type(at).__name__
            raise GridError([f"--set {setting}: no {here!r} here (its parent is {size})"]) from e


# ------------------------------------------------------------------- validation


def load(name: str, settings: list[str], pins: Pins) -> Grid:
    """Read, override, validate and pin a grid. Raises GridError with every mistake found."""
    path = find(name)
    raw = _read(path)
    for setting in settings:
        assign(raw, setting)
    problems: list[str] = [f"{k}: {unknown('key', k, FILE_KEYS)}" for k in raw if k not in FILE_KEYS]
    problems += pins.add_datasets(raw.get("datasets") or {})
    shared = {k: v for k, v in raw.items() if k in STUDY_KEYS}
    studies = raw.get("studies", {path.stem: {}})
    if not isinstance(studies, dict) or not studies or not all(isinstance(s, dict) for s in studies.values()):
        problems.append(f"studies = {studies!r}: a mapping of study names to mappings, at least one")
        studies = {}
    found = []
    for study, own in studies.items():
        where = f"studies.{study}." if "studies" in raw else ""
        problems += [f"{where}{k}: {unknown('key', k, STUDY_KEYS)}" for k in own if k not in STUDY_KEYS]
        found.append(_study(str(study), merge(shared, own), where, pins, problems))
    if problems:
        raise GridError([f"{path}: {p}" for p in dict.fromkeys(problems)])
    text = yaml.safe_dump(raw, sort_keys=False)
    return Grid(path.stem, path, text, tuple(s for s in found if s is not None))


def _study(name: str, raw: dict[str, Any], where: str, pins: Pins, problems: list[str]) -> Study | None:
    def items(field: str, adapter: Any, required: bool = True) -> tuple[Any, ...]:
        return tuple(_items(raw.get(field), where + field, adapter, pins, problems, required))

    before = len(problems)
    models = items("models", Model)
    compressions = items("compression", AnyCompression)
    calibration = items("calibration", Windows, required=any(c.calibrated for c in compressions))
    recoveries = items("recovery", AnyRecovery, required=False)
    measures = items("measures", AnyMeasure, required=False)
    transfer = raw.get("transfer", "all")
    if transfer not in get_args(Transfer):
        problems.append(f"{where}transfer = {transfer!r}: allowed: {', '.join(get_args(Transfer))}")
    if len(problems) > before:
        return None
    labels = [c.label for c in compressions]
    if len(set(labels)) < len(labels):
        twice = next(x for x in labels if labels.count(x) > 1)
        problems.append(f"{where}compression: {twice!r} appears twice")
    problems += _reported(recoveries, measures, where)
    sources = _labels(raw, "sources", labels, where, problems)
    targets = _labels(raw, "targets", labels, where, problems)
    return Study(name, models, compressions, calibration, recoveries, sources, targets, transfer, measures)


def _reported(recoveries: tuple[Recovery, ...], measures: tuple[Measure, ...], where: str) -> list[str]:
    """Texts that a prompt learns from, or that choose its step, among those that are reported."""
    texts = [m.text for m in measures if isinstance(m, Perplexity)]
    return [
        f"{where}recovery.{field} = {own.dataset} {own.split}: measures report on the same documents; take another "
        "split or skip some, or say on_reported: true"
        for recovery in recoveries
        if isinstance(recovery, Learned) and not recovery.on_reported
        for field, own in (("text", recovery.text), ("validation", recovery.validation))
        if any(own.overlaps(text) for text in texts)
    ]


def _labels(raw: dict[str, Any], field: str, labels: list[str], where: str, problems: list[str]) -> tuple[str, ...]:
    given = raw.get(field)
    if given is None or given == "all":
        return tuple(labels)
    chosen = given if isinstance(given, list) else [given]
    problems += [f"{where}{field}: {unknown('compression', x, labels)}" for x in chosen if x not in labels]
    return tuple(chosen)


def _items(raw: Any, where: str, adapter: Any, pins: Pins, problems: list[str], required: bool) -> Iterator[Any]:
    if raw is None or raw == []:
        if required:
            problems.append(f"{where} is missing")
        return
    checker: TypeAdapter[Any] = TypeAdapter(adapter)
    one = not isinstance(raw, list)
    for i, item in enumerate([raw] if one else raw):
        place = where if one else f"{where}[{i}]"
        try:
            singles = expand(item)
        except ValueError as e:
            problems.append(f"{place}{e}")
            continue
        for single in singles:
            try:
                yield checker.validate_python(single, context=pins)
            except ValidationError as e:
                problems += [explain(place, single, err, adapter) for err in e.errors(include_url=False)]


def expand(item: Any, where: str = "") -> list[Any]:
    """Every combination of the axes (lists, at any depth) of one item. Raises ValueError on an axis without values."""
    if isinstance(item, list):
        if not item:
            raise ValueError(f"{where} = []: an axis needs at least one value")
        return [x for part in item for x in expand(part, where)]
    if not isinstance(item, Mapping):
        return [item]
    choices = [[(name, v) for v in expand(value, f"{where}.{name}")] for name, value in item.items()]
    return [dict(combination) for combination in itertools.product(*choices)]


def explain(place: str, item: Any, error: Any, adapter: Any) -> str:
    """One validation error as one line: place, value, what is allowed."""
    path = place + "".join(f".{step}" if isinstance(step, str) else f"[{step}]" for step in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"{path}: {unknown('key', error['loc'][-1], _fields(adapter, item, error['loc'][:-1]))}"
    if error["type"] == "missing":
        return f"{path} is missing"
    message = error["msg"].removeprefix("Value error, ").removeprefix("Input ")
    shown = "" if isinstance(error["input"], Mapping) else f" = {error['input']!r}"
    return f"{path}{shown}: {message}"


def _fields(adapter: Any, item: Any, loc: tuple[Any, ...]) -> list[str]:
    """The field names allowed at `loc` inside an item, following nested specs."""
    kind = get_args(adapter)[0] if get_args(adapter) else adapter
    if isinstance(kind, type) and issubclass(kind, Method) and isinstance(item, Mapping):
        kind = kind.registry[item["method"]]
    for step in loc:
        options = [kind.model_fields[step].annotation]
        options += get_args(options[0])
        kind = next(o for o in options if isinstance(o, type) and issubclass(o, Spec))
    return list(kind.model_fields)
