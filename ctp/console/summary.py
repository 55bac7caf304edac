"""The summary at the end of a run: what is new, the best and worst recovery, what failed and how to try it again."""

import shlex
import sys
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from ctp.cells import Dense
from ctp.cells.cell import Compress, Evaluate, key
from ctp.cells.labels import slug
from ctp.common.messages import one_line
from ctp.common.redact import scrub
from ctp.common.terminal import duration
from ctp.evaluation.recovered import won_back
from ctp.planning.graph import Plan
from ctp.planning.states import Outcome
from ctp.storage.remote import StoreError
from ctp.storage.store import Store

if TYPE_CHECKING:
    from ctp.tracking.tracker import Tracker

METRIC = "ppl"


def summarise(plan: Plan, outcome: Outcome, seconds: float, store: Store) -> None:
    """Print what is new; a line for each cell that failed, with the file of its traceback; what that held up."""
    counts = {"done": outcome.done, "failed": outcome.failed, "skipped": outcome.skipped,
              "not started or cut off": outcome.unfinished}  # fmt: skip
    print(f"{plan.name}: " + ", ".join(f"{len(v)} {n}" for n, v in counts.items() if v) + f" in {duration(seconds)}")
    for k in (k for k in plan.nodes if k in outcome.failed):
        node = plan.nodes[k]
        print(f"  failed: {slug(node.cell)}: {one_line(outcome.failed[k])} ({store.failures.uri(node.ref)})")
    for k in (k for k in plan.nodes if k in outcome.skipped):
        print(f"  skipped: {slug(plan.nodes[k].cell)}: {outcome.skipped[k]}")
    new = [k for k in plan.nodes if k in outcome.done]
    if new:
        kinds = Counter(plan.nodes[k].cell.kind for k in new)
        print(f"  new: {', '.join(f'{n} {kind}' for kind, n in kinds.items())}")
    if found := recoveries(plan, new, store):
        for which, one in zip(("best", "worst"), dict.fromkeys((found[0], found[-1])), strict=False):
            print(f"  {which} recovery: {one}")
    if outcome.failed and not outcome.stopped_by:
        again = [*sys.argv[1:], *(() if "--retry-failed" in sys.argv else ("--retry-failed",))]
        print(scrub(f"Try what failed again, and what it held up: {shlex.join(['python', '-m', 'ctp.grid', *again])}"))


def tell_tracking(tracker: "Tracker") -> None:
    """Print, once, what became of MLflow's database and what MLflow does not accept."""
    for line in (*tracker.notes, *tracker.refused.values()):
        print(one_line(scrub(line)), file=sys.stderr, flush=True)
    tracker.notes.clear()
    tracker.refused.clear()


@dataclass(frozen=True)
class Recovery:
    """Perplexities of one evaluation: of the dense model, the compressed one, and that one with the recovery.

    share: percent of the loss won back, as `won_back` has it.
    """

    name: str
    dense: float
    compressed: float
    prompted: float
    share: float

    def __str__(self) -> str:
        numbers = f"{self.compressed:.2f} -> {self.prompted:.2f}, dense {self.dense:.2f}"
        return f"{self.share:.0f} % of the loss won back ({numbers}): {self.name}"


def recoveries(plan: Plan, keys: Iterable[str], store: Store) -> list[Recovery]:
    """The recoveries of compressed models among these evaluations, the best first: those whose three perplexities are
    in the store, and where compression lost something."""

    @cache
    def perplexity(k: str) -> float | None:
        if k in plan.nodes:
            with suppress(StoreError, OSError):
                return store.manifest(plan.nodes[k].ref)["metrics"].get(METRIC)
        return None

    found = []
    for k in keys:
        cell = plan.nodes[k].cell
        if not isinstance(cell, Evaluate) or cell.recovery is None or isinstance(cell.target.compression, Dense):
            continue
        whole = Compress(model=cell.model, compression=Dense())
        bare = (key(Evaluate(target=target, measure=cell.measure)) for target in (whole, cell.target))
        dense, compressed, prompted = map(perplexity, (*bare, k))
        if dense is None or compressed is None or prompted is None:
            continue
        if (share := won_back(dense, compressed, prompted)) is not None:
            found.append(Recovery(slug(cell), dense, compressed, prompted, share))
    return sorted(found, key=lambda r: -r.share)
