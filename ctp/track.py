"""`python -m ctp.track sync NAME`: MLflow rebuilt from the store."""

import argparse
import sys

from ctp.common.exit_codes import Exit, epilog, fail
from ctp.common.redact import scrub
from ctp.common.terminal import program, unread
from ctp.console.summary import tell_tracking
from ctp.planning import gridfile
from ctp.planning.gridtext import GridError
from ctp.planning.pins import Pins
from ctp.planning.plan import make
from ctp.scheduling.repair import past_damage
from ctp.storage.remote import StoreError
from ctp.storage.store import Store, default_store
from ctp.tracking.entries import TrackError, tracking_uri
from ctp.tracking.tracker import Tracker


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog=program("ctp.track"), description="Rebuild MLflow from the store.",
                                epilog=epilog(Exit.OK, Exit.USAGE, Exit.UNREACHABLE))  # fmt: skip
    p.add_argument("action", choices=("sync",))
    p.add_argument("grid", metavar="NAME", help="grid/NAME.yaml, or the path of a grid file")
    p.add_argument("--store", default=default_store(), metavar="URI", help="default %(default)s")
    p.add_argument("--set", action="append", default=[], metavar="PATH=VALUE", dest="settings", help="as in ctp.grid")
    p.add_argument("--data", metavar="DIR", help="as in ctp.grid")
    return p


@unread
def main(argv: list[str] | None = None) -> int:
    """Check every run and write from the store what MLflow lacks; returns the exit code."""
    args = parser().parse_args(argv)
    try:
        pins = Pins(args.data)
        plan = make(gridfile.load(args.grid, args.settings, pins), pins)
        store = Store(args.store)
        tracker = Tracker(tracking_uri(store.uri), plan, store)
        written = past_damage(store, lambda: tracker.sync(whole=True))
        if not tracker.knows_grid():
            tracker.begin(f"python -m ctp.track sync {args.grid}")
            tracker.close("FINISHED")
    except (GridError, StoreError, TrackError) as e:
        return fail(Exit.USAGE if isinstance(e, GridError) else Exit.UNREACHABLE, str(e))
    for line in store.damaged:
        print(line, file=sys.stderr)
    tell_tracking(tracker)
    ended = f", {tracker.ended} that dead invocations had left ended" if tracker.ended else ""
    there = len(store.done(plan.refs()))
    print(f"{plan.name}: {written} runs written{ended}, {there} there. MLflow: {scrub(tracker.uri)}")
    return Exit.OK


if __name__ == "__main__":
    sys.exit(main())
