"""A grid file, read and validated: YAML in, studies out, one error per mistake.

A study names models, compressions, recoveries and measures; every list below a field is an axis. Keys at the top level
are what all `studies` share; a study in several parts is a list of them; a file without `studies` is one study itself.
"""

import itertools
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import TypeAdapter, ValidationError

from ctp.cells import (
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
from ctp.cells.inputs import Model, Spec, Windows
from ctp.common.messages import shown, unknown
from ctp.common.yaml import odd_values
from ctp.planning import plugins
from ctp.planning.gridtext import GridError, assign, define, find, merge, read
from ctp.planning.pins import Pins

STUDY_KEYS = ("title", "models", "compression", "calibration", "recovery", "sources", "targets", "transfer", "measures")
FILE_KEYS = ("description", "extends", "define", "plugins", "datasets", "studies", *STUDY_KEYS)
Transfer = Literal["all", "own"]
MOST_COMBINATIONS = 4_000  # of the axes of one model, compression, recovery or measure
MOST_CELLS = 100_000  # of a grid


@dataclass(frozen=True)
class Study:
    """One part of a study, validated and pinned. `sources` and `targets` are labels of `compressions`."""

    name: str
    title: str
    models: tuple[Model, ...]
    compressions: tuple[Compression, ...]
    calibration: tuple[Windows, ...]
    recoveries: tuple[Recovery, ...]
    sources: tuple[str, ...]
    targets: tuple[str, ...]
    transfer: Transfer
    measures: tuple[Measure, ...]

    @property
    def size(self) -> int:
        """How many cells it asks for, or a few more."""
        variants = max(1, len(self.calibration))
        sources, targets = len(self.sources) * variants, len(self.targets) * variants
        learned = sum(r.learned for r in self.recoveries)
        prompts = learned * (sources if self.transfer == "all" else 1) + len(self.recoveries) - learned
        return len(self.models) * (targets + learned * sources + targets * len(self.measures) * (1 + prompts))


@dataclass(frozen=True)
class Grid:
    """A validated grid file."""

    name: str
    path: Path
    text: str  # the file after `extends` and `--set`, as YAML
    studies: tuple[Study, ...]
    plugins: Mapping[str, str]  # name -> source of the user's own Python files


def load(name: str, settings: list[str], pins: Pins) -> Grid:
    """Read, override, validate and pin a grid. Raises GridError with every mistake found."""
    path = find(name)
    raw, pins.folders = read(path)
    for setting in settings:
        assign(raw, setting)
    if odd := list(odd_values(raw)):
        raise GridError([f"{path}: {p}" for p in odd])
    text = yaml.safe_dump(raw, sort_keys=False)
    problems: list[str] = [f"{k}: {unknown('key', k, FILE_KEYS)}" for k in raw if k not in FILE_KEYS]
    try:
        raw = define(raw)
    except GridError as e:
        raise GridError([f"{path}: {p}" for p in (*problems, *e.problems)]) from e
    own = plugins.read(raw.get("plugins"), pins.folders, problems)
    problems += [
        f"{k} = {shown(raw[k])}: should be text"
        for k in ("description", "title")
        if not isinstance(raw.get(k), str | None)
    ]
    problems += pins.add_datasets(raw.get("datasets") or {})
    shared = {k: v for k, v in raw.items() if k in STUDY_KEYS}
    found = [
        _study(study, merge(shared, part), where, pins, problems)
        for study, part, where in _parts(raw.get("studies", {path.stem: {}}), "studies" in raw, problems)
    ]
    if problems:
        raise GridError([f"{path}: {p}" for p in _once(problems)])
    if (cells := sum(s.size for s in found if s is not None)) > MOST_CELLS:
        raise GridError([f"{path}: some {cells:,} cells; at most {MOST_CELLS:,}: make several grids of it"])
    return Grid(path.stem, path, text, tuple(s for s in found if s is not None), own)


def _once(problems: list[str]) -> list[str]:
    """Each mistake once: what is wrong with one model or text in several studies is one mistake, named at the first."""
    places: dict[str, list[str]] = {}
    for problem in dict.fromkeys(problems):
        path = re.match(r"[\w.\[\]-]*", problem)
        places.setdefault(problem[path.end() if path else 0 :], []).append(problem)  # the same value, the same mistake
    more = {
        n: f" (and in {n - 1} more place{'s' if n > 2 else ''})" for n in {len(p) for p in places.values()} if n > 1
    }
    return [found[0] + more.get(len(found), "") for found in places.values()]


def _parts(studies: Any, named: bool, problems: list[str]) -> Iterator[tuple[str, dict[str, Any], str]]:
    """(study, its settings, its place in the file) of every part of every study."""
    if not isinstance(studies, dict) or not studies:
        problems.append(f"studies = {shown(studies)}: a mapping of study names to mappings, at least one")
        return
    for study, own in studies.items():
        several = isinstance(own, list)
        for i, part in enumerate(own if several else [own]):
            where = f"studies.{study}{f'[{i}]' if several else ''}." if named else ""
            if isinstance(part, dict):
                problems += [f"{where}{k}: {unknown('key', k, STUDY_KEYS)}" for k in part if k not in STUDY_KEYS]
                yield str(study), part, where
            else:
                problems.append(f"{where[:-1]} = {shown(part)}: a mapping; allowed keys: {', '.join(STUDY_KEYS)}")


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
    if not isinstance(transfer, str) or transfer not in get_args(Transfer):
        problems.append(f"{where}transfer = {shown(transfer)}: allowed: {', '.join(get_args(Transfer))}")
    if len(problems) > before:
        return None
    labels = [c.label for c in compressions]
    if len(set(labels)) < len(labels):
        twice = next(x for x in labels if labels.count(x) > 1)
        problems.append(f"{where}compression: {shown(twice)} appears twice")
    problems += _reported(recoveries, measures, where)
    sources = _labels(raw, "sources", labels, where, problems)
    targets = _labels(raw, "targets", labels, where, problems)
    title = str(raw.get("title") or "")
    return Study(name, title, models, compressions, calibration, recoveries, sources, targets, transfer, measures)


def _reported(recoveries: tuple[Recovery, ...], measures: tuple[Measure, ...], where: str) -> list[str]:
    """Texts that a prompt learns from, or that choose its step, among those that are reported."""
    texts = dict.fromkeys(m.text for m in measures if isinstance(m, Perplexity))
    learned = [r for r in recoveries if isinstance(r, Learned) and not r.on_reported]
    return [
        f"{where}recovery.{field} = {own.dataset} {own.split}: measures report on the same documents; take another "
        "split or skip some, or say on_reported: true"
        for field, own in dict.fromkeys(
            pair for r in learned for pair in (("text", r.text), ("validation", r.validation))
        )
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
            if (several := combinations(item)) > MOST_COMBINATIONS:
                problems.append(f"{place}: its axes have {several:,} combinations; at most {MOST_COMBINATIONS:,}")
                continue
            singles = expand(item)
        except ValueError as e:
            problems.append(f"{place}{e}")
            continue
        for single in singles:
            try:
                yield checker.validate_python(single, context=pins)
            except ValidationError as e:
                problems += [explain(place, single, err, adapter) for err in e.errors(include_url=False)]


def combinations(item: Any) -> int:
    """How many `expand` would give."""
    if isinstance(item, list):
        return sum(map(combinations, item))
    return math.prod(map(combinations, item.values())) if isinstance(item, Mapping) else 1


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
    value = "" if isinstance(error["input"], Mapping) else f" = {shown(error['input'])}"
    return f"{path}{value}: {message}"


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
