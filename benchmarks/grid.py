"""What ctp itself costs beside its cells: throughput, planning, a repeated run, the matrix out of MLflow.

    python -m benchmarks.grid [throughput|plan|again|matrix ...] [--cells N] [--repeats N]

Every part runs the real path on a local store, with MLflow on SQLite beside it. A line says what was measured, the
median and the range, and what is claimed; the exit code is 1 where a claim does not hold. `throughput` runs 1,000 cells
that sleep 0.1 s on two slots, each publishing an artifact. `plan`, `again` and `matrix` take a finished grid of 10,000
cells (see benchmarks.finished). All parts take less than five minutes on two cores.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from unittest import mock

import yaml

from benchmarks import finished
from benchmarks.report import environment, timed
from ctp.cells.events import Event
from ctp.cells.runtime import Runtime
from ctp.planning import gridfile
from ctp.planning.graph import Plan
from ctp.planning.pins import Pins
from ctp.planning.plan import make
from ctp.storage.store import Store

SLOTS, NAP = 2, 0.1
ROOT = Path(__file__).parents[1]


class Bench:
    """Prints what is measured and keeps what did not hold. folder: where everything is written."""

    def __init__(self, folder: Path, args: argparse.Namespace) -> None:
        self.folder, self.args = folder, args
        self.broken: list[str] = []

    def say(self, what: str, seconds: list[float], most: float | None = None) -> None:
        """A line of times, lower is better; most: the claim, in seconds."""
        median = statistics.median(seconds)
        spread = f", {min(seconds):.2f} to {max(seconds):.2f} in {len(seconds)}" if len(seconds) > 1 else ""
        claim = "" if most is None else f"below {most:g} s"
        self.claim(f"{what}: {median:.2f} s{spread}", most is None or median < most, claim)

    def claim(self, line: str, holds: bool, claim: str) -> None:
        """A line and whether its claim holds."""
        print(line + (f" ({claim}: {'yes' if holds else 'NO'})" if claim else ""), flush=True)
        if not holds:
            self.broken.append(line)

    @cached_property
    def mixed(self) -> Path:
        """The folder of the finished grid `mixed`."""
        begun = time.monotonic()
        plan = finished.write(self.folder / "mixed")
        print(
            f"(a finished grid of {len(plan.nodes):,} cells, written in {time.monotonic() - begun:.0f} s)", flush=True
        )
        return self.folder / "mixed"


def command(folder: Path, *args: str) -> str:
    """Run a Python process in `folder` as a person would; returns what it printed. Raises where it fails."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *args], cwd=folder, env=env, check=True, capture_output=True, text=True
    ).stdout


# ------------------------------------------------------------------------ the parts


def throughput(bench: Bench) -> None:
    """Cells that sleep, on two slots: what part of the time do the slots sleep?"""
    count = bench.args.cells
    imports, run = _run_naps(bench.folder / "naps", count)
    ideal = count * NAP / SLOTS
    print(f"throughput: {count:,} cells of {NAP} s on {SLOTS} slots, ideally {ideal:.1f} s; "
          f"MLflow done {run.tracked - run.ended:.1f} s after the last cell")  # fmt: skip
    for what, seconds, least in (
        ("from the first cell's start to the last one's end", run.events[-1] - run.events[0], 0.85),
        ("with Ray's start (the call of run to the last cell's end)", run.events[-1] - run.begun, None),
        ("and Ray's end, and imports of Ray and MLflow before", run.ended - run.begun + imports, None),
    ):
        share = ideal / seconds
        claim = "" if least is None else f"at least {least:.0%}"
        bench.claim(f"  {what}: {seconds:.1f} s, {share:.1%} of ideal", least is None or share >= least, claim)


@dataclass
class Times:
    """Of a run, by time.perf_counter(): its call, each event, its end, and when MLflow had everything."""

    begun: float = 0.0
    events: list[float] = field(default_factory=list)
    ended: float = 0.0
    tracked: float = 0.0


