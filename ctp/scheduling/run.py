"""Runs the missing cells of a plan: MLflow, the display, the heartbeat and Ray Tune around one walk over the graph."""

import argparse
import contextlib
import math
import os
import shlex
import signal
import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ctp.cells.runtime import Runtime
from ctp.common.messages import one_line
from ctp.common.redact import scrub
from ctp.console import heartbeat, summary
from ctp.console.board import Board
from ctp.machine import signals
from ctp.planning.graph import Plan
from ctp.planning.resources import Resources, gpu_memory
from ctp.planning.states import State
from ctp.scheduling.repair import complete, past_damage
from ctp.storage.remote import StoreError
from ctp.storage.store import Store
from ctp.tracking.entries import TrackError

if TYPE_CHECKING:
    from ctp.tracking.tracker import Tracker
from collections.abc import Iterator
from contextlib import contextmanager

from ctp.console.progress import Printer

OK, FAILED, USAGE, UNREACHABLE, INTERRUPTED, TERMINATED = 0, 1, 2, 3, 130, 143
LOST = signals.LOST
GOES_ON = "running the same command again goes on from here"


def run(plan: Plan, todo: set[str], state: dict[str, State], store: Store, tracker: "Tracker", runtime: Runtime,
        args: argparse.Namespace) -> int:  # fmt: skip
    """Run the missing cells, follow them, sum up."""
    from ctp.scheduling import (
        cluster,
        tune,  # Ray takes seconds to import: only where there is something to run
    )

    tracker.begin(shlex.join(["python", "-m", "ctp.grid", *sys.argv[1:]]), len(todo))
    board = Board(plan, len(todo))
    about: dict[str, Any] = {"mlflow": tracker.uri, "command": shlex.join(sys.argv[1:])}
    begun, looked = time.monotonic(), -math.inf

    def on_event(event: dict[str, Any]) -> None:
        nonlocal looked
        if time.monotonic() - looked >= heartbeat.SECONDS:
            looked = time.monotonic()
            with contextlib.suppress(Exception):  # it is for people to look at: no reason to stop
                about.update(cluster.overview())
        if event["event"] == "notice":  # about the machine, and not about how far a cell is
            teller.announce(event["text"])
            return
        teller.tell(event)
        tracker.tell(event)

    done = {k for k, s in state.items() if s.done}
    try:
        with (telling(board, about) as teller, heartbeat.beating(store, board, about),
              cluster.join(args.address, args.insecure_ray, lambda: tracker.close("KILLED"))):  # fmt: skip
            outcome = complete(plan, todo, done, store, lambda todo, done: tune.run(
                plan, todo, done, store=store.uri, runtime=runtime, address=args.address, fail_fast=args.fail_fast,
                resources=Resources(args.cpus, gpu_memory(args.gpu_memory)), on_event=on_event,
                insecure=args.insecure_ray,
            ), board.expect)  # fmt: skip
    except BaseException as e:
        with contextlib.suppress(StoreError, TrackError):
            tracker.close("FAILED" if isinstance(e, cluster.ResourceError) else "KILLED")
        if isinstance(e, cluster.ResourceError):
            return _fail(USAGE, str(e))
        raise
    interrupted = bool(outcome.unfinished) and bool(outcome.stopped_by or not (args.fail_fast and outcome.failed))
    summary.summarise(plan, outcome, time.monotonic() - begun, store)
    print(f"Store: {scrub(store.uri)}  MLflow: {scrub(tracker.uri)}", flush=True)
    how = "KILLED" if interrupted else "FAILED" if outcome.failed or outcome.skipped else "FINISHED"
    lost = len(store.damaged)
    past_damage(store, lambda: tracker.close(how))
    summary.tell_tracking(tracker)
    for line in store.damaged[lost:]:
        print(line, flush=True)
    if tracker.trouble:
        print(f"MLflow was away for a while ({tracker.trouble}); what it missed has been written now.")
    if interrupted:
        return _stopped(TERMINATED if outcome.stopped_by == signal.SIGTERM else INTERRUPTED)
    return FAILED if outcome.failed or outcome.skipped or outcome.unfinished or store.damaged[lost:] else OK


def _fail(code: int, *lines: str) -> int:
    for line in lines:
        print(f"error: {one_line(scrub(line))}", file=sys.stderr)
    return code


def _stopped(code: int) -> int:
    print(f"{'interrupted' if code == INTERRUPTED else 'terminated'}; {GOES_ON}", file=sys.stderr)
    return code


@contextmanager
def telling(board: Board, about: Mapping[str, Any]) -> Iterator["Printer"]:
    """What tells the board, and people, of events: a live view on a terminal, else a line each."""
    if not sys.stdout.isatty() or os.environ.get("TERM", "dumb") == "dumb":
        yield Printer(board)
        return
    from ctp.console.live import watching  # rich: only where somebody looks on

    with watching(board, about) as live:
        yield live
