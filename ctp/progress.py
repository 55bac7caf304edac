"""What the terminal shows while a grid runs: one plain line an event, in the order in which things happen."""

import time
from typing import Any

from ctp.labels import slug
from ctp.names import one_line
from ctp.plan import Plan


class Printer:
    """Prints starts, ends and, of cells that take long, how far they are (at most one line in `every` seconds each)."""

    def __init__(self, plan: Plan, total: int, every: float = 10.0) -> None:
        self.plan, self.total, self.every = plan, total, every
        self.ended = 0
        self.started: dict[str, float] = {}
        self.last: dict[str, float] = {}
        self.first: dict[str, tuple[float, int]] = {}  # when a cell first told its step: loading is not its pace

    def expect(self, cells: set[str]) -> None:
        """These run again."""
        self.total += len(cells)

    def tell(self, event: dict[str, Any]) -> None:
        """Print what there is to say of one event."""
        k, kind, now = event["key"], event["event"], time.monotonic()
        if kind == "start":
            self.started[k] = self.last[k] = now
        elif kind == "progress":
            begun, step = self.first.setdefault(k, (now, event["step"]))
            if now - self.last.get(k, now) >= self.every:
                self.last[k] = now
                self._say("...", k, _how_far(event, now - begun, event["step"] - step))
        else:
            self.ended += 1
            took = duration(now - self.started[k]) if k in self.started else ""
            text = took if kind == "done" else one_line(event["error"])
            self._say({"done": "done", "failed": "FAILED", "skipped": "skipped"}[kind], k, text)

    def _say(self, what: str, k: str, text: str) -> None:
        cell = self.plan.nodes[k].cell
        count = f"[{self.ended:>{len(str(self.total))}}/{self.total}]"
        print(f"{count} {what:<7} {cell.kind:<8} {slug(cell)}  {text}".rstrip(), flush=True)


def _how_far(event: dict[str, Any], seconds: float, made: int) -> str:
    step, steps = event["step"], event["steps"]
    parts = [f"step {step}/{steps}"]
    if event.get("loss") is not None:
        parts.append(f"loss {event['loss']:.3f}")
    if event.get("best_val_loss") is not None:
        parts.append(f"best validation {event['best_val_loss']:.3f}")
    if event.get("tokens_per_s"):
        parts.append(f"{event['tokens_per_s']:,.0f} tokens/s")
    if "at_once" in event:
        parts.append(f"for lack of memory {event['at_once']} at once")
    if made:
        parts.append(f"about {duration(seconds / made * (steps - step))} left")
    return ", ".join(parts)


def duration(seconds: float) -> str:
    """3.2 s, 4 min 05 s, 2 h 07 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
