"""What is shown while a grid runs: a line an event, in the order in which things happen; on a terminal a live view."""

import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ctp.board import Board
from ctp.labels import slug
from ctp.names import one_line


@contextmanager
def telling(board: Board, about: Mapping[str, Any]) -> Iterator["Printer"]:
    """What tells the board, and people, of events: a live view on a terminal, else a line each."""
    if not sys.stdout.isatty() or os.environ.get("TERM", "dumb") == "dumb":
        yield Printer(board)
        return
    from ctp.live import watching  # rich: only where somebody looks on

    with watching(board, about) as live:
        yield live


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


def how_far(event: dict[str, Any]) -> str:
    """A cell's progress in words; empty where it told none. left: seconds until its last step, where known."""
    if "step" not in event:
        return ""
    parts = [f"step {event['step']}/{event['steps']}"]
    if event.get("loss") is not None:
        parts.append(f"loss {event['loss']:.3f}")
    if event.get("best_val_loss") is not None:
        parts.append(f"best validation {event['best_val_loss']:.3f}")
    if event.get("tokens_per_s"):
        parts.append(f"{event['tokens_per_s']:,.0f} tokens/s")
    if "at_once" in event:
        parts.append(f"for lack of memory {event['at_once']} at once")
    if event.get("left") is not None:
        parts.append(f"about {duration(event['left'])} left")
    return ", ".join(parts)


def duration(seconds: float) -> str:
    """3.2 s, 4 min 05 s, 2 h 07 min, 3 d 04 h."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    days, rest = divmod(minutes, 24 * 60)
    return f"{days:,} d {rest // 60:02d} h"
