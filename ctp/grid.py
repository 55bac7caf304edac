"""`python -m ctp.grid NAME`: plan a grid, run what is missing, sum up. `ctp.common.exit_codes` has the exit codes."""

import argparse
import json
import os
import signal
import sys
from collections.abc import Sequence
from functools import partial
from typing import NoReturn

from ctp.cells.runtime import Runtime
from ctp.common.exit_codes import AT_ONCE, Exit, epilog, fail, stopped
from ctp.common.messages import one_line
from ctp.common.redact import scrub
from ctp.common.terminal import program, unread
from ctp.console import explain, preview, status, summary
from ctp.console.arguments import number, positive, uri
from ctp.machine import signals
from ctp.machine.device import has_gpu
from ctp.planning import cost, gridfile
from ctp.planning.graph import BUILD, TRANSFER, Plan
from ctp.planning.gridtext import GridError
from ctp.planning.pins import Pins
from ctp.planning.plan import make
from ctp.planning.resources import Resources, cores, gpu_memory
from ctp.planning.select import keep, where
from ctp.planning.states import State, again, states, undone
from ctp.scheduling.options import Options
from ctp.scheduling.repair import past_damage
from ctp.scheduling.run import run
from ctp.storage.remote import StoreError
from ctp.storage.store import Store, default_store
from ctp.tracking.entries import TrackError, tracking_uri

TFLOPS = 100  # that a GPU is assumed to sustain


@unread
def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = parser().parse_args(argv)
    try:
        with signals.terminable():
            return command(args)
    except GridError as e:
        return fail(Exit.USAGE, *e.problems)
    except (StoreError, TrackError) as e:
        return fail(Exit.UNREACHABLE, str(e))
    except signals.RayLost as e:
        if signals.stopping:  # a signal to a whole group of processes ends Ray's as well
            return stopped(Exit.TERMINATED if signals.stopping[0] == signal.SIGTERM else Exit.INTERRUPTED)
        return fail(Exit.RAY_LOST, str(e))
    except KeyboardInterrupt as e:
        return stopped(Exit.TERMINATED if isinstance(e, signals.Terminated) else Exit.INTERRUPTED)


