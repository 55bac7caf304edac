"""`python -m ctp.grid NAME`: plan a grid, run what is missing, say what happened.

Exit codes: 0 everything is done; 1 some cells failed or could not run; 2 bad usage or grid file;
3 store or tracking unreachable; 130 interrupted.
"""

import argparse
import contextlib
import os
import shlex
import sys
import time
from typing import TYPE_CHECKING, Any

from ctp import gridfile, preview
from ctp.gridtext import GridError
from ctp.labels import slug
from ctp.pins import Pins
from ctp.plan import BUILD, TRANSFER, Plan, keep, make, states, where
from ctp.progress import Printer, duration
from ctp.resources import Resources, gpu_memory
from ctp.spec import Runtime
from ctp.store import Store, StoreError, default_store

if TYPE_CHECKING:
    from ctp.track import Tracker
from ctp.runinfo import TrackError, tracking_uri

OK, FAILED, USAGE, UNREACHABLE, INTERRUPTED = 0, 1, 2, 3, 130


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = parser().parse_args(argv)
    try:
        return command(args)
    except GridError as e:
        return _fail(USAGE, *e.problems)
    except (StoreError, TrackError) as e:
        return _fail(UNREACHABLE, str(e))
    except KeyboardInterrupt:
        return _fail(INTERRUPTED, "interrupted; running the same command again goes on from here")


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m ctp.grid",
        description="Run a grid: compress models, learn prompts through them, measure how the prompts transfer. "
        "What is in the store is not run again.",
        epilog="Exit codes: 0 all done, 1 some cells failed, 2 bad usage or grid file, 3 store or tracking "
        "unreachable, 130 interrupted.",
    )
    p.add_argument("grid", metavar="NAME", help="grid/NAME.yaml, or the path of a grid file")
    p.add_argument("--plan", action="store_true", help="say what would run, and run nothing")
    p.add_argument("--stage", choices=(BUILD, TRANSFER), help="run one stage alone: build compresses and learns, "
                   "transfer evaluates")  # fmt: skip
    p.add_argument("--where", action="append", default=[], metavar="EXPR",
                   help="only cells where this holds, and what they need: 'source=gptq-3bit and k>=50'")  # fmt: skip
    p.add_argument("--set", action="append", default=[], metavar="PATH=VALUE", dest="settings",
                   help="override the grid file: recovery.0.steps=10")  # fmt: skip
    p.add_argument("--fail-fast", action="store_true", help="hand out nothing more after the first failure")
    p.add_argument("--store", default=default_store(), metavar="URI",
                   help="where artifacts go: a folder or any fsspec URI (CTP_STORE; default %(default)s)")  # fmt: skip
    p.add_argument("--data", metavar="DIR", help="local copies of c4, wikitext2 and ptb (CTP_DATA_DIR)")
    p.add_argument("--address", default=os.environ.get("RAY_ADDRESS"), metavar="ADDR",
                   help="join a Ray cluster: auto, host:port, ray://… (RAY_ADDRESS; default: its own)")  # fmt: skip
    p.add_argument("--insecure-ray", action="store_true",
                   help="join a cluster that takes work from anyone who can reach it")  # fmt: skip
    p.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU where there is one"
    )
    p.add_argument("--batch", type=_positive, default=4, metavar="N", help="windows a forward pass (default 4)")
    p.add_argument("--cpus", type=_positive, default=1, metavar="N", help="CPU cores a trial (default 1)")
    p.add_argument("--checkpoint-seconds", type=_seconds, default=60.0, metavar="S",
                   help="least time between two saved states of a prompt being learned (default 60)")  # fmt: skip
    p.add_argument("--recompute", action="store_true", help="learn with a third of the memory and a quarter more time")
    p.add_argument("--packed", action="store_true", help="learn prompts through weights that stay packed in memory")
    p.add_argument("--gpu-memory", type=_positive, metavar="GIB",
                   help="memory of one GPU (default: that of the GPU here, else 24)")  # fmt: skip
    p.add_argument("--tflops", type=_positive, default=100, metavar="N",
                   help="10^12 operations a second that a GPU sustains, for the hours of --plan (default 100: "
                   "a third of an A100's peak in bfloat16)")  # fmt: skip
    return p


