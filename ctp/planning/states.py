"""The state of each cell of a plan: done, or why not; and how a run of the plan ended."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from ctp.cells.labels import slug
from ctp.planning.graph import Plan
from ctp.storage.store import Store


@dataclass
class Outcome:
    """How a run ended: key -> reason for what failed or was skipped; `unfinished` was neither (interrupted).

    stopped_by: the signal that asked for the run's end, or 0.
    """

    done: set[str] = field(default_factory=set)
    failed: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    unfinished: set[str] = field(default_factory=set)
    stopped_by: int = 0


class Kind(StrEnum):
    DONE = "done"
    DAMAGED = "damaged"
    FAILED = "failed"
    INTERRUPTED = "interrupted"
    NEEDS = "needs"
    NEVER = "never"
    STALE = "stale"
    RUNNING = "running"


_SENTENCES = {
    Kind.DONE: "done",
    Kind.DAMAGED: "damaged: {}",
    Kind.FAILED: "failed last time: {}",
    Kind.INTERRUPTED: "interrupted at step {}",
    Kind.NEEDS: "needs {}",
    Kind.NEVER: "never ran",
    Kind.STALE: "stale: {}",
    Kind.RUNNING: "running on {}",
}


@dataclass(frozen=True)
class State:
    """Whether a cell is done, and why not. `str` of it is a sentence.

    detail: the damage, error, step, missing input, change of settings, or machine.
    """

    kind: Kind
    detail: str = ""

    def __str__(self) -> str:
        return _SENTENCES[self.kind].format(self.detail)

    @property
    def done(self) -> bool:
        return self.kind is Kind.DONE


DONE, NEVER = State(Kind.DONE), State(Kind.NEVER)


def states(plan: Plan, store: Store) -> dict[str, State]:
    """key -> the cell's state as the store has it; never STALE or RUNNING."""
    done, damaged = store.look(plan.refs())
    failed, started = store.failures.all(), store.states.started()
    out: dict[str, State] = {}
    for k, node in plan.nodes.items():
        missing = [i for i in node.inputs if i not in done]
        if k in done:
            out[k] = DONE
        elif k in damaged:
            out[k] = State(Kind.DAMAGED, damaged[k])
        elif k in failed:
            out[k] = State(Kind.FAILED, failed[k])
        elif (step := started.get(node.ref.folder)) is not None:
            out[k] = State(Kind.INTERRUPTED, str(step))
        elif missing:
            out[k] = State(Kind.NEEDS, slug(plan.nodes[missing[0]].cell))
        else:
            out[k] = NEVER
    return out


def runnable(plan: Plan, todo: set[str], done: set[str]) -> Mapping[str, str]:
    """key -> reason, of the cells in `todo` that cannot run because an input is neither done nor going to be."""
    blocked: dict[str, str] = {}
    for k, node in plan.nodes.items():
        if k not in todo:
            continue
        for i in node.inputs:
            if i in blocked or (i not in done and i not in todo):
                blocked[k] = f"needs {slug(plan.nodes[i].cell)}"
    return blocked


def undone(state: Mapping[str, State]) -> set[str]:
    """The keys of cells that are not done."""
    return {k for k, s in state.items() if not s.done}


def again(plan: Plan, state: Mapping[str, State]) -> set[str]:
    """The cells that failed last time, and those they held up that can run once they are done; no others."""
    chosen: set[str] = set()
    for k, node in plan.nodes.items():
        held_up = not state[k].done and chosen.intersection(node.inputs)
        if state[k].kind is Kind.FAILED or (held_up and all(state[i].done or i in chosen for i in node.inputs)):
            chosen.add(k)
    return chosen
