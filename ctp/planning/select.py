"""`--where`: the part of a plan whose cells satisfy conditions on their axes."""

import operator
import re
from collections.abc import Callable, Sequence

from ctp.cells.labels import axes
from ctp.common.messages import unknown
from ctp.planning.graph import Node, Plan
from ctp.planning.gridtext import GridError

_COMPARE: dict[str, Callable[..., bool]] = {
    "!=": operator.ne, ">=": operator.ge, "<=": operator.le, "=": operator.eq, ">": operator.gt, "<": operator.lt,
}  # fmt: skip


def where(plan: Plan, expressions: Sequence[str]) -> Plan:
    """The cells for which every condition holds, with the inputs they need.

    A condition is `axis OP value` (= != < > <= >=; `a,b` after = means either); several are joined by ` and `.
    A cell without the axis does not match. Raises GridError on an unknown axis, a condition nobody can read, no match.
    """
    known = {n for node in plan.nodes.values() for n in (*axes(node.cell), "study")}
    tests = []
    for part in (p for e in expressions for p in re.split(r"\s+and\s+", e.strip())):
        match = re.fullmatch(r"\s*(\w+)\s*(!=|>=|<=|=|>|<)\s*([^\s=<>!]\S*)\s*", part)
        if not match:
            raise GridError([f"--where {part!r}: write axis=value, for example source=gptq-3bit and k>=50"])
        axis, op, value = match.groups()
        if axis not in known:
            raise GridError([f"--where {part!r}: {unknown('axis', axis, known)}"])
        tests.append((axis, op, value))
    chosen = {k for k, n in plan.nodes.items() if all(_holds(n, *t) for t in tests)}
    if not chosen:
        raise GridError([f"--where {' and '.join(expressions)}: no cell of {plan.name} is like that"])
    return keep(plan, chosen)


def keep(plan: Plan, keys: set[str]) -> Plan:
    """The plan of these cells and all they need."""
    needed = set(keys)
    for k in reversed(plan.nodes):
        if k in needed:
            needed.update(plan.nodes[k].inputs)
    return Plan(plan.name, plan.grid, {k: n for k, n in plan.nodes.items() if k in needed})


def _holds(node: Node, axis: str, op: str, text: str) -> bool:
    have = axes(node.cell)
    values = node.studies if axis == "study" else [have[axis]] if axis in have else []
    wanted = text.split(",") if op in ("=", "!=") else [text]
    try:
        found = [_COMPARE[op](_number(v), _number(w)) for v in values for w in wanted]
    except TypeError as e:
        raise GridError([f"--where {axis}{op}{text}: {axis} is not a number"]) from e
    return bool(found) and (all(found) if op == "!=" else any(found))


def _number(value: object) -> object:
    """A number as one, anything else as its text."""
    try:
        return float(str(value))
    except ValueError:
        return str(value).strip()