class _Parser(argparse.ArgumentParser):
    """Bad usage in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(Exit.USAGE, f"error: {one_line(scrub(message))}; --help says what is allowed\n")


def parser() -> argparse.ArgumentParser:
    p = _Parser(
        prog=program("ctp.grid"),
        description="Run a grid: compress models, learn prompts through them, measure how the prompts transfer. "
        "What is in the store is not run again.",
        epilog="A cell that fails stops only those that need it. Its line in the summary says why, and which file has "
        "the traceback; MLflow has its run as FAILED. The next run tries it again, with whatever else is missing; "
        f"--retry-failed tries nothing else. {epilog(*Exit)} "
        "The first Ctrl-C or SIGTERM saves prompts and lets short cells end, for at most 20 seconds; the second stops "
        "at once.",
    )
    p.add_argument("grid", metavar="NAME", help="grid/NAME.yaml, or the path of a grid file")
    _add_what(p)
    _add_how(p)
    return p


def _add_what(p: argparse.ArgumentParser) -> None:
    """Options that say which cells, and what to do with them."""
    p.add_argument("--plan", action="store_true", help="say what would run, and run nothing")
    p.add_argument("--status", action="store_true", help="say what is done, failed and running, from any machine that "
                   "reads the store, and run nothing")  # fmt: skip
    p.add_argument("--watch", action="store_true", help="with --status: say it again every few seconds")
    p.add_argument("--explain", metavar="CELL", help="all that is known of one cell, named by its line's name, its key "
                   "or words that only it has")  # fmt: skip
    p.add_argument("--json", action="store_true", help="with --plan, --status and --explain: for programs")
    p.add_argument("--stage", choices=(BUILD, TRANSFER), help="run one stage alone: build compresses and learns, "
                   "transfer evaluates")  # fmt: skip
    p.add_argument("--where", action="append", default=[], metavar="EXPR",
                   help="only cells where this holds, and what they need: 'source=gptq-3bit and k>=50'")  # fmt: skip
    p.add_argument("--set", action="append", default=[], metavar="PATH=VALUE", dest="settings",
                   help="override the grid file: recovery.0.steps=10")  # fmt: skip
    p.add_argument("--retry-failed", action="store_true", help="run the cells that failed last time and what they "
                   "held up, and nothing else; without it they run again too, with all that is missing")  # fmt: skip
    p.add_argument("--fail-fast", action="store_true", help="hand out nothing more after the first failure")


def _add_how(p: argparse.ArgumentParser) -> None:
    """Options that say where and how they run."""
    p.add_argument("--store", type=uri, default=default_store(), metavar="URI",
                   help="where artifacts go: a folder or any fsspec URI (CTP_STORE; default %(default)s)")  # fmt: skip
    p.add_argument("--data", metavar="DIR", help="local copies of c4, wikitext2 and ptb (CTP_DATA_DIR)")
    p.add_argument("--address", default=os.environ.get("RAY_ADDRESS"), metavar="ADDR",
                   help="join a Ray cluster: auto, host:port, ray://… (RAY_ADDRESS; default: its own)")  # fmt: skip
    p.add_argument("--insecure-ray", action="store_true",
                   help="join a cluster that takes work from anyone who can reach it")  # fmt: skip
    p.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU where there is one"
    )
    p.add_argument("--batch", type=positive, default=4, metavar="N", help="windows a forward pass (default 4)")
    p.add_argument("--cpus", type=positive, default=1, metavar="N", help="CPU cores a trial (default 1)")
    p.add_argument("--checkpoint-seconds", type=partial(number, what="a number of seconds"), default=60.0, metavar="S",
                   help="least time between two saved states of a prompt being learned (default 60)")  # fmt: skip
    p.add_argument("--recompute", action="store_true", help="learn with a third of the memory and a quarter more time")
    p.add_argument("--packed", action="store_true", help="learn prompts through weights that stay packed in memory")
    p.add_argument("--gpu-memory", type=positive, metavar="GIB",
                   help="memory of one GPU (default: that of the GPU here, else 24)")  # fmt: skip
    p.add_argument("--tflops", type=positive, metavar="N",
                   help="10^12 operations a second that a GPU sustains, for the times of --plan (default 100, a third "
                   "of an A100's peak in bfloat16; without a GPU here, the CPU's measured rate)")  # fmt: skip
    p.add_argument("--gpu-hour-price", type=number, metavar="P", help="with --plan: say what it costs, at so much for "
                   "an hour of one GPU")  # fmt: skip


def command(args: argparse.Namespace) -> Exit:
    """Plan the grid, and do what `args` ask for: show it, or run it."""
    _check_usage(args)
    looks = args.plan or args.status or args.explain is not None
    pins = Pins(args.data, provisional=looks)
    whole = make(gridfile.load(args.grid, args.settings, pins), pins)
    plan = where(whole, args.where) if args.where else whole
    store = Store(args.store)
    if args.status:
        status.show(plan, store, args.json, args.watch)
    elif args.explain is not None:
        explain.show(whole, args.explain, store, tracking_uri(store.uri), args.json)
    elif args.plan:
        _foresee(args, plan, store, pins.unpinned)
    else:
        return _run(args, whole, plan, store, pins)
    return Exit.OK


def _check_usage(args: argparse.Namespace) -> None:
    """Raises GridError where one option excludes another."""
    looks = sum((args.plan, args.status, args.explain is not None))
    if looks > 1:
        raise GridError(["--plan, --status and --explain: one of them"])
    if args.json and not looks:
        raise GridError(["--json is for --plan, --status and --explain"])
    if args.watch and not args.status:
        raise GridError(["--watch is for --status"])


def _selected(args: argparse.Namespace, plan: Plan, state: dict[str, State]) -> tuple[Plan, set[str]]:
    """The plan of the stage that was asked for, and the cells of it to run."""
    todo = again(plan, state) if args.retry_failed else undone(state)
    part = keep(plan, _in_stage(plan, set(plan.nodes), args.stage)) if args.stage else plan
    return part, _in_stage(plan, todo, args.stage)


def _in_stage(plan: Plan, keys: set[str], stage: str | None) -> set[str]:
    return {k for k in keys if stage in (None, plan.nodes[k].stage)}


def _foresee(args: argparse.Namespace, plan: Plan, store: Store, unpinned: Sequence[str]) -> None:
    """--plan: print what would run."""
    state = states(plan, store)
    plan, todo = _selected(args, plan, state)
    seen = preview.look(plan, state, todo, store, _assumed(args))
    if args.json:
        print(json.dumps(preview.as_json(seen, list(unpinned))))
        return
    preview.describe(plan, seen.state, todo)
    preview.detail(seen)
    if unpinned:
        print(f"not pinned, the hub cannot be reached: {', '.join(unpinned)}: keys are provisional")


def _assumed(args: argparse.Namespace) -> preview.Assumed:
    """The machine that --plan estimates times for: this one's CPU where there is no GPU, and no option names one."""
    tflops = args.tflops or TFLOPS
    elsewhere = args.tflops or args.gpu_memory or args.gpu_hour_price is not None or args.address
    if args.device == "cpu" or not (elsewhere or args.device == "cuda" or has_gpu()):
        pace, at_once = cost.cpu_pace(min(args.cpus, cores())), max(1, cores() // args.cpus)
    else:
        pace, at_once = cost.gpu_pace(tflops), 0
    return preview.Assumed(gpu_memory(args.gpu_memory), tflops, args.batch, args.gpu_hour_price, pace, at_once)


def _run(args: argparse.Namespace, whole: Plan, plan: Plan, store: Store, pins: Pins) -> Exit:
    """Bring store and MLflow in order, then run what is missing of the plan."""
    from ctp.tracking.tracker import Tracker  # MLflow takes a second to import: a plan needs none

    store.check_writable()
    damaged = store.repair(plan.refs())
    state = states(plan, store)
    part, todo = _selected(args, plan, state)
    todo |= _in_stage(plan, damaged, args.stage)
    preview.describe(part, state, todo)
    tracker = Tracker(tracking_uri(store.uri), whole, store)
    past_damage(store, lambda: tracker.sync(whole=part is whole, trust=True))
    summary.tell_tracking(tracker)
    if store.damaged:
        print("\n".join(store.damaged), flush=True)
        known, state = undone(state), states(part, store)
        todo |= _in_stage(part, undone(state) - known, args.stage)
    if not todo:
        why = "No cell failed last time" if args.retry_failed else "Nothing to run"
        print(f"{why}. Store: {scrub(store.uri)}  MLflow: {scrub(tracker.uri)}")
        return Exit.OK
    runtime = Runtime(
        device=args.device, batch=args.batch, checkpoint_seconds=args.checkpoint_seconds, recompute=args.recompute,
        packed=args.packed, locations=pins.locations, datasets=pins.datasets, plugins=dict(plan.grid.plugins),
    )  # fmt: skip
    return run(part, todo, state.keys() - undone(state), store, tracker, runtime, options(args))


def options(args: argparse.Namespace) -> Options:
    resources = Resources(args.cpus, gpu_memory(args.gpu_memory))
    return Options(resources, args.address, args.insecure_ray, args.fail_fast)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code) if code in AT_ONCE else sys.exit(code)
