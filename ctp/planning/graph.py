"""The graph of a grid: a node for each cell, inputs before what needs them."""

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