def command(args: argparse.Namespace) -> int:
    pins = Pins(args.data, provisional=args.plan)
    grid = gridfile.load(args.grid, args.settings, pins)
    whole = make(grid, pins)
    plan = where(whole, args.where) if args.where else whole
    store = Store(args.store)
    if not args.plan:
        store.check_writable()
    state = states(plan, store)
    todo = {k for k, why in state.items() if why != "done"}
    if args.stage:
        todo = {k for k in todo if plan.nodes[k].stage == args.stage}
        plan = keep(plan, {k for k, n in plan.nodes.items() if n.stage == args.stage})
    preview.describe(plan, state, todo)
    if args.plan:
        preview.detail(plan, state, todo, gpu_memory(args.gpu_memory), args.tflops, args.batch)
        if pins.unpinned:
            print(f"not pinned, the hub cannot be reached: {', '.join(pins.unpinned)}: keys are provisional")
        return OK
    from ctp.track import Tracker  # MLflow takes a second to import: a plan needs none

    tracker = Tracker(tracking_uri(store.uri), whole, store)
    tracker.sync(whole=not (args.where or args.stage), trust=True)
    if not todo:
        print(f"Nothing to run. Store: {store.uri}  MLflow: {tracker.uri}")
        return OK
    runtime = Runtime(
        device=args.device, batch=args.batch, checkpoint_seconds=args.checkpoint_seconds, recompute=args.recompute,
        packed=args.packed, locations=pins.locations, datasets=pins.datasets, plugins=dict(plan.grid.plugins),
    )  # fmt: skip
    return run(plan, todo, state, store, tracker, runtime, args)


def run(plan: Plan, todo: set[str], state: dict[str, str], store: Store, tracker: "Tracker", runtime: Runtime,
        args: argparse.Namespace) -> int:  # fmt: skip
    """Run the missing cells, follow them, sum up."""
    from ctp import schedule  # Ray takes seconds to import: only where there is something to run

    tracker.begin(shlex.join(["python", "-m", "ctp.grid", *sys.argv[1:]]))
    printer = Printer(plan, len(todo))
    begun = time.monotonic()

    def on_event(event: dict[str, Any]) -> None:
        printer.tell(event)
        if event["event"] != "skipped":
            tracker.tell(event)

    done = {k for k, why in state.items() if why == "done"}
    try:
        outcome = schedule.run(
            plan, todo, done, store=store.uri, runtime=runtime, address=args.address, fail_fast=args.fail_fast,
            resources=Resources(args.cpus, gpu_memory(args.gpu_memory)), on_event=on_event,
            insecure=args.insecure_ray,
        )  # fmt: skip
    except BaseException as e:
        with contextlib.suppress(StoreError, TrackError):
            tracker.close("FAILED" if isinstance(e, schedule.ResourceError) else "KILLED")
        if isinstance(e, schedule.ResourceError):
            return _fail(USAGE, str(e))
        raise
    interrupted = bool(outcome.unfinished) and not (args.fail_fast and outcome.failed)
    summarise(plan, outcome, time.monotonic() - begun)
    print(f"Store: {store.uri}  MLflow: {tracker.uri}", flush=True)
    tracker.close("KILLED" if interrupted else "FAILED" if outcome.failed or outcome.skipped else "FINISHED")
    if tracker.trouble:
        print(f"MLflow was away for a while ({tracker.trouble}); what it missed has been written now.")
    if interrupted:
        return _fail(INTERRUPTED, "interrupted; running the same command again goes on from here")
    return FAILED if outcome.failed or outcome.skipped or outcome.unfinished else OK


def summarise(plan: Plan, outcome: Any, seconds: float) -> None:
    """What is new, what failed and why."""
    counts = {"done": outcome.done, "failed": outcome.failed, "skipped": outcome.skipped,
              "not started or cut off": outcome.unfinished}  # fmt: skip
    print(f"{plan.name}: " + ", ".join(f"{len(v)} {n}" for n, v in counts.items() if v) + f" in {duration(seconds)}")
    for title, cells in (("failed", outcome.failed), ("skipped", outcome.skipped)):
        for k, reason in cells.items():
            print(f"  {title}: {slug(plan.nodes[k].cell)}: {reason.splitlines()[0]}")
    for error in outcome.errors:
        print(f"  Ray says: {error.splitlines()[-1]}")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be at least 1")
    return value


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}: must be a number of seconds")
    return value


def _fail(code: int, *lines: str) -> int:
    for line in lines:
        print(f"error: {line}" if code != INTERRUPTED else line, file=sys.stderr)
    return code


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code) if code == INTERRUPTED else sys.exit(code)
