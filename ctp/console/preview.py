"""What `--plan` tells: which cells there are and why they would run, study by study, and what that is going to cost."""

import sys
from collections import Counter
from dataclasses import dataclass
from typing import Any

from ctp.cells.labels import axes, slug
from ctp.common.terminal import aligned, duration
from ctp.planning import cost, history
from ctp.planning.cost import Cost, Pace
from ctp.planning.graph import Plan, longest_path
from ctp.planning.history import Expected
from ctp.planning.plan import warnings
from ctp.planning.resources import GIB, Resources
from ctp.storage.store import Store

LISTED = 60  # cells that are told of one by one
STARTING = 10.0  # seconds until Ray and the workers' imports are there

MODEL = (
    "shared: cells that a study above has too; left, hours and bytes are of the others that are to run.\n"
    "Cost model: 2 N T operations a forward pass, 4 N T a learning step (no gradients of weights); GPU-hours at "
    "{tflops:g}\nTFLOP/s a GPU; memory: weights, activations and logits of what is fed at once (see ctp/cost.py).\n"
    "! is more than one GPU of {gib:.0f} GiB (--gpu-memory) holds: such a cell takes several."
)


def describe(plan: Plan, state: dict[str, str], todo: set[str]) -> None:
    """How many cells there are, done and missing, and why."""
    done = sum(state[k] == "done" for k in plan.nodes)
    kinds = Counter(plan.nodes[k].cell.kind for k in plan.nodes)
    listing = ", ".join(f"{n} {kind}" for kind, n in kinds.items())
    print(f"{plan.name}: {len(plan.nodes)} cells ({listing}): {done} done, {len(todo)} to run")
    why = Counter(
        state[k].split(":")[0] if state[k].startswith(("failed", "damaged")) else _short(state[k]) for k in todo
    )
    for reason, n in why.most_common():
        print(f"  {n:>5}  {reason}")
    for warning in warnings(plan):
        print(f"warning: {warning}")
    sys.stdout.flush()


@dataclass(frozen=True)
class Preview:
    """A plan with what is to run of it and what that takes. state: with why cells are stale; costs: of all cells.

    device: bytes of one GPU. price: of an hour of it, or None. pace: what is assumed where nothing was measured.
    at_once: cells that run at a time, 0 where that is not known.
    """

    plan: Plan
    state: dict[str, str]
    todo: set[str]
    costs: dict[str, Cost]
    expected: dict[str, Expected]
    device: int
    tflops: float
    price: float | None
    pace: Pace
    at_once: int

    @property
    def gpu_hours(self) -> float:
        return sum(e.gpu_hours for e in self.expected.values())

    @property
    def seconds(self) -> float:
        """Of all cells that are to run, one after the other."""
        return sum(e.seconds for e in self.expected.values())


def look(plan: Plan, state: dict[str, str], todo: set[str], store: Store, device: int, tflops: float, batch: int,
         price: float | None, pace: Pace, at_once: int) -> Preview:  # fmt: skip
    """All that `--plan` tells, with what the store has measured. Raises StoreError."""
    costs = {k: cost.of(n.cell, n.facts, batch) for k, n in plan.nodes.items()}
    why, read = history.stale(plan, state, store)
    samples = history.measured(plan, todo, state, store, read, batch)
    expected = history.expect(plan, todo, costs, samples, Resources(gpu_memory=device), tflops, pace)
    return Preview(plan, {**state, **why}, todo, costs, expected, device, tflops, price, pace, at_once)


def detail(p: Preview) -> None:
    """Cells that would run, one by one where they are few; tables by study, model and kind; what it is based on."""
    listed = [k for k in p.plan.nodes if k in p.todo]
    for k in listed[:LISTED]:
        node, e = p.plan.nodes[k], p.expected[k]
        over, known = "!" if e.memory > p.device else " ", "*" if e.device else " "
        print(f"  {node.cell.kind:<8} {k[:12]}  {duration(e.seconds):>11}{known} {e.memory / GIB:>6.1f} GiB{over} "
              f"{slug(node.cell)}  ({p.state[k]})")  # fmt: skip
    if len(listed) > LISTED:
        print(f"  and {len(listed) - LISTED} more: --where shows some, --json all of them")
    print("\n".join(["", *groups(p), "", *studies(p.plan, p.costs, p.todo, p.device, p.tflops), "", *totals(p), ""]))
    print(MODEL.format(tflops=p.tflops, gib=p.device / GIB))


def groups(p: Preview) -> list[str]:
    """One line for each study, model and kind: how many cells are done and why the others are not."""
    words = ("done", "failed", "interrupted", "stale", "missing")
    found: dict[tuple[str, str, str], list[str]] = {}
    for k, node in p.plan.nodes.items():
        for study in node.studies:
            found.setdefault((study, str(axes(node.cell)["model"]), node.cell.kind), []).append(k)
    rows: list[tuple[str, ...]] = [("study", "model", "kind", "cells", *words, "time")]
    for names, keys in found.items():
        counts = Counter(word(p.state[k]) for k in keys)
        seconds = sum(p.expected[k].seconds for k in keys if k in p.todo)
        rows.append((*names, str(len(keys)), *(str(counts[w] or "-") for w in words), duration(seconds)))
    return aligned(rows, left=(0, 1, 2))


