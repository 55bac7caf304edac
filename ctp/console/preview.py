"""`--plan`: which cells there are and why they would run, study by study, and what that takes."""

import sys
from collections import Counter
from dataclasses import dataclass
from typing import Any

from ctp.cells.labels import axes, slug
from ctp.common.terminal import aligned, duration, size
from ctp.planning import cost, history
from ctp.planning.cost import Cost, Pace
from ctp.planning.graph import Plan, longest_path
from ctp.planning.history import Expected
from ctp.planning.plan import warnings
from ctp.planning.resources import GIB, Resources
from ctp.planning.states import Kind, State
from ctp.storage.store import Store

COLUMNS = (Kind.DONE, Kind.FAILED, Kind.INTERRUPTED, Kind.STALE, "missing")
_REASONS = {Kind.FAILED: "failed last time", Kind.DAMAGED: "damaged",
            Kind.NEEDS: "wait for an input that is to be computed"}  # fmt: skip
LISTED = 60  # cells that are listed one by one
STARTING = 10.0  # seconds until Ray and the workers' imports are there

MODEL = (
    "shared: cells that a study above has too; left, hours and bytes are of the others that are to run.\n"
    "Cost model: 2 N T operations a forward pass, 4 N T a learning step (no gradients of weights); GPU-hours at "
    "{tflops:g}\nTFLOP/s a GPU; memory: weights, activations and logits of what is fed at once "
    "(ctp/planning/cost.py).\n"
    "! is more than one GPU of {gib:.0f} GiB (--gpu-memory) holds: such a cell takes several."
)


def describe(plan: Plan, state: dict[str, State], todo: set[str]) -> None:
    """Print how many cells there are, done and missing, and why."""
    kinds = ", ".join(f"{n} {kind}" for kind, n in Counter(n.cell.kind for n in plan.nodes.values()).items())
    done = sum(state[k].done for k in plan.nodes)
    print(f"{plan.name}: {len(plan.nodes)} cells ({kinds}): {done} done, {len(todo)} to run")
    for reason, n in Counter(_REASONS.get(state[k].kind, str(state[k])) for k in todo).most_common():
        print(f"  {n:>5}  {reason}")
    for warning in warnings(plan):
        print(f"warning: {warning}")
    sys.stdout.flush()


@dataclass(frozen=True)
class Assumed:
    """The machine that a preview is for. device: bytes of one GPU; tflops: that it sustains; price: of an hour of it.

    pace: where nothing was measured. at_once: cells that run at a time, 0 where that is not known.
    """

    device: int
    tflops: float
    batch: int
    price: float | None
    pace: Pace
    at_once: int


@dataclass(frozen=True)
class Preview:
    """A plan with what is to run of it. state: with why cells are stale. costs: of all cells. expected: of `todo`."""

    plan: Plan
    state: dict[str, State]
    todo: set[str]
    costs: dict[str, Cost]
    expected: dict[str, Expected]
    assumed: Assumed

    @property
    def gpu_hours(self) -> float:
        return sum(e.gpu_hours for e in self.expected.values())

    @property
    def seconds(self) -> float:
        """Of all cells that are to run, one after the other."""
        return sum(e.seconds for e in self.expected.values())

    @property
    def longest_path(self) -> tuple[float, list[str]]:
        """(seconds, cells)."""
        return longest_path(self.plan, {k: e.seconds for k, e in self.expected.items()})

    @property
    def money(self) -> float | None:
        return None if self.assumed.price is None else self.gpu_hours * self.assumed.price


def look(plan: Plan, state: dict[str, State], todo: set[str], store: Store, assumed: Assumed) -> Preview:
    """The preview of a plan, with what the store has measured of similar cells. Raises StoreError."""
    costs = {k: cost.of(n.cell, n.facts, assumed.batch) for k, n in plan.nodes.items()}
    why, read = history.stale(plan, state, store)
    samples = history.measured(plan, todo, state, store, read, assumed.batch)
    each = Resources(gpu_memory=assumed.device)
    expected = history.expect(plan, todo, costs, samples, each, assumed.tflops, assumed.pace)
    return Preview(plan, {**state, **why}, todo, costs, expected, assumed)


def detail(p: Preview) -> None:
    """Print cells that would run, one by one where they are few; tables by study, model and kind; the assumptions."""
    listed = [k for k in p.plan.nodes if k in p.todo]
    for k in listed[:LISTED]:
        node, e = p.plan.nodes[k], p.expected[k]
        over, known = "!" if e.memory > p.assumed.device else " ", "*" if e.device else " "
        print(f"  {node.cell.kind:<8} {k[:12]}  {duration(e.seconds):>11}{known} {e.memory / GIB:>6.1f} GiB{over} "
              f"{slug(node.cell)}  ({p.state[k]})")  # fmt: skip
    if len(listed) > LISTED:
        print(f"  and {len(listed) - LISTED} more: --where shows some, --json all of them")
    print("\n".join(["", *groups(p), "", *studies(p), "", *totals(p), ""]))
    print(MODEL.format(tflops=p.assumed.tflops, gib=p.assumed.device / GIB))


