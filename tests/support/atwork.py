"""What tests share: see the names."""

import contextlib
import socket

import pytest
from support.plans import make
from support.tinygrid import grid

from ctp.cells.cell import Learn
from ctp.cells.events import Done, Failed, Progress, Started
from ctp.console.board import Board
from ctp.storage.store import Store


@pytest.fixture
def graph(tmp_path, llama_folder):
    return make(tmp_path / "g.yaml", **grid(llama_folder))


@pytest.fixture
def store(tmp_path):
    return Store(str(tmp_path / "store"))


def learned(graph):
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


@pytest.fixture
def listening():
    """A port that takes connections, and how many it has been asked for until now."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)

        def asked():
            n = 0
            with contextlib.suppress(TimeoutError):
                while True:
                    server.accept()[0].close()
                    n += 1
            return n

        yield server.getsockname()[1], asked
