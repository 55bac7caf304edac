"""What `--plan` tells: which cells there are and why they would run, study by study, and what that is going to cost."""

import sys
from collections import Counter

from ctp import cost
from ctp.columns import aligned
from ctp.cost import Cost
from ctp.labels import slug
from ctp.plan import Plan
from ctp.resources import GIB

MODEL = (
    "shared: cells that a study above has too; left, hours and bytes are of the others that are to run.\n"
    "Cost model: 2 N T operations a forward pass, 4 N T a learning step (no gradients of weights), at "
    "{tflops:g} TFLOP/s\na GPU; memory: weights, activations and logits of what is fed at once (see ctp/cost.py).\n"
    "! is more than one GPU of {gib:.0f} GiB (--gpu-memory) holds: such a cell takes several."
)


def describe(plan: Plan, state: dict[str, str], todo: set[str]) -> None:
    """How many cells there are, done and missing, and why."""
    done = sum(state[k] == "done" for k in plan.nodes)
    kinds = Counter(plan.nodes[k].cell.kind for k in plan.nodes)
    listing = ", ".join(f"{n} {kind}" for kind, n in kinds.items())
    print(f"{plan.name}: {len(plan.nodes)} cells ({listing}): {done} done, {len(todo)} to run")
    why = Counter(state[k].split(":")[0] if state[k].startswith("failed") else _short(state[k]) for k in todo)
    for reason, n in why.most_common():
        print(f"  {n:>5}  {reason}")
    sys.stdout.flush()


def detail(plan: Plan, state: dict[str, str], todo: set[str], device: int, tflops: float, batch: int) -> None:
    """A line for each cell that would run, a table of the studies, and the cost model. device: bytes of one GPU."""
    costs = {k: cost.of(n.cell, n.facts, batch) for k, n in plan.nodes.items()}
    for k in plan.nodes:
        if k in todo:
            node, c = plan.nodes[k], costs[k]
            over = "!" if c.memory > device else " "
            print(f"  {node.cell.kind:<8} {k[:12]}  {c.hours(tflops):>7.3f} h {c.memory / GIB:>6.1f} GiB{over} "
                  f"{slug(node.cell)}  ({state[k]})")  # fmt: skip
    print(
        "\n".join(["", *studies(plan, costs, todo, device, tflops), "", MODEL.format(tflops=tflops, gib=device / GIB)])
    )


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
