"""What a person at a terminal sees of a run, at several widths; what a pipe gets."""

import io
import re

import pytest
from rich.console import Console
from support.boards import at_work

from ctp.cells.events import Done, Failed, Started
from ctp.cells.labels import slug
from ctp.console import live, progress
from ctp.console.board import Board
from ctp.scheduling import run
from ctp.storage.drivers import About


def frame(board, width, height=24, tell=()):
    console = Console(file=io.StringIO(), width=width, height=height, force_terminal=True, color_system=None,
                      highlight=False)  # fmt: skip
    view = live.View(board, About(mlflow="sqlite:///results/mlflow.db"), console)
    for event in tell:
        view.show(event)
    console.print(view)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_frame_fits_and_says_how_far(graph, width):
    text = frame(at_work(graph), width)
    assert max(map(len, text.splitlines())) <= width
    [line] = [line for line in text.splitlines() if line.startswith("learn")]
    assert re.search(r"30/100 +3\.500 .*~3[45]\.\d s$", line.rstrip())
    assert ("99" in line) is (width >= live.WIDE)
    assert "2/10 cells" in text
    assert "1 failed" in text
    assert re.search(r"memory \d+\.\d of \d+\.\d GiB", text)


def test_pages_are_named_whole_and_only_where_they_answer(graph, listening):
    """Every half second is drawn, and the page asked once."""
    console = Console(file=io.StringIO(), width=60, height=24, force_terminal=True, color_system=None)
    port, asked = listening
    about = About(mlflow="sqlite:////a/folder/mlflow.db", ray=f"http://127.0.0.1:{port}")
    view = live.View(at_work(graph), about, console)
    for _ in range(3):
        console.print(view)
    drawn = console.file.getvalue()
    assert drawn.count(f"\nRay: {about.ray}\n") == 3
    assert drawn.count("\nMLflow: mlflow ui --backend-store-uri ") == 3
    assert drawn.count("sqlite:////a/folder/mlflow.db") == 3
    assert 1 <= asked() <= 2  # the time for which an answer holds may end among them


def test_more_cells_than_lines(graph):
    board = Board(graph, 10)
    for k in graph.nodes:
        board.update(Started(k))
    text = frame(board, 80, height=16)
    assert "and 6 more" in text
    assert len(text.splitlines()) <= 16


def test_failures_stay_and_done_is_told(graph):
    first, second, *_ = graph.nodes
    text = frame(Board(graph, 10), 120, tell=[
        Started(first), Done(first),
        Failed(second, "ValueError: [bold]no[/bold]\x1b[31m"),
    ])  # fmt: skip
    assert f"FAILED compress {slug(graph.nodes[second].cell)}: ValueError: [bold]no[/bold]\\x1b[31m" in text
    assert f"done     compress {slug(graph.nodes[first].cell).removeprefix('tiny-llama_')}" in text


def test_a_pipe_gets_a_line_an_event(graph, capsys):
    first, second, *_ = graph.nodes
    with run.displayed(Board(graph, 10), About()) as display:
        assert type(display) is progress.Printer
        display.show(Started(first))
        display.show(Done(first))
        display.show(Failed(second, "ValueError: no"))
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(rf"\[ 1/10\] done    compress {re.escape(slug(graph.nodes[first].cell))}  0\.0 s", lines[0])
    assert lines[1].endswith("ValueError: no")


def test_no_color_is_heeded(graph, monkeypatch):
    def drawn():
        console = Console(file=io.StringIO(), width=80, force_terminal=True, color_system="standard")
        console.print(live.View(at_work(graph), About(), console))
        return console.file.getvalue()

    coloured = re.compile(r"\x1b\[[\d;]*3[1-7]m")
    assert coloured.search(drawn())
    monkeypatch.setenv("NO_COLOR", "1")
    assert not coloured.search(drawn())
