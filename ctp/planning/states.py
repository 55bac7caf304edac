"""What is done of a plan, why the rest is not, and how a run of it ended."""

from collections.abc import Mapping
from dataclasses import dataclass, field

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


FAILED = "failed last time"  # how the state of such a cell begins


def states(plan: Plan, store: Store) -> dict[str, str]:
    """key -> "done", or why the cell is not done: damaged, failed, interrupted, an input is missing, never ran."""
    done, damaged = store.look(plan.refs())
    failed, started = store.failures.all(), store.states.started()
    out: dict[str, str] = {}
    for k, node in plan.nodes.items():
        missing = [i for i in node.inputs if i not in done]
        if k in done:
            out[k] = "done"
        elif k in damaged:
            out[k] = f"damaged: {damaged[k]}"
        elif k in failed:
            out[k] = f"{FAILED}: {failed[k]}"
        elif (step := started.get(node.ref.folder)) is not None:
            out[k] = f"interrupted at step {step}"
        elif missing:
            out[k] = f"needs {slug(plan.nodes[missing[0]].cell)}"
        else:
            out[k] = "never ran"
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


def again(plan: Plan, state: Mapping[str, str]) -> set[str]:
    """The cells that failed last time, and those they held up that can run once they are done; no others.

    state: as `states` gives it.
    """
    chosen: set[str] = set()
    for k, node in plan.nodes.items():
        held_up = state[k] != "done" and chosen.intersection(node.inputs)
        if state[k].startswith(FAILED) or (held_up and all(state[i] == "done" or i in chosen for i in node.inputs)):
            chosen.add(k)
    return chosen