def word(state: str) -> str:
    """done, failed, interrupted, stale or missing."""
    first = state.split(":")[0].split()[0]
    return first if first in ("done", "failed", "interrupted", "stale") else "missing"


def totals(p: Preview) -> list[str]:
    """What all that is to run takes: time, the longest path, money."""
    if not p.expected:
        return ["Nothing to run."]
    devices = sorted({e.device for e in p.expected.values() if e.device})
    of = sum(bool(e.device) for e in p.expected.values())
    seconds, path = longest_path(p.plan, {k: e.seconds for k, e in p.expected.items()})
    names = " -> ".join(slug(p.plan.nodes[k].cell) for k in path)
    where = f", on {', '.join(devices)} (*)" if devices else ""
    wall = max(seconds, p.seconds / p.at_once) if p.at_once else 0.0
    here = f"about {duration(wall + STARTING)} on this machine, {p.at_once} cells at a time; " if wall else ""
    out = [f"Time: {here}{duration(p.seconds)} one after the other.",
           f"  {of} of {len(p.expected)} cells: as long as similar cells in this store took{where}.",
           f"  The others: by the cost model, at {p.pace.about}.",
           f"Longest path, which more machines do not make shorter: {duration(seconds)}: {names}"]  # fmt: skip
    if p.price is not None:
        out.append(f"Money: {p.gpu_hours:.2f} GPU-hours x {p.price:g} = {p.gpu_hours * p.price:.2f} (whole GPUs; by "
                   "the cost model where nothing was measured on a GPU)")  # fmt: skip
    return out


def as_json(p: Preview, unpinned: list[str]) -> dict[str, Any]:
    """The same as plain data, of every cell."""
    seconds, path = longest_path(p.plan, {k: e.seconds for k, e in p.expected.items()})
    cells = []
    for k, node in p.plan.nodes.items():
        said: dict[str, Any] = {
            "key": k, "kind": node.cell.kind, "name": slug(node.cell), "studies": list(node.studies),
            "inputs": list(node.inputs), "state": word(p.state[k]), "why": p.state[k], "to_run": k in p.todo,
        }  # fmt: skip
        if e := p.expected.get(k):
            said |= {"seconds": e.seconds, "memory_bytes": e.memory, "gpu_hours": e.gpu_hours,
                     "measured_on": e.device or None}  # fmt: skip
        cells.append(said)
    money = {} if p.price is None else {"gpu_hour_price": p.price, "money": p.gpu_hours * p.price}
    total = {"seconds": p.seconds, "gpu_hours": p.gpu_hours, "assumed": p.pace.about, **money}
    return {"grid": p.plan.name, "cells": cells, "to_run": len(p.todo), "total": total, "unpinned": unpinned,
            "warnings": warnings(p.plan), "longest_path": {"seconds": seconds, "cells": path}}  # fmt: skip


def studies(plan: Plan, costs: dict[str, Cost], todo: set[str], device: int, tflops: float) -> list[str]:
    """One line a study: its cells, those that no study above has, and what they cost; the total counts each cell once.

    `left` and the costs are of the cells that are still to run.
    """
    head = ("study", "cells", "shared", "left", "GPU-hours", "stored", "peak memory", "")
    rows: list[tuple[str, ...]] = [head]
    titles = {s.name: s.title for s in reversed(plan.grid.studies) if s.title}
    names = list(dict.fromkeys(s.name for s in plan.grid.studies))
    seen: set[str] = set()
    for name in names:
        own = [k for k, n in plan.nodes.items() if name in n.studies]
        new = [k for k in own if k not in seen]
        rows.append((*_row(name, own, new, todo, costs, device, tflops), titles.get(name, "")))
        seen.update(own)
    rows.append((*_row("all, each cell once", list(plan.nodes), list(plan.nodes), todo, costs, device, tflops), ""))
    return aligned(rows, left=(0, 7))


def _row(name: str, own: list[str], new: list[str], todo: set[str], costs: dict[str, Cost], device: int,
         tflops: float) -> tuple[str, ...]:  # fmt: skip
    left = [costs[k] for k in new if k in todo]
    peak = max((costs[k].memory for k in own), default=0)
    memory = f"{peak / GIB:.1f} GiB" + ("!" if peak > device else "")
    hours, stored = sum(c.hours(tflops) for c in left), sum(c.stored for c in left)
    return name, str(len(own)), str(len(own) - len(new)), str(len(left)), f"{hours:.2f}", _bytes(stored), memory


def _bytes(n: float) -> str:
    return f"{n / 1e9:.1f} GB" if n >= 1e8 else f"{n / 1e6:.1f} MB"


def _short(reason: str) -> str:
    return "wait for an input that is to be computed" if reason.startswith("needs ") else reason
