"""What a run says at its end: what is new, what was won back, what failed and how to try it again."""

import shlex
import sys
from collections import Counter
from typing import TYPE_CHECKING

from ctp.cells.labels import slug
from ctp.common.messages import one_line
from ctp.common.redact import scrub
from ctp.common.terminal import duration
from ctp.evaluation.recovered import won_back
from ctp.planning.graph import Plan
from ctp.storage.store import Store

if TYPE_CHECKING:
    from ctp.planning.states import Outcome
    from ctp.tracking.tracker import Tracker
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass

from ctp.cells import Dense
from ctp.cells.cell import Evaluate, canonical, key
from ctp.storage.remote import StoreError


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


def tell_tracking(tracker: "Tracker") -> None:
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


METRIC = "ppl"


@dataclass(frozen=True)
class Recovery:
    """Perplexities of one evaluation: of the dense model, the compressed one, and the latter behind what was learned.

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
    """Of those evaluations that put something before a compressed model, where all three numbers are in the store and
    compression did lose something; the best first. What the store cannot tell now is left out."""
    evaluated = [n.cell for n in plan.nodes.values() if isinstance(n.cell, Evaluate) and n.cell.recovery is None]
    bare = {(key(c.target), _asked(c)): c for c in evaluated}
    dense = {(_model(c), _asked(c)): c for c in evaluated if isinstance(c.target.compression, Dense)}
    read = _reader(store)
    found = []
    for k in keys:
        cell = plan.nodes[k].cell
        if not isinstance(cell, Evaluate) or cell.recovery is None or isinstance(cell.target.compression, Dense):
            continue
        whole, before = dense.get((_model(cell), _asked(cell))), bare.get((key(cell.target), _asked(cell)))
        if whole is None or before is None:
            continue
        numbers = [read(c) for c in (whole, before, cell)]
        known = [n for n in numbers if n is not None]
        if len(known) == 3 and (share := won_back(*known)) is not None:
            found.append(Recovery(slug(cell), known[0], known[1], known[2], share))
    return sorted(found, key=lambda r: -r.share)


def _model(cell: Evaluate) -> str:
    return canonical(cell.target.model.model_dump(mode="json"))


def _asked(cell: Evaluate) -> str:
    return cell.measure.remembered("_asked", lambda: canonical(cell.measure.model_dump(mode="json")))


def _reader(store: Store) -> Callable[[Evaluate], float | None]:
    known: dict[str, float | None] = {}

    def read(cell: Evaluate) -> float | None:
        if key(cell) not in known:
            known[key(cell)] = None
            with suppress(StoreError, OSError):
                known[key(cell)] = store.manifest(cell)["metrics"].get(METRIC)
        return known[key(cell)]

    return read
