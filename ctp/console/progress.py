"""What is printed while a grid runs: one line an event. On a terminal, ctp.console.live draws a view instead."""

import time

from ctp.cells.events import Done, Event, Failed, Notice, Progress, Skipped, Started
from ctp.cells.labels import slug
from ctp.common.messages import one_line
from ctp.common.terminal import duration
from ctp.console.board import Board
from ctp.storage.drivers import CellAtWork

EVERY = 10.0  # seconds between two lines about a running cell


class Printer:
    """Prints how cells end and, at most once in EVERY seconds each, how far running ones are."""

    def __init__(self, board: Board) -> None:
        self.board = board
        self.last: dict[str, float] = {}
        self.announced: set[str] = set()

    def show(self, event: Event) -> None:
        """Update the board, and print what there is to say of the event."""
        k, now = event.key, time.monotonic()
        before = self.board.running.get(k)
        self.board.update(event)
        match event:
            case Started():
                self.last[k] = now
            case Progress():
                if now - self.last.setdefault(k, now) >= EVERY:
                    self.last[k] = now
                    self._print("...", k, how_far(self.board.cell(k)))
            case Done():
                self._print("done", k, duration(now - before.begun) if before else "")
            case Failed(error=text):
                self._print("FAILED", k, one_line(text))
            case Skipped(reason=text):
                self._print("skipped", k, one_line(text))
            case Notice(text=text) if text not in self.announced:  # every worker of a machine has the same
                self.announced.add(text)
                self._line(text)

    def _line(self, text: str) -> None:
        print(text, flush=True)

    def _print(self, what: str, k: str, text: str) -> None:
        cell, total = self.board.plan.nodes[k].cell, self.board.total
        count = f"[{self.board.ended.total():>{len(str(total))}}/{total}]"
        print(f"{count} {what:<7} {cell.kind:<8} {slug(cell)}  {text}".rstrip(), flush=True)


def how_far(cell: CellAtWork) -> str:
    """A cell's progress as text; empty where it has not reported any."""
    if cell.step is None:
        return ""
    parts = [
        f"step {cell.step}/{cell.steps}",
        cell.loss is not None and f"loss {cell.loss:.3f}",
        cell.best_val_loss is not None and f"best validation {cell.best_val_loss:.3f}",
        cell.tokens_per_s and f"{cell.tokens_per_s:,.0f} tokens/s",
        cell.at_once is not None and f"for lack of memory {cell.at_once} at once",
        cell.left is not None and f"about {duration(cell.left)} left",
    ]
    return ", ".join(part for part in parts if part)
