"""From a grid to cells to a graph: what there is to do, what it needs, what is done and why the rest is not."""

from collections.abc import Mapping
from functools import partial

from ctp.cells import Dense, Measure, NoRecovery
from ctp.cells.cell import Cell, Compress, Evaluate, Learn, key
from ctp.cells.inputs import Model
from ctp.planning.fits import misfits, missing_tokens, namesakes, windows_of
from ctp.planning.graph import Node, Plan
from ctp.planning.gridfile import Grid, Study
from ctp.planning.gridtext import GridError
from ctp.planning.pins import Pins


def make(grid: Grid, pins: Pins) -> Plan:
    """All cells of a grid, each once. Raises GridError where a cell cannot fit its model."""
    cells: dict[str, Cell] = {}  # by key, inputs before what needs them
    studies: dict[str, list[str]] = {}
    for study in grid.studies:
        for cell in study_cells(study):
            for needed in (*_ancestors(cell), cell):
                k = key(needed)
                cells.setdefault(k, needed)
                if study.name not in studies.setdefault(k, []):
                    studies[k].append(study.name)
    nodes = {
        k: Node(cell, k, tuple(map(key, cell.inputs)), tuple(studies[k]), pins.facts(cell.model))
        for k, cell in cells.items()
    }
    problems = [*namesakes(cells.values(), pins.locations), *_misfits(nodes, pins)]
    if not nodes:
        problems = ["no cell comes out of this grid"]
    if problems:
        raise GridError([f"{grid.path}: {p}" for p in dict.fromkeys(problems)])
    return Plan(grid.name, grid, nodes)


def _misfits(nodes: Mapping[str, Node], pins: Pins) -> list[str]:
    """What cannot work; of a cell and those that need it the first mistake, from which the others follow."""
    found: dict[str, list[str]] = {}
    for k, node in nodes.items():
        found[k] = [problem for i in node.inputs for problem in found[i]]
        found[k] = found[k] or misfits(node.cell, node.facts)
        found[k] = found[k] or missing_tokens(node.cell, partial(pins.specials, node.cell.model))
    return [problem for problems in found.values() for problem in problems]


def warnings(plan: Plan) -> list[str]:
    """What a person should know of a plan before it runs: one line each."""
    without: dict[str, list[str]] = {}  # model -> texts
    for node in plan.nodes.values():
        if node.facts.needs_bos:
            texts = [text.dataset for _, text in windows_of(node.cell) if text.bos != "each"]
            without.setdefault(node.cell.model.name, []).extend(texts)
    return [
        f"{name} needs the beginning-of-text token in front of every window, and the windows of "
        f"{', '.join(dict.fromkeys(texts))} lack it: its perplexity will be far too high; set bos: each there"
        for name, texts in without.items()
        if texts
    ]


def study_cells(study: Study) -> list[Cell]:
    """The cells that one study asks for."""
    return [cell for model in study.models for cell in _model_cells(study, model)]


def _model_cells(study: Study, model: Model) -> list[Cell]:
    compressed = {
        spec.label: [
            Compress(model=model, compression=spec, calibration=text)
            for text in (study.calibration if spec.calibrated else (None,))
        ]
        for spec in study.compressions
    }
    targets = [cell for label in study.targets for cell in compressed[label]]
    sources = [cell for label in study.sources for cell in compressed[label]]
    dense = [Compress(model=model, compression=Dense())]
    learned = [
        Learn(source=source, recovery=recovery)
        for recovery in sorted(study.recoveries, key=lambda r: not r.learned)
        if not isinstance(recovery, NoRecovery)
        for source in (sources if recovery.learned else dense)
    ]
    evaluations = [
        Evaluate(target=target, recovery=recovery, measure=measure)
        for target in targets
        for measure in study.measures
        for recovery in (None, *learned)
        if _measured(study, target, recovery, measure)
    ]
    return [*targets, *learned, *evaluations]


def _measured(study: Study, target: Compress, recovery: Learn | None, measure: Measure) -> bool:
    """Does the study measure this recovery on this target?"""
    if measure.prompts_only and not (recovery and recovery.recovery.in_front):
        return False
    elsewhere = recovery is not None and recovery.recovery.learned and recovery.source != target
    return study.transfer == "all" or not elsewhere


def _ancestors(cell: Cell) -> list[Cell]:
    return [x for i in cell.inputs for x in (*_ancestors(i), i)]
