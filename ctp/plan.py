"""From a grid to cells to a graph: what there is to do, what it needs, what is done and why the rest is not."""

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from ctp.fits import misfits, model_of, namesakes, unspoken, windows_of
from ctp.gridfile import Grid, Study
from ctp.gridtext import GridError
from ctp.labels import axes, slug
from ctp.methods import (
    Dense,
    NoRecovery,
)
from ctp.models import Facts
from ctp.names import unknown
from ctp.pins import Pins
from ctp.spec import Cell, Compress, Evaluate, Learn, key
from ctp.store import Store

BUILD, TRANSFER = "build", "transfer"
FAILED = "failed last time"  # how the state of such a cell begins


@dataclass(frozen=True)
class Node:
    """A cell in the graph. `inputs` are keys; `studies` are all that ask for it."""

    cell: Cell
    key: str
    inputs: tuple[str, ...]
    studies: tuple[str, ...]
    facts: Facts

    @property
    def stage(self) -> str:
        """Both stages of a grid: build (compress and learn) and transfer (evaluate)."""
        return TRANSFER if isinstance(self.cell, Evaluate) else BUILD


@dataclass(frozen=True)
class Plan:
    """The graph: key -> node, inputs always before what needs them."""

    name: str
    grid: Grid
    nodes: dict[str, Node] = field(default_factory=dict)

    def cells(self) -> list[Cell]:
        return [n.cell for n in self.nodes.values()]


# ------------------------------------------------------------------ grid -> cells


def make(grid: Grid, pins: Pins) -> Plan:
    """All cells of a grid, each once. Raises GridError where a cell cannot fit its model."""
    wanted: dict[str, tuple[Cell, list[str]]] = {}
    for study in grid.studies:
        for cell in study_cells(study):
            for each in (*_ancestors(cell), cell):
                names = wanted.setdefault(key(each), (each, []))[1]
                if study.name not in names:
                    names.append(study.name)
    nodes = {
        k: Node(cell, k, tuple(key(i) for i in cell.inputs), tuple(names), pins.facts(model_of(cell)))
        for k, (cell, names) in wanted.items()
    }
    told: dict[str, list[str]] = {}  # of a cell and what needs it, the first mistake: the others follow from it
    for n in nodes.values():
        found = [p for i in n.inputs for p in told[i]] or misfits(n.cell, n.facts)
        told[n.key] = found or unspoken(n.cell, partial(pins.specials, model_of(n.cell)))
    alike = namesakes((n.cell for n in nodes.values()), pins.locations)
    problems = [f"{grid.path}: {p}" for p in dict.fromkeys([*alike, *(p for found in told.values() for p in found)])]
    if not nodes:
        problems = [f"{grid.path}: no cell comes out of this grid"]
    if problems:
        raise GridError(problems)
    return Plan(grid.name, grid, nodes)


def warnings(plan: Plan) -> list[str]:
    """What a person should know of a plan before it runs: one line each."""
    without: dict[str, list[str]] = {}
    for node in plan.nodes.values():
        for _, text in windows_of(node.cell) if node.facts.needs_bos else ():
            if text.bos != "each":
                without.setdefault(model_of(node.cell).name, []).append(text.dataset)
    return [
        f"{name} needs the beginning-of-text token in front of every window, and the windows of "
        f"{', '.join(dict.fromkeys(texts))} lack it: its perplexity will be far too high; set bos: each there"
        for name, texts in without.items()
    ]


def study_cells(study: Study) -> list[Cell]:
    """The cells that one study asks for; their inputs come before them."""
    out: list[Cell] = []
    for model in study.models:
        compressed = {
            spec.label: [
                Compress(model=model, compression=spec, calibration=text)
                for text in (study.calibration if spec.calibrated else (None,))
            ]
            for spec in study.compressions
        }
        targets = [c for label in study.targets for c in compressed[label]]
        learned = [
            Learn(source=source, recovery=recovery)
            for recovery in study.recoveries
            if recovery.learned
            for label in study.sources
            for source in compressed[label]
        ]
        dense = Compress(model=model, compression=Dense())
        given = [
            Learn(source=dense, recovery=r) for r in study.recoveries if not r.learned and not isinstance(r, NoRecovery)
        ]
        out += [*targets, *learned, *given]
        for target in targets:
            own = [p for p in learned if study.transfer == "all" or p.source == target]
            out += [
                Evaluate(target=target, recovery=recovery, measure=measure)
                for measure in study.measures
                for recovery in (None, *own, *given)
                if not measure.prompts_only or (recovery is not None and recovery.recovery.in_front)
            ]
    return out


def _ancestors(cell: Cell) -> list[Cell]:
    return [x for i in cell.inputs for x in (*_ancestors(i), i)]


# --------------------------------------------------------------------- slicing


_COMPARE: dict[str, Callable[[Any, Any], bool]] = {
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
    if axis == "study":
        values: list[Any] = list(node.studies)
    else:
        have = axes(node.cell)
        if axis not in have:
            return False
        values = [have[axis]]
    wanted = [_number(x.strip()) for x in text.split(",")] if op in ("=", "!=") else [_number(text)]
    if op == "!=":
        return all(_number(v) != w for v in values for w in wanted)
    try:
        return any(_COMPARE[op](_number(v), w) for v in values for w in wanted)
    except TypeError as e:
        raise GridError([f"--where {axis}{op}{text}: {axis} is not a number"]) from e


def _number(value: Any) -> Any:
    try:
        return float(value)
    except (TypeError, ValueError):
        return value


# ---------------------------------------------------------------------- status


def states(plan: Plan, store: Store) -> dict[str, str]:
    """key -> "done", or why the cell is not done: damaged, failed, interrupted, an input is missing, never ran."""
    done, damaged = store.look(plan.cells())
    failed, started = store.failures(), store.started()
    out: dict[str, str] = {}
    for k, node in plan.nodes.items():
        missing = [i for i in node.inputs if i not in done]
        if k in done:
            out[k] = "done"
        elif k in damaged:
            out[k] = f"damaged: {damaged[k]}"
        elif k in failed:
            out[k] = f"{FAILED}: {failed[k]}"
        elif (step := started.get(store.folder(node.cell).rsplit("/", 1)[-1])) is not None:
            out[k] = f"interrupted at step {step}"
        elif missing:
            out[k] = f"needs {slug(plan.nodes[missing[0]].cell)}"
        else:
            out[k] = "never ran"
    return out


def runnable(plan: Plan, todo: set[str], done: set[str]) -> Mapping[str, str]:
    """key -> reason, of the cells in `todo` that cannot run because an input is neither done nor going to be."""
    blocked: dict[str, str] = {}
    for k, node in plan.nodes.items():
        if k not in todo:
            continue
        for i in node.inputs:
            if i in blocked or (i not in done and i not in todo):
                blocked[k] = f"needs {slug(plan.nodes[i].cell)}"
    return blocked


def again(plan: Plan, state: Mapping[str, str]) -> set[str]:
    """The cells that failed last time, and those they held up that can run once they are done; no others.

    state: as `states` gives it.
    """
    chosen: set[str] = set()
    for k, node in plan.nodes.items():
        held_up = state[k] != "done" and chosen.intersection(node.inputs)
        if state[k].startswith(FAILED) or (held_up and all(state[i] == "done" or i in chosen for i in node.inputs)):
            chosen.add(k)
    return chosen
