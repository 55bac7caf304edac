"""From a grid to cells to a graph: what there is to do, what it needs, what is done and why the rest is not."""

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ctp.gridfile import Grid, Study
from ctp.gridtext import GridError
from ctp.labels import axes, slug
from ctp.methods import Adapter, Checkpoint, Dense, Learned, Neighbours, NoRecovery, RandomPrompt, Solver, SparseGPT
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
        k: Node(cell, k, tuple(key(i) for i in cell.inputs), tuple(names), pins.facts(_model_of(cell)))
        for k, (cell, names) in wanted.items()
    }
    told: dict[str, list[str]] = {}  # of a cell and what needs it, the first mistake: the others follow from it
    for n in nodes.values():
        told[n.key] = [p for i in n.inputs for p in told[i]] or _misfits(n)
    problems = [f"{grid.path}: {p}" for p in dict.fromkeys(p for found in told.values() for p in found)]
    if not nodes:
        problems = [f"{grid.path}: no cell comes out of this grid"]
    if problems:
        raise GridError(problems)
    return Plan(grid.name, grid, nodes)


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


def _model_of(cell: Cell) -> Any:
    while not isinstance(cell, Compress):
        cell = cell.inputs[0]
    return cell.model


def _misfits(node: Node) -> list[str]:
    """What cannot work on this model: windows beyond the context, sizes that do not fit its layers."""
    cell, facts = node.cell, node.facts
    name = _model_of(cell).name
    if isinstance(cell, Compress):
        return _compress_misfits(cell, facts, name)
    if isinstance(cell, Learn):
        return _learn_misfits(cell, facts, name)
    assert isinstance(cell, Evaluate)
    measure, k = cell.measure, getattr(cell.recovery.recovery, "k", 0) if cell.recovery else 0
    fields = [n for n in ("seq_len", "new_tokens") if hasattr(measure, n)]
    fed = "text.seq_len" if hasattr(measure, "text") else " + ".join(fields) or "tokens"
    out = _beyond(f"measures.{fed}", measure.needed_tokens, k, facts, name)
    if isinstance(measure, Neighbours) and measure.top > facts.vocab:
        out.append(f"measures.top = {measure.top}: the vocabulary of {name} has {facts.vocab} entries")
    return out


def _beyond(setting: str, seq_len: int, k: int, facts: Facts, name: str) -> list[str]:
    if facts.context is None or seq_len + k <= facts.context:
        return []
    with_prompt = f" and a prompt of {k}" if k and seq_len <= facts.context else ""
    return [f"{setting} = {seq_len}{with_prompt}: beyond the context of {name}, {facts.context} tokens"]


def _compress_misfits(cell: Compress, facts: Facts, name: str) -> list[str]:
    spec, out = cell.compression, []
    if cell.calibration is not None:
        out += _beyond("calibration.seq_len", cell.calibration.seq_len, 0, facts, name)
    sizes = {"group_size": getattr(spec, "group_size", None)}
    if isinstance(spec, SparseGPT) and spec.pattern:
        sizes["pattern"] = spec.n_of_m[1]
    for setting, size in sizes.items():
        bad = [n for n in facts.in_features if size and n % size]
        if bad:
            out.append(f"compression.{setting} = {size} ({spec.label}): must divide the input sizes of "
                       f"{name}, not so for {bad[0]}")  # fmt: skip
    if isinstance(spec, Checkpoint) and (spec.parameters, spec.width) != (facts.parameters, facts.width):
        out.append(f"compression.path = {spec.path}: {spec.parameters:,} parameters, width {spec.width}; not a "
                   f"compressed {name}, which has {facts.parameters:,} and {facts.width}")  # fmt: skip
    if isinstance(spec, Solver) and not facts.in_features:
        out.append(f"models: {name} has no linear layers in its decoder blocks that could be compressed")
    elif isinstance(spec, Solver) and facts.uncompressible:
        out.append(f"models: {name} cannot be compressed: {facts.uncompressible} is not the weight of an nn.Linear "
                   f"(mixtures of experts and their like are not supported)")  # fmt: skip
    return out


def _learn_misfits(cell: Learn, facts: Facts, name: str) -> list[str]:
    spec, out = cell.recovery, []
    if isinstance(spec, Learned):
        blocks = getattr(spec, "layers", None) or 0
        if blocks > facts.layers:
            out.append(f"recovery.layers = {blocks}: {name} has {facts.layers} decoder blocks")
        out += _beyond("recovery.text.seq_len", spec.text.seq_len, spec.prompt_rows, facts, name)
        out = out or _beyond("recovery.validation.seq_len", spec.validation.seq_len, spec.prompt_rows, facts, name)
        if spec.precision == "fp32" and cell.source.model.dtype == "float16":
            out.append(f"recovery.precision = 'fp32': {name} is float16, whose gradients underflow: use bf16 or fp16")
    elif isinstance(spec, Adapter) and spec.width not in (0, facts.width):
        out.append(f"recovery.path = {spec.path}: a prompt of width {spec.width} does not fit "
                   f"{name}, whose embedding has {facts.width}")  # fmt: skip
    elif isinstance(spec, RandomPrompt) and spec.k > facts.vocab:
        out.append(f"recovery.k = {spec.k}: the vocabulary of {name} has {facts.vocab} entries")
    return out


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
    """key -> "done", or why the cell is not done: never ran, failed, interrupted, or an input is missing."""
    done = store.done(plan.cells())
    failed, started = store.failures(), store.started()
    out: dict[str, str] = {}
    for k, node in plan.nodes.items():
        missing = [i for i in node.inputs if i not in done]
        if k in done:
            out[k] = "done"
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