def groups(p: Preview) -> list[str]:
    """One line for each study, model and kind: how many cells are done and why the others are not."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for k, node in p.plan.nodes.items():
        for study in node.studies:
            found.setdefault((study, str(axes(node.cell)["model"]), node.cell.kind), []).append(k)
    rows: list[tuple[str, ...]] = [("study", "model", "kind", "cells", *COLUMNS, "time")]
    for names, keys in found.items():
        counts = Counter(_column(p.state[k]) for k in keys)
        seconds = sum(p.expected[k].seconds for k in keys if k in p.todo)
        rows.append((*names, str(len(keys)), *(str(counts[w] or "-") for w in COLUMNS), duration(seconds)))
    return aligned(rows, left=(0, 1, 2))


def _column(state: State) -> str:
    """One of COLUMNS."""
    return state.kind if state.kind in COLUMNS else "missing"


def totals(p: Preview) -> list[str]:
    """Of all that is to run: time, the longest path, money."""
    if not p.expected:
        return ["Nothing to run."]
    at_once, price = p.assumed.at_once, p.assumed.price
    devices = sorted({e.device for e in p.expected.values() if e.device})
    where = f", on {', '.join(devices)} (*)" if devices else ""
    seconds, path = p.longest_path
    wall = duration(max(seconds, p.seconds / at_once) + STARTING) if at_once else ""
    here = f"about {wall} on this machine, {at_once} cells at a time; " if wall else ""
    out = [f"Time: {here}{duration(p.seconds)} one after the other.",
           f"  {sum(bool(e.device) for e in p.expected.values())} of {len(p.expected)} cells: as long as similar cells "
           f"in this store took{where}.",
           f"  The others: by the cost model, at {p.assumed.pace.about}.",
           f"Longest path, which more machines do not make shorter: {duration(seconds)}: "
           + " -> ".join(slug(p.plan.nodes[k].cell) for k in path)]  # fmt: skip
    if p.money is not None:
        out.append(f"Money: {p.gpu_hours:.2f} GPU-hours x {price:g} = {p.money:.2f} (whole GPUs; by "
                   "the cost model where nothing was measured on a GPU)")  # fmt: skip
    return out


def as_json(p: Preview, unpinned: list[str]) -> dict[str, Any]:
    """The preview as plain data, with every cell."""
    seconds, path = p.longest_path
    money = {} if p.money is None else {"gpu_hour_price": p.assumed.price, "money": p.money}
    total = {"seconds": p.seconds, "gpu_hours": p.gpu_hours, "assumed": p.assumed.pace.about, **money}
    return {"grid": p.plan.name, "cells": [_cell(p, k) for k in p.plan.nodes], "to_run": len(p.todo), "total": total,
            "unpinned": unpinned, "warnings": warnings(p.plan),
            "longest_path": {"seconds": seconds, "cells": path}}  # fmt: skip


def _cell(p: Preview, k: str) -> dict[str, Any]:
    node, e = p.plan.nodes[k], p.expected.get(k)
    out: dict[str, Any] = {
        "key": k, "kind": node.cell.kind, "name": slug(node.cell), "studies": list(node.studies),
        "inputs": list(node.inputs), "state": _column(p.state[k]), "why": str(p.state[k]), "to_run": k in p.todo,
    }  # fmt: skip
    if e is None:
        return out
    return out | {"seconds": e.seconds, "memory_bytes": e.memory, "gpu_hours": e.gpu_hours,
                  "measured_on": e.device or None}  # fmt: skip


def studies(p: Preview) -> list[str]:
    """One line a study: its cells, those that no study above has, and what they cost; the total counts each cell once.

    `left` and the costs are of the cells that are still to run.
    """
    titles = {s.name: s.title for s in reversed(p.plan.grid.studies) if s.title}
    rows: list[tuple[str, ...]] = [("study", "cells", "shared", "left", "GPU-hours", "stored", "peak memory", "")]
    seen: set[str] = set()
    for name in dict.fromkeys(s.name for s in p.plan.grid.studies):
        keys = {k for k, n in p.plan.nodes.items() if name in n.studies}
        rows.append(_row(p, name, keys, keys - seen, titles.get(name, "")))
        seen |= keys
    rows.append(_row(p, "all, each cell once", set(p.plan.nodes), set(p.plan.nodes), ""))
    return aligned(rows, left=(0, 7))


def _row(p: Preview, name: str, keys: set[str], new: set[str], title: str) -> tuple[str, ...]:
    left = [p.costs[k] for k in new & p.todo]
    peak = max((p.costs[k].memory for k in keys), default=0)
    memory = f"{peak / GIB:.1f} GiB" + ("!" if peak > p.assumed.device else "")
    hours, stored = sum(c.hours(p.assumed.tflops) for c in left), sum(c.stored for c in left)
    return (name, str(len(keys)), str(len(keys) - len(new)), str(len(left)), f"{hours:.2f}", size(stored), memory,
            title)  # fmt: skip
