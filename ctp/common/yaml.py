"""YAML as grid files and `--set` understand it: plain values, within limits that no grid comes near.

The limits keep a plan quick whatever it is given: anchors that repeat each other a billion times, endless brackets, a
file of another kind.
"""

import math
import re
import unicodedata
from collections.abc import Iterator
from typing import Any

import yaml

from ctp.common.messages import shown

MOST_BYTES = 256 * 1024  # of a file
MOST_VALUES = 10_000  # of a file, with every alias and merge key written out
DEEPEST = 40  # mappings and lists within each other
_TURNING = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"  # these change the order in which text is shown
_TOO_DEEP = f"more than {DEEPEST} mappings and lists within each other"
_TOO_MANY = f"more than {MOST_VALUES:,} values"


class _Loader(yaml.SafeLoader):
    """YAML with 1e-3 as a number, dates as text, and a repeated key as an error."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.depth = self.nodes = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.depth += 1
        self.nodes += 1
        event = self.peek_event()
        if self.depth > DEEPEST or self.nodes > MOST_VALUES:
            _refuse(_TOO_DEEP if self.depth > DEEPEST else _TOO_MANY, event.start_mark)
        if tag := getattr(event, "tag", None):
            _refuse(f"the tag {shown(tag)}: text, numbers, lists and mappings need none", event.start_mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def flatten_mapping(self, node: Any) -> None:
        super().flatten_mapping(node)
        if len(node.value) > MOST_VALUES:
            _refuse(_TOO_MANY, node.start_mark)


def _refuse(problem: str, mark: Any) -> None:
    raise yaml.constructor.ConstructorError(None, None, problem, mark)


_DATE = "tag:yaml.org,2002:timestamp"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in known if tag != _DATE]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen = set()
    for k, _ in node.value:
        if k.tag == "tag:yaml.org,2002:merge":
            continue
        if k.tag != "tag:yaml.org,2002:str":
            name = f"{k.value} " if isinstance(k, yaml.ScalarNode) else ""
            _refuse(f"the key {name}is read as {k.tag.rpartition(':')[2]}, not as text: put it in quotes", k.start_mark)
        if k.value in seen:
            _refuse(f"the key {k.value!r} appears twice", k.start_mark)
        seen.add(k.value)
    loader.flatten_mapping(node)
    return loader.construct_mapping(node, deep=True)


def _integer(loader: _Loader, node: yaml.ScalarNode) -> int:
    try:
        value = loader.construct_yaml_int(node) if len(str(node.value)) <= 64 else 2**63
    except ValueError:
        _refuse(f"{shown(node.value)} is no number", node.start_mark)
    if abs(value) >= 2**63:
        _refuse(f"{shown(node.value)}: whole numbers are below 2^63", node.start_mark)
    return value


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)
_Loader.add_constructor("tag:yaml.org,2002:int", _integer)


def parse_yaml(text: str) -> Any:
    """What a text says, every alias in it harmless. Raises ValueError, in one line, naming line and column."""
    try:
        value = yaml.load(text, Loader=_Loader)  # a safe loader
    except yaml.MarkedYAMLError as e:
        mark = e.problem_mark or e.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ValueError(f"{place}{' '.join(str(e.problem or e.context).split())}") from e
    except yaml.YAMLError as e:
        raise ValueError(" ".join(str(e).split())) from e
    except ValueError as e:  # "\\U00110000"
        raise ValueError(f"a value that cannot be read: {e}") from e
    except RecursionError as e:
        raise ValueError(_TOO_DEEP) from e
    _measure(value, {})
    return value


def _measure(value: Any, known: dict[int, tuple[int, int] | None]) -> tuple[int, int]:
    """(values, depth) with every alias written out. Raises ValueError beyond the limits, or where one has no end."""
    if not isinstance(value, dict | list | tuple | set):
        return 1, 0
    if id(value) not in known:
        known[id(value)] = None
        inner = [_measure(v, known) for v in (value.values() if isinstance(value, dict) else value)]
        known[id(value)] = size = 1 + sum(n for n, _ in inner), 1 + max((d for _, d in inner), default=0)
        if size[0] > MOST_VALUES or size[1] > DEEPEST:
            raise ValueError(f"with its aliases written out: {_TOO_DEEP if size[1] > DEEPEST else _TOO_MANY}")
    found = known[id(value)]
    if found is None:
        raise ValueError("an anchor that stands for something with itself inside")
    return found


def odd_values(value: Any, place: str = "") -> Iterator[str]:
    """One line for each value that no setting can have, naming its place: neither text, number, list nor mapping."""
    if isinstance(value, dict):
        for k, v in value.items():
            if bad := _control(k, ""):
                yield f"{f'{place}.' if place else ''}{shown(k)}: {bad} has no place in a key"
            else:
                yield from odd_values(v, f"{place}.{k}" if place else k)
    elif isinstance(value, list):
        for i, v in enumerate(value):
            yield from odd_values(v, f"{place}[{i}]")
    elif isinstance(value, str):
        if bad := _control(value, "\n\t"):
            yield f"{place} = {shown(value)}: {bad} has no place in a text"
    elif isinstance(value, float) and not math.isfinite(value):
        yield f"{place} = {value}: should be a finite number"
    elif value is not None and not isinstance(value, bool | int | float):
        yield f"{place} = {shown(value)}: a {type(value).__name__}; allowed: text, numbers, true, false, null"


def _control(text: str, allowed: str) -> str:
    """The first control character of a text, named; "" without one."""
    odd = (c for c in text if c not in allowed and (unicodedata.category(c) in ("Cc", "Cs") or c in _TURNING))
    return next((f"the control character U+{ord(c):04X}" for c in odd), "")