def _run_naps(folder: Path, count: int) -> tuple[float, Times]:
    """Run so many cells that sleep; returns the seconds of imports before, and the times of the run."""
    plan, pins = _naps(folder, count)
    store = Store(str(folder / "results" / "store"))
    store.check_writable()
    begun = time.perf_counter()
    import ray

    from ctp.scheduling import tune
    from ctp.scheduling.options import Options
    from ctp.tracking.tracker import Tracker

    tracker = Tracker(f"sqlite:///{folder}/results/mlflow.db", plan, store)
    tracker.begin("benchmark")
    imports, times = time.perf_counter() - begun, Times()

    def on_event(event: Event) -> None:
        times.events.append(time.perf_counter())
        tracker.tell(event)

    runtime = Runtime(device="cpu", locations=pins.locations, plugins=dict(plan.grid.plugins))
    times.begun = time.perf_counter()
    with mock.patch.object(ray, "init", partial(ray.init, num_cpus=SLOTS)):
        outcome = tune.run(
            plan, set(plan.nodes), set(), store=store.uri, options=Options(), on_event=on_event, runtime=runtime
        )
    times.ended = time.perf_counter()
    if len(outcome.done) != count:
        raise SystemExit(f"{len(outcome.done)} of {count} cells done: {list(outcome.failed.values())[:1]}")
    tracker.close("FINISHED")
    times.tracked = time.perf_counter()
    return imports, times


def _naps(folder: Path, count: int) -> tuple[Plan, Pins]:
    """The plan of a grid of so many cells that sleep, and what it pinned; the grid file is written into `folder`."""
    folder.mkdir()
    content = {"plugins": str(ROOT / "benchmarks" / "naps.py"), "models": "tiny-llama",
               "compression": {"method": "nap", "index": list(range(count)), "seconds": NAP}}  # fmt: skip
    (folder / "naps.yaml").write_text(yaml.safe_dump(content))
    pins = Pins()
    return make(gridfile.load(str(folder / "naps.yaml"), [], pins), pins), pins


def plan(bench: Bench) -> None:
    """A grid file to a plan with all keys; and the command."""

    def once() -> None:
        pins = Pins()
        make(gridfile.load(str(bench.mixed / "mixed.yaml"), [], pins), pins)

    _ = bench.mixed
    bench.say("plan: grid file to plan with keys, 10,062 cells", timed(once, bench.args.repeats), 2)
    seconds = timed(lambda: command(bench.mixed, "-m", "ctp.grid", "mixed.yaml", "--plan"), bench.args.repeats)
    bench.say("plan: python -m ctp.grid mixed.yaml --plan, the whole process", seconds)


def again(bench: Bench) -> None:
    """A run of a grid that is done."""
    run = ("-m", "ctp.grid", "mixed.yaml")
    first = timed(lambda: command(bench.mixed, *run), 1)
    bench.say("again: the first run, which compares every run in MLflow with the store", first)
    found = command(bench.mixed, *run)
    if "10062 done, 0 to run" not in found:
        raise SystemExit(found)
    bench.say(
        "again: every later one, the whole process", timed(lambda: command(bench.mixed, *run), bench.args.repeats), 8
    )


def matrix(bench: Bench) -> None:
    """The transfer matrix out of ten thousand runs."""
    import mlflow

    from analysis import transfer_matrix
    from analysis.runs import evaluations

    def once() -> None:
        table = evaluations("mixed", dataset="newswire")
        if transfer_matrix.matrix(table, "ppl").shape != (1 + 1 + 18, 6):
            raise SystemExit("the matrix has another shape")

    mlflow.set_tracking_uri(f"sqlite:///{bench.mixed}/results/mlflow.db")
    first, *rest = timed(once, bench.args.repeats + 1)
    bench.say("matrix: 114 of 10,062 runs, 6 x 6 x 3 prompts and 6 bare models; opening MLflow included", [first], 3)
    bench.say("matrix: the same once more", rest)
    args = ("-m", "analysis.transfer_matrix", "mixed", "--dataset", "newswire", "--csv", "m.csv")
    bench.say("matrix: the command", timed(lambda: command(bench.mixed, *args), bench.args.repeats))
    whole = timed(lambda: evaluations("mixed"), 1)
    bench.say("matrix: all 1,200 perplexities of both texts", whole)


PARTS = {"throughput": throughput, "plan": plan, "again": again, "matrix": matrix}


def main(argv: list[str] | None = None) -> int:
    """Run the parts; returns 1 where a claim does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of: {', '.join(PARTS)} (default: all)")
    parser.add_argument("--cells", type=int, default=1000, help="of throughput (default 1000; claims are for that)")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args(argv)
    if odd := set(args.parts) - PARTS.keys():
        parser.error(f"unknown part {min(odd)!r}; there are: {', '.join(PARTS)}")
    print(environment("ray", "mlflow", "torch", "pydantic"), flush=True)
    with tempfile.TemporaryDirectory(prefix="ctp-bench-") as folder:
        bench = Bench(Path(folder), args)
        for part in args.parts or PARTS:
            PARTS[part](bench)
    if bench.broken:
        print("does not hold:", *bench.broken, sep="\n  ")
    return 1 if bench.broken else 0


if __name__ == "__main__":
    sys.exit(main())
