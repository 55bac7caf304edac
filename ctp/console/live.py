"""The live view of a run on a terminal: stages, running cells and how far they are, failures, the machine.

It is redrawn twice a second. Failures are printed above it and stay. Rich respects NO_COLOR.
"""

import platform
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ctp.cells.labels import axes, slug
from ctp.common.messages import one_line
from ctp.common.terminal import duration
from ctp.console.board import Board
from ctp.console.pages import where
from ctp.console.progress import Printer
from ctp.planning.resources import GIB
from ctp.storage.drivers import About, CellAtWork

REFRESH = 2.0  # times a second
WIDE = 100  # columns from which on speeds are shown
OTHER_LINES = 12  # of the view, beside those of running cells
RECENT = 3  # finished cells that are listed


class View(Printer):
    """Draws the board, and `about` as far as it is filled in."""

    def __init__(self, board: Board, about: About, console: Console) -> None:
        super().__init__(board)
        self.about, self.console = about, console
        models = {str(axes(n.cell)["model"]) for n in board.plan.nodes.values()}
        self.model = f"{models.pop()}_" if len(models) == 1 else ""  # which every name would begin with
        self.recent: deque[tuple[str, str]] = deque(maxlen=RECENT)  # name and duration of cells that were done last
        self.ended: Counter[str] = Counter()  # by stage

    def _print(self, what: str, k: str, text: str) -> None:
        node = self.board.plan.nodes[k]
        if what == "...":
            return
        self.ended[node.stage] += 1
        if what == "done":
            self.recent.append((self._name(node.cell.kind, slug(node.cell)), text))
        elif what == "FAILED":
            self.console.print(Text(f"FAILED {node.cell.kind} {slug(node.cell)}: {one_line(text)}", style="red"))

    def _line(self, text: str) -> None:
        self.console.print(Text(text))

    def _name(self, kind: str, name: str) -> str:
        return f"{kind:<8} {name.removeprefix(self.model)}"

    def __rich__(self) -> RenderableType:
        try:
            return self._drawn()
        except Exception as e:  # a display error must not end a run
            return Text(f"the view cannot be drawn: {type(e).__name__}: {e}")

    def _drawn(self) -> RenderableType:
        cells = self.board.cells()
        running = self._running(cells, max(2, self.console.height - OTHER_LINES))
        ended = [_row(f"done     {name}  {took}", "green") for name, took in list(self.recent)]
        return Group(self._head(), self._stages(cells), running, *ended, self._foot(), *self._pages())

    def _head(self) -> RenderableType:
        counts = self.board.counts()
        total = counts.pop("total")
        ended = sum(counts.values())
        bad = ", ".join(f"{counts[n]} {n}" for n in ("failed", "skipped") if counts[n])
        line = Table.grid(padding=(0, 2))
        line.add_row(Text(self.board.plan.name, style="bold"), ProgressBar(max(1, total), ended, width=24),
                     f"{ended}/{total} cells", duration(time.time() - self.board.began_at),
                     Text(bad, style="red"))  # fmt: skip
        return line

    def _stages(self, cells: list[CellAtWork]) -> Text:
        stages = dict.fromkeys(n.stage for n in self.board.plan.nodes.values())
        ended = ", ".join(f"{stage} {self.ended[stage]}" for stage in stages)
        running = ", ".join(f"{n} {kind}" for kind, n in Counter(c.kind for c in cells).items()) or "nothing"
        return _row(f"ended now: {ended}   at work: {running}", "dim")

    def _running(self, cells: list[CellAtWork], rows: int) -> RenderableType:
        wide = self.console.width >= WIDE
        table = Table(box=None, pad_edge=False, expand=True, show_edge=False, header_style="dim")
        table.add_column("running", ratio=1, no_wrap=True, overflow="ellipsis")
        for name in ("step", "loss", *(("tokens/s",) if wide else ()), "at work", "left"):
            table.add_column(name, justify="right", no_wrap=True)
        for c in cells[:rows]:
            step = "" if c.step is None else f"{c.step}/{c.steps}"
            speed = ("" if c.tokens_per_s is None else f"{c.tokens_per_s:,.0f}",) if wide else ()
            loss = "" if c.loss is None else f"{c.loss:.3f}"
            left = "" if c.left is None else f"~{duration(c.left)}"
            name = Text(self._name(c.kind, c.name), style="cyan")
            table.add_row(name, step, loss, *speed, duration(c.seconds), left)
        if len(cells) > rows:
            table.add_row(f"and {len(cells) - rows} more")
        return table

    def _foot(self) -> RenderableType:
        memory = psutil.virtual_memory()
        used, total = (memory.total - memory.available) / GIB, memory.total / GIB
        return _row(f"{self.about.cluster}  {platform.node()}  memory {used:.1f} of {total:.1f} GiB".strip(), "dim")

    def _pages(self) -> list[Text]:
        """In full, to be copied or clicked."""
        pages = where("MLflow", self.about.mlflow), where("Ray", self.about.ray)
        return [Text(page, style="dim", overflow="fold") for page in pages if page]


def _row(text: str, style: str) -> Text:
    return Text(text, style=style, no_wrap=True, overflow="ellipsis")


@contextmanager
def watching(board: Board, about: About) -> Iterator[View]:
    """Inside, the view is drawn; only failures stay on the terminal."""
    console = Console(highlight=False)
    view = View(board, about, console)
    with Live(view, console=console, refresh_per_second=REFRESH, transient=True):
        yield view
