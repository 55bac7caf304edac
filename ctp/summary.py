"""What a run says at its end: what is new, what was won back, what failed and how to try it again."""

import shlex
import sys
from collections import Counter
from typing import TYPE_CHECKING

from ctp.labels import slug
from ctp.names import one_line
from ctp.plan import Plan
from ctp.progress import duration
from ctp.recovered import recoveries
from ctp.redact import scrub
from ctp.store import Store

if TYPE_CHECKING:
    from ctp.graph import Outcome
    from ctp.writer import Writer


def summarise(plan: Plan, outcome: "Outcome", seconds: float, store: Store) -> None:
    """What is new; a line for each cell that failed, its cause and the file with the traceback; what that held up."""
    counts = {"done": outcome.done, "failed": outcome.failed, "skipped": outcome.skipped,
              "not started or cut off": outcome.unfinished}  # fmt: skip
    print(f"{plan.name}: " + ", ".join(f"{len(v)} {n}" for n, v in counts.items() if v) + f" in {duration(seconds)}")
    for k in (k for k in plan.nodes if k in outcome.failed):
        cell = plan.nodes[k].cell
        print(f"  failed: {slug(cell)}: {one_line(outcome.failed[k])} ({store.failure(cell)})")
    for k in (k for k in plan.nodes if k in outcome.skipped):
        print(f"  skipped: {slug(plan.nodes[k].cell)}: {outcome.skipped[k]}")
    if outcome.done:
        _news(plan, outcome, store)
    if outcome.failed and not outcome.stopped_by:
        again = [*sys.argv[1:], *(() if "--retry-failed" in sys.argv else ("--retry-failed",))]
        print(scrub(f"Try what failed again, and what it held up: {shlex.join(['python', '-m', 'ctp.grid', *again])}"))


def tell_tracking(tracker: "Writer") -> None:
    """What became of MLflow's database, and what MLflow does not take: each in a line, once."""
    for line in (*tracker.notes, *tracker.refused.values()):
        print(one_line(scrub(line)), file=sys.stderr, flush=True)
    tracker.notes.clear()
    tracker.refused.clear()


def _news(plan: Plan, outcome: "Outcome", store: Store) -> None:
    """How many cells of each kind are new, and the best and the worst recovery among them."""
    kinds = Counter(plan.nodes[k].cell.kind for k in plan.nodes if k in outcome.done)
    print(f"  new: {', '.join(f'{n} {kind}' for kind, n in kinds.items())}")
    won = recoveries(plan, (k for k in plan.nodes if k in outcome.done), store)
    for which, one in zip(("best", "worst"), dict.fromkeys((won[0], won[-1]) if won else ()), strict=False):
        print(f"  {which} recovery: {one}")
