"""`--plan --dag`: the grid's graph in Mermaid, cells that are alike drawn as one, so that it can be read."""

from collections import Counter
from collections.abc import Callable, Mapping

from ctp.cells.cell import Cell, Compress, Evaluate, Learn
from ctp.cells.labels import origin
from ctp.planning.graph import Plan

BOXES = 40  # more than these cannot be read: then more cells are drawn as one
_PLAIN = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 -_.,/%+=()")
STYLES = {"done": "fill:#d5f0d5,stroke:#2a7a2a,color:#000", "failed": "fill:#f7d0d0,stroke:#a02020,color:#000",
          "some": "fill:#fdf3cf,stroke:#a07a10,color:#000", "missing": "fill:#eee,stroke:#777,color:#000"}  # fmt: skip
Name = tuple[str, str, str]  # model, kind, what


def _one_by_one(cell: Cell) -> str:
    if isinstance(cell, Compress):
        return cell.compression.label
    if isinstance(cell, Learn):
        return f"{origin(cell)} {cell.recovery.label}"
    assert isinstance(cell, Evaluate)
    won = f"{origin(cell.recovery)} {cell.recovery.recovery.label}" if cell.recovery else "no prompt"
    return f"{won} on {cell.target.compression.label}, {cell.measure.label}"


def _by_source_and_target(cell: Cell) -> str:
    if isinstance(cell, Compress):
        return cell.compression.label
    if isinstance(cell, Learn):
        return f"{cell.recovery.method} through {origin(cell)}" if cell.recovery.learned else cell.recovery.method
    assert isinstance(cell, Evaluate)
    return f"on {cell.target.compression.label}"


def _by_method(cell: Cell) -> str:
    if isinstance(cell, Compress):
        return cell.compression.method
    if isinstance(cell, Learn):
        return cell.recovery.method
    assert isinstance(cell, Evaluate)
    return cell.measure.method


LEVELS: tuple[Callable[[Cell], str], ...] = (_one_by_one, _by_source_and_target, _by_method)


def mermaid(plan: Plan, word: Mapping[str, str]) -> str:
    """A flowchart of at most BOXES boxes, unless that is impossible. word: of each cell, done, failed or another."""
    for level in LEVELS:
        boxes: dict[Name, list[str]] = {}
        for k, node in plan.nodes.items():
            boxes.setdefault((_model(node.cell), node.cell.kind, level(node.cell)), []).append(k)
        if len(boxes) <= BOXES:
            break
    ids = {name: f"n{i}" for i, name in enumerate(boxes)}
    of = {k: ids[name] for name, keys in boxes.items() for k in keys}
    lines = [f"%% {_text(plan.name)}: {len(plan.nodes)} cells", "flowchart LR"]
    for i, model in enumerate(dict.fromkeys(name[0] for name in boxes)):
        lines.append(f'  subgraph m{i}["{_text(model)}"]')
        lines += [f'    {ids[name]}["{_text(name[1])}: {_text(name[2])}<br/>{_counted(boxes[name], word)}"]'
                  for name in boxes if name[0] == model]  # fmt: skip
        lines.append("  end")
    arrows = Counter((of[i], of[k]) for k, node in plan.nodes.items() for i in node.inputs)
    lines += [f"  {a} --> {b}" if n == 1 else f"  {a} -->|{n}| {b}" for (a, b), n in arrows.items()]
    lines += [f"  classDef {name} {style}" for name, style in STYLES.items()]
    lines += [f"  class {ids[name]} {_style(keys, word)}" for name, keys in boxes.items()]
    return "\n".join(lines)


def _model(cell: Cell) -> str:
    while not isinstance(cell, Compress):
        cell = cell.inputs[0]
    return cell.model.name


def _counted(keys: list[str], word: Mapping[str, str]) -> str:
    counts = Counter(word[k] for k in keys)
    cells = "1 cell" if len(keys) == 1 else f"{len(keys)} cells"
    return f"{cells}, {next(iter(counts))}" if len(counts) == 1 else ", ".join(f"{n} {w}" for w, n in counts.items())


def _style(keys: list[str], word: Mapping[str, str]) -> str:
    words = {word[k] for k in keys}
    if "failed" in words:
        return "failed"
    return "done" if words == {"done"} else "some" if "done" in words else "missing"


def _text(text: str) -> str:
    """What Mermaid takes between quotes; every other character by its number."""
    return "".join(c if c in _PLAIN else f"#{ord(c)};" for c in text)
