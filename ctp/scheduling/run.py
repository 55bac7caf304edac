"""Runs the missing cells of a plan: MLflow, the display, the driver's record and Ray Tune around one walk."""

import contextlib
import math
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ctp.cells.events import Event
from ctp.cells.runtime import Runtime
from ctp.common.exit_codes import Exit, fail, stopped
from ctp.common.redact import scrub
from ctp.console import heartbeat, summary
from ctp.console.board import Board
from ctp.console.progress import Printer
from ctp.planning.graph import Plan
from ctp.planning.states import Outcome
from ctp.scheduling.options import Options
from ctp.scheduling.repair import complete, past_damage
from ctp.storage.drivers import About
from ctp.storage.remote import StoreError
from ctp.storage.store import Store
from ctp.tracking.entries import TrackError

if TYPE_CHECKING:
    from ctp.tracking.tracker import Tracker


def run(plan: Plan, todo: set[str], done: set[str], store: Store, tracker: "Tracker", runtime: Runtime,
        options: Options) -> Exit:  # fmt: skip
    """Run the cells in `todo`, follow them, sum up."""
    from ctp.scheduling.cluster import ResourceError  # Ray takes seconds to import: only where there is work

    tracker.begin(shlex.join(["python", "-m", "ctp.grid", *sys.argv[1:]]), len(todo))
    begun = time.monotonic()
    try:
        outcome = _execute(plan, todo, done, store, tracker, runtime, options)
    except BaseException as e:
        refused = isinstance(e, ResourceError)
        with contextlib.suppress(StoreError, TrackError):
            tracker.close("FAILED" if refused else "KILLED")
        if refused:
            return fail(Exit.USAGE, str(e))
        raise
    summary.summarise(plan, outcome, time.monotonic() - begun, store)
    print(f"Store: {scrub(store.uri)}  MLflow: {scrub(tracker.uri)}", flush=True)
    return _close(outcome, store, tracker, options)


def _execute(plan: Plan, todo: set[str], done: set[str], store: Store, tracker: "Tracker", runtime: Runtime,
             options: Options) -> Outcome:  # fmt: skip
    """The outcome of the cells, whose events go to the display, the driver's record and MLflow meanwhile."""
    from ctp.scheduling import cluster, tune

    board = Board(plan, len(todo))
    about = About(mlflow=tracker.uri, command=shlex.join(sys.argv[1:]))
    look_at_cluster = _every(heartbeat.SECONDS, lambda: cluster.describe(about))

    def on_event(event: Event) -> None:
        look_at_cluster()
        display.show(event)
        tracker.tell(event)

    with (displayed(board, about) as display, heartbeat.beating(store, board, about),
          cluster.join(options.address, options.insecure, lambda: tracker.close("KILLED"))):  # fmt: skip
        return complete(plan, todo, done, store, lambda todo, done: tune.run(
            plan, todo, done, store=store.uri, runtime=runtime, options=options, on_event=on_event,
        ), board.expect)  # fmt: skip


def _every(seconds: float, call: Callable[[], object]) -> Callable[[], None]:
    """Calls `call` when it is called itself, at most once in `seconds`; errors are ignored."""
    last = -math.inf

    def sometimes() -> None:
        nonlocal last
        if time.monotonic() - last >= seconds:
            last = time.monotonic()
            with contextlib.suppress(Exception):
                call()

    return sometimes


def _close(outcome: Outcome, store: Store, tracker: "Tracker", options: Options) -> Exit:
    """Write to MLflow what it lacks, and say what was found damaged meanwhile."""
    bad = bool(outcome.failed or outcome.skipped)
    stopped_itself = not outcome.stopped_by and options.fail_fast and outcome.failed
    interrupted = bool(outcome.unfinished) and not stopped_itself
    known = len(store.damaged)
    past_damage(store, lambda: tracker.close("KILLED" if interrupted else "FAILED" if bad else "FINISHED"))
    summary.tell_tracking(tracker)
    damaged = store.damaged[known:]
    for line in damaged:
        print(line, flush=True)
    if tracker.trouble:
        print(f"MLflow was away for a while ({tracker.trouble}); what it missed has been written now.")
    if interrupted:
        return stopped(Exit.TERMINATED if outcome.stopped_by == signal.SIGTERM else Exit.INTERRUPTED)
    return Exit.FAILED if bad or outcome.unfinished or damaged else Exit.OK


@contextmanager
def displayed(board: Board, about: About) -> Iterator[Printer]:
    """What shows events to people and the board: a live view on a terminal, else a line each."""
    if not sys.stdout.isatty() or os.environ.get("TERM", "dumb") == "dumb":
        yield Printer(board)
        return
    from ctp.console.live import watching  # rich: only on a terminal

    with watching(board, about) as live:
        yield live
