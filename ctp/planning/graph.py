"""The graph of a grid: a node for each cell, inputs before what needs them."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

from ctp.cells.cell import Cell, Evaluate
from ctp.models.sources import Facts
from ctp.planning.gridfile import Grid
from ctp.storage.ref import Ref, ref

BUILD, TRANSFER = "build", "transfer"


@dataclass(frozen=True)
class Node:
    """A cell in the graph. `inputs` are keys; `studies` are all that ask for it."""

    cell: Cell
    key: str
    inputs: tuple[str, ...]
    studies: tuple[str, ...]
    facts: Facts

    @property
    def ref(self) -> Ref:
        """Where a store has the cell's artifact."""
        return ref(self.cell)

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

    def refs(self) -> list[Ref]:
        return [n.ref for n in self.nodes.values()]


WeightedPath = tuple[float, list[str]]  # total weight, and the keys of its cells in order


def heaviest_paths(plan: Plan, weights: Mapping[str, float]) -> dict[str, WeightedPath]:
    """Of every cell with a weight, the heaviest path through such cells that begins with it."""
    paths: dict[str, WeightedPath] = {}
    onward: dict[str, WeightedPath] = defaultdict(lambda: (0.0, []))  # of the cells that need it, the heaviest path
    for k in reversed(plan.nodes):
        if k in weights:
            total, cells = onward[k]
            paths[k] = total + weights[k], [k, *cells]
            for i in plan.nodes[k].inputs:
                onward[i] = max(paths[k], onward[i], key=lambda path: path[0])
    return paths


def longest_path(plan: Plan, weights: Mapping[str, float]) -> WeightedPath:
    """The heaviest path of all; with seconds as weights, no number of machines makes the run shorter."""
    return max(reversed(heaviest_paths(plan, weights).values()), key=lambda path: path[0], default=(0.0, []))
