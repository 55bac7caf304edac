"""How a run is stopped by a signal to its driver.

The first Ctrl-C, or SIGTERM as clusters and Slurm send it before they kill, drains the run: no cell is begun, prompts
save their state and stop, other cells have `SECONDS` to end. A second one stops at once: what was learned since the
last saved state is lost.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import FrameType

SECONDS = 20.0  # Slurm and Kubernetes kill 30 seconds after they have asked
stopping: list[int] = []  # numbers of the signals that asked this driver to stop
stop_requested = threading.Event()  # in a worker: its driver wants it to stop


class Drained(Exception):
    """The cell was stopped because the run is; its state is saved."""


class Terminated(KeyboardInterrupt):
    """SIGTERM came while nothing was running."""


class RayLost(BaseException):
    """A process that Ray cannot do without died. No Exception: Tune would take it for its own."""


def check() -> None:
    """To be called where a cell's state is saved. Raises Drained if the run is to stop."""
    if stop_requested.is_set():
        raise Drained


def terminable() -> AbstractContextManager[None]:
    """SIGTERM raises Terminated in here."""
    return _handled(signal.SIGTERM, _terminate)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt  # Tune has not begun: it puts its own handler in the place of this one


def _terminate(number: int, frame: FrameType | None) -> None:
    raise Terminated


@contextmanager
def draining(hold: Callable[[], object], tell: Callable[[], object]) -> Iterator[list[int]]:
    """The first SIGINT or SIGTERM in here calls `hold` at once and `tell` in a thread, and Tune is stopped `SECONDS`
    later; the second one stops it at once. Yields the numbers of the signals that came."""
    came: list[int] = []

    def now() -> None:
        os.kill(os.getpid(), signal.SIGUSR1)  # Tune ends on this one, and stops its workers

    def handle(number: int, frame: FrameType | None) -> None:
        came.append(number)
        stopping.append(number)
        if len(came) > 1:
            now()
            return
        rest = f"anything still running after {SECONDS:.0f} s, or at the next Ctrl-C, is stopped"
        print(f"stopping: prompts are saved, short cells end; {rest}", file=sys.stderr, flush=True)
        hold()
        threading.Thread(target=tell, daemon=True).start()  # a call to the cluster may be what the signal cut short
        timer.start()

    stopping.clear()
    timer = threading.Timer(SECONDS, now)
    timer.daemon = True
    with _handled(signal.SIGUSR1, _interrupt), _handled(signal.SIGINT, handle), _handled(signal.SIGTERM, handle):
        try:
            yield came
        finally:
            timer.cancel()


@contextmanager
def _handled(number: int, handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """The handler is installed in here, if this is the main thread, which gets the signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)
