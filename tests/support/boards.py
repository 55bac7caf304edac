"""The board of a run half-way."""

from ctp.cells.cell import Learn
from ctp.cells.events import Done, Failed, Progress, Started
from ctp.console.board import Board


def learned(graph):
    """The key of the first cell that learns."""
    return next(k for k, n in graph.nodes.items() if isinstance(n.cell, Learn))


def at_work(graph):
    """A board of a run with one cell done, one failed, one being learned at a known pace."""
    board = Board(graph, 10)
    first, second, *_ = graph.nodes
    board.update(Started(first))
    board.update(Done(first))
    board.update(Failed(second, "ValueError: no"))
    board.update(Started(learned(graph)))
    for step in (0, 10):  # of the first one a run is told after loading; code is compiled until the next
        board.update(Progress(key=learned(graph), step=step, steps=100, loss=4.0))
    running = board.running[learned(graph)]
    assert running.left() is None
    running.warm -= 10.0  # it told step 10 ten seconds ago
    board.update(Progress(key=learned(graph), step=30, steps=100, loss=3.5, tokens_per_s=99.0))
    return board
