"""The view of a run on a terminal: stages, cells at work and how far they are, what failed, the machine.

It is drawn anew twice a second. Failures are printed above it, so that they stay. NO_COLOR is heeded, by rich.
"""

import platform
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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

REFRESH = 2.0  # times a second
WIDE = 100  # columns from which on speeds are shown
OTHER_LINES = 12  # of the view, beside those of running cells
RECENT = 3  # cells of which it says that they are done


class View(Printer):
    """Draws what the board says; failures are lines."""

    def __init__(self, board: Board, about: Mapping[str, Any], console: Console) -> None:
        super().__init__(board)
        self.about, self.console = about, console
        models = {str(axes(n.cell)["model"]) for n in board.plan.nodes.values()}
        self.model = f"{models.pop()}_" if len(models) == 1 else ""  # which every name would begin with
        self.recent: deque[tuple[str, str]] = deque(maxlen=RECENT)  # what ended last, and how long it took
        self.ended: Counter[str] = Counter()  # by stage

    def _say(self, what: str, k: str, text: str) -> None:
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
        except Exception as e:  # hours of work do not end for a picture of them
            return Text(f"the view cannot be drawn: {type(e).__name__}: {e}")

    def _drawn(self) -> RenderableType:
        said = self.board.snapshot()
        running = self._running(said["cells"], max(2, self.console.height - OTHER_LINES))
        return Group(self._head(said), *self._stages(), running, *self._ended(), self._foot(), *self._pages())

    def _head(self, said: dict[str, Any]) -> RenderableType:
        ended = said["done"] + said["failed"] + said["skipped"]
        line = Table.grid(padding=(0, 2))
        words = [f"{said[n]} {n}" for n in ("failed", "skipped") if said[n]]
        bar = ProgressBar(total=max(1, said["total"]), completed=ended, width=24)
        line.add_row(Text(self.board.plan.name, style="bold"), bar, f"{ended}/{said['total']} cells",
                     duration(time.time() - said["began"]), Text(", ".join(words), style="red"))  # fmt: skip
        return line

    def _stages(self) -> list[Text]:
        stages = dict.fromkeys(n.stage for n in self.board.plan.nodes.values())
        ended = ", ".join(f"{stage} {self.ended[stage]}" for stage in stages)
        kinds = Counter(self.board.plan.nodes[k].cell.kind for k in list(self.board.running))
        running = ", ".join(f"{n} {kind}" for kind, n in kinds.items()) or "nothing"
        return [Text(f"ended now: {ended}   at work: {running}", style="dim", no_wrap=True, overflow="ellipsis")]

    def _running(self, cells: list[dict[str, Any]], rows: int) -> RenderableType:
        wide = self.console.width >= WIDE
        table = Table(box=None, pad_edge=False, expand=True, show_edge=False, header_style="dim")
        table.add_column("running", ratio=1, no_wrap=True, overflow="ellipsis")
        for name in ("step", "loss", *(("tokens/s",) if wide else ()), "at work", "left"):
            table.add_column(name, justify="right", no_wrap=True)
        for c in cells[:rows]:
            step = f"{c['step']}/{c['steps']}" if "step" in c else ""
            speed = (f"{c['tokens_per_s']:,.0f}" if "tokens_per_s" in c else "",) if wide else ()
            loss = f"{c['loss']:.3f}" if "loss" in c else ""
            left = f"~{duration(c['left'])}" if "left" in c else ""
            name = Text(self._name(c["kind"], c["name"]), style="cyan")
            table.add_row(name, step, loss, *speed, duration(c["seconds"]), left)
        if len(cells) > rows:
            table.add_row(f"and {len(cells) - rows} more")
        return table

    def _ended(self) -> list[RenderableType]:
        return [Text(f"done     {name}  {took}", style="green", no_wrap=True, overflow="ellipsis")
                for name, took in list(self.recent)]  # fmt: skip

    def _foot(self) -> RenderableType:
        a = self.about
        parts = [platform.node(), memory()]
        if a.get("machines", 1) > 1:
            parts.insert(0, f"{a['machines']} machines, {a['cpus']:g} CPUs, {a['gpus']:g} GPUs")
        return Text("  ".join(p for p in parts if p), style="dim", no_wrap=True, overflow="ellipsis")

    def _pages(self) -> list[Text]:
        """Whole, as they are to be copied or clicked on."""
        said = [where(name, self.about.get(name.lower(), "")) for name in ("MLflow", "Ray")]
        return [Text(line, style="dim", overflow="fold") for line in said if line]


def memory() -> str:
    """Memory of this machine in use; empty where the system does not tell."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        total, free = (1024 * int(lines[n].split()[0]) for n in ("MemTotal", "MemAvailable"))
    except (OSError, KeyError, ValueError):
        return ""
    return f"memory {(total - free) / GIB:.1f} of {total / GIB:.1f} GiB"


@contextmanager
def watching(board: Board, about: Mapping[str, Any], console: Console | None = None) -> Iterator[View]:
    """The view while in here; it leaves no trace but what failed. about: MLflow's URI, and the cluster's size, once
    it is known."""
    console = console or Console(highlight=False)
    view = View(board, about, console)
    with Live(view, console=console, refresh_per_second=REFRESH, transient=True):
        yield view
