"""`python -m ctp.grid NAME`: plan a grid, run what is missing, say what happened.

Exit codes: 0 everything is done; 1 some cells failed or could not run; 2 bad usage or grid file;
3 store or tracking unreachable; 4 a process of Ray's died; 130 interrupted (Ctrl-C), 143 terminated (SIGTERM): what was
being learned is saved, and after 4, 130 and 143 the same command goes on from there.
"""

import argparse
import json
import os
import signal
import sys
from collections.abc import Sequence
from functools import partial
from typing import NoReturn

from ctp.cells.runtime import Runtime
from ctp.common.messages import one_line
from ctp.common.redact import scrub
from ctp.common.terminal import unread
from ctp.console import explain, preview, status, summary
from ctp.console.arguments import number, positive, uri
from ctp.machine import signals
from ctp.planning import cost, gridfile
from ctp.planning.graph import BUILD, TRANSFER, Plan
from ctp.planning.gridtext import GridError
from ctp.planning.pins import Pins
from ctp.planning.plan import make
from ctp.planning.resources import cores, gpu_memory, has_gpu
from ctp.planning.select import keep, where
from ctp.planning.states import State, again, states, undone
from ctp.scheduling.repair import past_damage
from ctp.scheduling.run import INTERRUPTED, LOST, OK, TERMINATED, UNREACHABLE, USAGE, _fail, _stopped, run
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
        return _fail(USAGE, *e.problems)
    except (StoreError, TrackError) as e:
        return _fail(UNREACHABLE, str(e))
    except signals.RayLost as e:
        if signals.stopping:  # a signal to a whole group of processes ends Ray's as well
            return _stopped(TERMINATED if signals.stopping[0] == signal.SIGTERM else INTERRUPTED)
        return _fail(LOST, str(e))
    except KeyboardInterrupt as e:
        return _stopped(TERMINATED if isinstance(e, signals.Terminated) else INTERRUPTED)


class _Parser(argparse.ArgumentParser):
    """Bad usage in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE, f"error: {one_line(scrub(message))}; --help says what is allowed\n")


def parser() -> argparse.ArgumentParser:
    p = _Parser(
        prog="python -m ctp.grid",
        description="Run a grid: compress models, learn prompts through them, measure how the prompts transfer. "
        "What is in the store is not run again.",
        epilog="A cell that fails stops only those that need it. Its line in the summary says why, and which file has "
        "the traceback; MLflow has its run as FAILED. The next run tries it again, with whatever else is missing; "
        "--retry-failed tries nothing else. "
        "Exit codes: 0 all done, 1 some cells failed, 2 bad usage or grid file, 3 store or tracking "
        "unreachable, 4 a process of Ray's died (the same command goes on), 130 interrupted (Ctrl-C), 143 terminated "
        "(SIGTERM). The first of these signals has prompts saved "
        "and short cells end, for at most 20 seconds; the second one stops at once.",
    )
    p.add_argument("grid", metavar="NAME", help="grid/NAME.yaml, or the path of a grid file")
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
    return p


def command(args: argparse.Namespace) -> int:
    looks = bool(args.plan or args.status or args.explain is not None)
    _check_usage(args, looks)
    pins = Pins(args.data, provisional=looks)
    grid = gridfile.load(args.grid, args.settings, pins)
    whole = make(grid, pins)
    plan = where(whole, args.where) if args.where else whole
    store = Store(args.store)
    if args.status:
        status.show(plan, store, args.json, args.watch)
        return OK
    if args.explain is not None:
        explain.show(whole, args.explain, store, tracking_uri(store.uri), args.json)
        return OK
    damaged: set[str] = set()
    if not args.plan:
        store.check_writable()
        damaged = store.repair(plan.cells())
    state = states(plan, store)
    todo = damaged | (again(plan, state) if args.retry_failed else undone(state))
    if args.stage:
        plan = keep(plan, {k for k, n in plan.nodes.items() if n.stage == args.stage})
        todo = {k for k in todo if whole.nodes[k].stage == args.stage}
    if args.plan:
        return foresee(plan, state, todo, store, pins.unpinned, args)
    preview.describe(plan, state, todo)
    from ctp.tracking.tracker import Tracker  # MLflow takes a second to import: a plan needs none

    tracker = Tracker(tracking_uri(store.uri), whole, store)
    past_damage(store, lambda: tracker.sync(whole=not (args.where or args.stage), trust=True))
    summary.tell_tracking(tracker)
    if store.damaged:
        print("\n".join(store.damaged), flush=True)
        known, state = undone(state), states(plan, store)
        todo |= {k for k in undone(state) - known if not args.stage or whole.nodes[k].stage == args.stage}
    if not todo:
        why = "No cell failed last time" if args.retry_failed else "Nothing to run"
        print(f"{why}. Store: {scrub(store.uri)}  MLflow: {scrub(tracker.uri)}")
        return OK
    runtime = Runtime(
        device=args.device, batch=args.batch, checkpoint_seconds=args.checkpoint_seconds, recompute=args.recompute,
        packed=args.packed, locations=pins.locations, datasets=pins.datasets, plugins=dict(plan.grid.plugins),
    )  # fmt: skip
    return run(plan, todo, state, store, tracker, runtime, args)


def foresee(plan: Plan, state: dict[str, State], todo: set[str], store: Store, unpinned: Sequence[str],
            args: argparse.Namespace) -> int:  # fmt: skip
    """--plan: what would run, and nothing else."""
    tflops = args.tflops or TFLOPS
    if _on_cpu(args):
        pace, at_once = cost.cpu_pace(min(args.cpus, cores())), max(1, cores() // args.cpus)
    else:
        pace, at_once = cost.gpu_pace(tflops), 0
    seen = preview.look(plan, state, todo, store, gpu_memory(args.gpu_memory), tflops, args.batch, args.gpu_hour_price,
                        pace, at_once)  # fmt: skip
    if args.json:
        print(json.dumps(preview.as_json(seen, list(unpinned))))
    else:
        preview.describe(plan, seen.state, todo)
        preview.detail(seen)
        if unpinned:
            print(f"not pinned, the hub cannot be reached: {', '.join(unpinned)}: keys are provisional")
    return OK


def _on_cpu(args: argparse.Namespace) -> bool:
    """Would the cells run on this machine's CPU, as far as can be told: no GPU is here, and none is spoken of?"""
    spoken = args.tflops or args.gpu_memory or args.gpu_hour_price is not None or args.address
    return bool(args.device == "cpu" or not (spoken or args.device == "cuda" or has_gpu()))


def _check_usage(args: argparse.Namespace, looks: bool) -> None:
    """Raises GridError where one option asks for what another forbids."""
    if sum((args.plan, args.status, args.explain is not None)) > 1:
        raise GridError(["--plan, --status and --explain: one of them"])
    if args.json and not looks:
        raise GridError(["--json is for --plan, --status and --explain"])
    if args.watch and not args.status:
        raise GridError(["--watch is for --status"])


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code) if code in (LOST, INTERRUPTED, TERMINATED) else sys.exit(code)
