"""The board of a run half-way."""

from ctp.cells.cell import Learn
from ctp.console.board import Board


def learned(graph):
    """The key of the first cell that learns."""
    return next(k for k, n in graph.nodes.items() if isinstance(n.cell, Learn))


def at_work(graph):
    """A board of a run with one cell done, one failed, one being learned at a known pace."""
    board = Board(graph, 10)
    first, second, *_ = graph.nodes
    board.tell({"event": "start", "key": first})
    board.tell({"event": "done", "key": first})
    board.tell({"event": "failed", "key": second, "error": "ValueError: no"})
    board.tell({"event": "start", "key": learned(graph)})
    for step in (0, 10):  # of the first one a run is told after loading; code is compiled until the next
        board.tell({"event": "progress", "key": learned(graph), "step": step, "steps": 100, "loss": 4.0})
    running = board.running[learned(graph)]
    assert running.left() is None
    running.warm -= 10.0  # it told step 10 ten seconds ago
    board.tell(
        {"event": "progress", "key": learned(graph), "step": 30, "steps": 100, "loss": 3.5, "tokens_per_s": 99.0}
    )
    return board
