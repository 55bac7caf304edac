"""What is shown while a grid runs: a line an event, in the order in which things happen; on a terminal a live view."""

import time
from typing import Any

from ctp.cells.labels import slug
from ctp.common.messages import one_line
from ctp.common.terminal import duration, how_far
from ctp.console.board import Board


class Printer:
    """Prints ends and, of cells that take long, how far they are (at most one line in `every` seconds each)."""

    def __init__(self, board: Board, every: float = 10.0) -> None:
        self.board, self.every = board, every
        self.last: dict[str, float] = {}
        self.announced: set[str] = set()

    def tell(self, event: dict[str, Any]) -> None:
        """Tell the board, and print what there is to say of one event."""
        k, kind, now = event["key"], event["event"], time.monotonic()
        before = self.board.running.get(k)
        self.board.tell(event)
        if kind == "start":
            self.last[k] = now
        elif kind == "progress":
            if now - self.last.setdefault(k, now) >= self.every:
                self.last[k] = now
                cell = self.board.running[k]
                self._say("...", k, how_far({**cell.said, "left": cell.left()}))
        else:
            took = duration(now - before.begun) if before else ""
            text = took if kind == "done" else one_line(event["error"])
            self._say({"done": "done", "failed": "FAILED", "skipped": "skipped"}[kind], k, text)

    def announce(self, text: str) -> None:
        """Print what workers find out about their machines, once."""
        if text not in self.announced:
            self.announced.add(text)
            self._line(text)

    def _line(self, text: str) -> None:
        print(text, flush=True)

    def _say(self, what: str, k: str, text: str) -> None:
        cell, total = self.board.plan.nodes[k].cell, self.board.total
        count = f"[{self.board.ended.total():>{len(str(total))}}/{total}]"
        print(f"{count} {what:<7} {cell.kind:<8} {slug(cell)}  {text}".rstrip(), flush=True)
