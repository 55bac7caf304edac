"""A grid file, read and validated: YAML in, studies out, one error per mistake.

A study names models, compressions, recoveries and measures; every list below a field is an axis. Keys at the top level
are what all `studies` share; a study in several parts is a list of them; a file without `studies` is one study itself.
"""

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, get_args

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from ctp.cells import Compression, Learned, Measure, Method, Perplexity, Recovery
from ctp.cells.inputs import Model, Spec, Windows
from ctp.common.messages import shown, unknown
from ctp.common.yaml import odd_values
from ctp.planning import plugins
from ctp.planning.gridtext import GridError, Settings, assign, define, find, merge, read
from ctp.planning.pins import Pins

STUDY_KEYS = ("title", "models", "compression", "calibration", "recovery", "sources", "targets", "transfer", "measures")
FILE_KEYS = ("description", "extends", "define", "plugins", "datasets", "studies", *STUDY_KEYS)
TRANSFERS = ("all", "own")
S = TypeVar("S", bound=Spec)
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
    transfer: str
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
    plugins: Mapping[str, str]  # name -> source of the user's Python files


def load(name: str, settings: list[str], pins: Pins) -> Grid:
    """Read, override, validate and pin a grid. Raises GridError with every mistake found."""
    path = find(name)
    raw, pins.folders = read(path)
    for setting in settings:
        assign(raw, setting)
    _raise(path, list(odd_values(raw)))
    text = yaml.safe_dump(raw, sort_keys=False)
    problems = [f"{k}: {unknown('key', k, FILE_KEYS)}" for k in raw if k not in FILE_KEYS]
    try:
        raw = define(raw)
    except GridError as e:
        _raise(path, [*problems, *e.problems])
    sources = plugins.read(raw.get("plugins"), pins.folders, problems)
    for k in ("description", "title"):
        if not isinstance(raw.get(k), str | None):
            problems.append(f"{k} = {shown(raw[k])}: should be text")
    problems += pins.add_datasets(raw.get("datasets") or {})
    studies = _studies(raw, path.stem, pins, problems)
    _raise(path, _once(problems))
    if (cells := sum(study.size for study in studies)) > MOST_CELLS:
        _raise(path, [f"some {cells:,} cells; at most {MOST_CELLS:,}: make several grids of it"])
    return Grid(path.stem, path, text, studies, sources)


def _raise(path: Path, problems: list[str]) -> None:
    if problems:
        raise GridError([f"{path}: {p}" for p in problems])


def _once(problems: list[str]) -> list[str]:
    """Each mistake once: what is wrong with one model or text in several studies is one mistake, named at the first."""
    places: dict[str, list[str]] = {}
    for problem in dict.fromkeys(problems):
        mistake = re.sub(r"^[\w.\[\]-]*", "", problem)  # without its place
        places.setdefault(mistake, []).append(problem)
    more = {1: "", 2: " (and in 1 more place)"}
    return [found[0] + more.get(len(found), f" (and in {len(found) - 1} more places)") for found in places.values()]


def _studies(raw: Settings, name: str, pins: Pins, problems: list[str]) -> tuple[Study, ...]:
    """Every part of every study, over the settings at the file's top, which all share."""
    shared = {k: v for k, v in raw.items() if k in STUDY_KEYS}
    given = raw.get("studies", {name: {}})
    if not isinstance(given, dict) or not given:
        problems.append(f"studies = {shown(given)}: a mapping of study names to mappings, at least one")
        return ()
    out = []
    for study, parts in given.items():
        for i, part in enumerate(parts if isinstance(parts, list) else [parts]):
            place = f"studies.{study}" + (f"[{i}]" if isinstance(parts, list) else "")
            if not isinstance(part, dict):
                problems.append(f"{place} = {shown(part)}: a mapping; allowed keys: {', '.join(STUDY_KEYS)}")
                continue
            where = f"{place}." if "studies" in raw else ""
            problems += [f"{where}{k}: {unknown('key', k, STUDY_KEYS)}" for k in part if k not in STUDY_KEYS]
            out.append(_study(str(study), merge(shared, part), where, pins, problems))
    return tuple(study for study in out if study)


