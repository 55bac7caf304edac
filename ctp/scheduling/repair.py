"""Damaged artifacts during a run: the store moves them aside, and their cells run again."""

from collections.abc import Callable
from typing import TypeVar

from ctp.cells.labels import slug
from ctp.planning.graph import Plan
from ctp.planning.states import Outcome
from ctp.storage.manifest import Damaged
from ctp.storage.store import Store

ROUNDS = 5  # a broken disk must not make a run go on forever
T = TypeVar("T")


def past_damage(store: Store, call: Callable[[], T]) -> T:
    """What `call` returns; it is called again after each damaged artifact that the store moved aside meanwhile."""
    while True:
        known = len(store.damaged)
        try:
            return call()
        except Damaged:
            if len(store.damaged) == known:
                raise


def complete(plan: Plan, todo: set[str], done: set[str], store: Store, run: Callable[[set[str], set[str]], Outcome],
             on_again: Callable[[set[str]], None] = lambda cells: None) -> Outcome:  # fmt: skip
    """The outcome of run(todo, done), and of running again what is not done any more, with the cells that failed or
    were skipped without it. on_again: called with these cells."""
    outcome = run(todo, done)
    for _ in range(ROUNDS):
        if outcome.unfinished or outcome.stopped_by or not outcome.failed:
            break
        done = done | outcome.done
        gone = done - store.done(plan.nodes[k].ref for k in done)
        if not gone:
            break
        again = gone | _held_up(plan, gone, outcome)
        names = ", ".join(sorted(slug(plan.nodes[k].cell) for k in gone))
        print(f"No longer in the store, or damaged and moved to {store.folders.root}/damaged: {names}. "
              f"Running again what is missing now, {len(again)} cells.", flush=True)  # fmt: skip
        on_again(again)
        done -= gone
        _merge(outcome, run(again, done), again)
    return outcome


def _held_up(plan: Plan, gone: set[str], outcome: Outcome) -> set[str]:
    """What failed or was skipped and needs one of these, however far behind."""
    behind = set(gone)
    for k, node in plan.nodes.items():  # inputs come first
        if behind.intersection(node.inputs):
            behind.add(k)
    return behind & (outcome.failed.keys() | outcome.skipped.keys())


def _merge(outcome: Outcome, more: Outcome, again: set[str]) -> None:
    outcome.done = (outcome.done - again) | more.done
    outcome.failed = {k: e for k, e in outcome.failed.items() if k not in again} | more.failed
    outcome.skipped = {k: e for k, e in outcome.skipped.items() if k not in again} | more.skipped
    outcome.unfinished, outcome.stopped_by = more.unfinished, more.stopped_by
