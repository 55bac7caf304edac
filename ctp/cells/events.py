"""What is reported of a cell while it runs, from the worker to the driver, its display and MLflow."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Started:
    key: str


@dataclass(frozen=True)
class Progress:
    """`step` of `steps` are done; None is what was not measured. A method leaves `key` empty: the worker fills it in.

    loss: nats per token, mean since the last validation; lr: learning rate; tokens_per_s: window tokens trained a
    second; at_once: windows a forward pass, where memory allows fewer than asked for; at: seconds since 1970.
    """

    step: int
    steps: int
    loss: float | None = None
    val_loss: float | None = None
    lr: float | None = None
    tokens_per_s: float | None = None
    best_val_loss: float | None = None
    best_step: int | None = None
    at_once: int | None = None
    key: str = ""
    at: float = field(default_factory=time.time, compare=False)

    def numbers(self) -> dict[str, float]:
        """What was measured, by name."""
        return {n: v for n, v in vars(self).items() if v is not None and n not in ("key", "at")}


@dataclass(frozen=True)
class Notice:
    """A sentence for people, about the machine or the method. `key` as in Progress."""

    text: str
    key: str = ""


@dataclass(frozen=True)
class Drained:
    """The cell stopped because the run does; its state is saved."""

    key: str


@dataclass(frozen=True)
class Done:
    """seconds: what the cell took, where its worker could tell."""

    key: str
    seconds: float | None = None


@dataclass(frozen=True)
class Failed:
    """died: the worker ended with the cell, so that nobody has stored the failure yet."""

    key: str
    error: str
    traceback: str = ""
    died: bool = False


@dataclass(frozen=True)
class Skipped:
    """The cell is not going to run."""

    key: str
    reason: str


Event = Started | Progress | Notice | Drained | Done | Failed | Skipped
OUTCOMES: dict[type, str] = {Done: "done", Failed: "failed", Skipped: "skipped"}  # how a cell's events end
Report = Callable[[Progress | Notice], None]
