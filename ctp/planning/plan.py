"""From a grid to cells to a graph: what there is to do, what it needs, what is done and why the rest is not."""

from functools import partial

from ctp.cells import Dense, NoRecovery
from ctp.cells.cell import Cell, Compress, Evaluate, Learn, key
from ctp.planning.fits import misfits, model_of, namesakes, unspoken, windows_of
from ctp.planning.graph import Node, Plan
from ctp.planning.gridfile import Grid, Study
from ctp.planning.gridtext import GridError
from ctp.planning.pins import Pins


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