def _study(name: str, raw: Settings, where: str, pins: Pins, problems: list[str]) -> Study | None:
    """One part of a study; None where it has mistakes."""

    def items(field: str, base: type[S], required: bool = False) -> tuple[S, ...]:
        if required and raw.get(field) in (None, []):
            problems.append(f"{where}{field} is missing")
        return tuple(_items(raw.get(field), where + field, base, pins, problems))

    before = len(problems)
    models = items("models", Model, required=True)
    compressions = items("compression", Compression, required=True)
    calibration = items("calibration", Windows, required=any(c.calibrated for c in compressions))
    recoveries = items("recovery", Recovery)
    measures = items("measures", Measure)
    transfer = raw.get("transfer", "all")
    if transfer not in TRANSFERS:
        problems.append(f"{where}transfer = {shown(transfer)}: allowed: {', '.join(TRANSFERS)}")
    if len(problems) > before:
        return None
    labels = [c.label for c in compressions]
    if twice := [label for label, n in Counter(labels).items() if n > 1]:
        problems.append(f"{where}compression: {shown(twice[0])} appears twice")
    problems += _reported(recoveries, measures, where)
    sources, targets = (_labels(raw.get(n), where + n, labels, problems) for n in ("sources", "targets"))
    title, transfer = str(raw.get("title") or ""), str(transfer)
    return Study(name, title, models, compressions, calibration, recoveries, sources, targets, transfer, measures)


def _reported(recoveries: tuple[Recovery, ...], measures: tuple[Measure, ...], where: str) -> list[str]:
    """Texts that a prompt learns from, or that choose its step, among those that are reported."""
    reported = {m.text for m in measures if isinstance(m, Perplexity)}
    learned = [r for r in recoveries if isinstance(r, Learned) and not r.on_reported]
    read = dict.fromkeys(pair for r in learned for pair in (("text", r.text), ("validation", r.validation)))
    return [
        f"{where}recovery.{field} = {text.dataset} {text.split}: measures report on the same documents; take another "
        "split or skip some, or say on_reported: true"
        for field, text in read
        if any(text.overlaps(other) for other in reported)
    ]


def _labels(given: object, place: str, labels: list[str], problems: list[str]) -> tuple[str, ...]:
    if given is None or given == "all":
        return tuple(labels)
    chosen = given if isinstance(given, list) else [given]
    problems += [f"{place}: {unknown('compression', x, labels)}" for x in chosen if x not in labels]
    return tuple(chosen)


def _items(raw: object, where: str, base: type[S], pins: Pins, problems: list[str]) -> Iterator[S]:
    """Every combination of the axes below one field, validated and pinned."""
    listed = raw if isinstance(raw, list) else [] if raw is None else [raw]
    for i, item in enumerate(listed):
        place = f"{where}[{i}]" if isinstance(raw, list) else where
        if (several := combinations(item)) > MOST_COMBINATIONS:
            problems.append(f"{place}: its axes have {several:,} combinations; at most {MOST_COMBINATIONS:,}")
            continue
        try:
            singles = expand(item)
        except ValueError as e:
            problems.append(f"{place}{e}")
            continue
        for single in singles:
            try:
                yield base.model_validate(single, context=pins)
            except ValidationError as e:
                problems += [explain(place, single, error, base) for error in e.errors(include_url=False)]


def combinations(item: object) -> int:
    """How many `expand` would give."""
    if isinstance(item, list):
        return sum(map(combinations, item))
    return math.prod(map(combinations, item.values())) if isinstance(item, Mapping) else 1


def expand(item: object, where: str = "") -> list[object]:
    """Every combination of the axes (lists, at any depth) of one item. Raises ValueError on an axis without values."""
    if isinstance(item, list):
        if not item:
            raise ValueError(f"{where} = []: an axis needs at least one value")
        return [x for part in item for x in expand(part, where)]
    if not isinstance(item, Mapping):
        return [item]
    choices = [[(name, v) for v in expand(value, f"{where}.{name}")] for name, value in item.items()]
    return [dict(combination) for combination in itertools.product(*choices)]


def explain(place: str, item: object, error: ErrorDetails, base: type[Spec]) -> str:
    """One validation error as one line: place, value, what is allowed."""
    path = place + "".join(f".{step}" if isinstance(step, str) else f"[{step}]" for step in error["loc"])
    if error["type"] == "extra_forbidden":
        *parents, name = error["loc"]
        return f"{path}: {unknown('key', name, _fields(base, item, parents))}"
    if error["type"] == "missing":
        return f"{path} is missing"
    message = error["msg"].removeprefix("Value error, ").removeprefix("Input ")
    value = "" if isinstance(error["input"], Mapping) else f" = {shown(error['input'])}"
    return f"{path}{value}: {message}"


def _fields(base: type[Spec], item: object, parents: Sequence[int | str]) -> list[str]:
    """The field names allowed below `parents` inside an item, following nested specs."""
    kind = base
    if issubclass(base, Method) and isinstance(item, Mapping):
        kind = base.registry[item["method"]]
    for step in parents:
        annotation = kind.model_fields[str(step)].annotation
        options = (annotation, *get_args(annotation))
        kind = next(o for o in options if isinstance(o, type) and issubclass(o, Spec))
    return list(kind.model_fields)
