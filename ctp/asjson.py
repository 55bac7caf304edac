"""What `--json` prints: the plan of a grid, and what lies in a store, for scripts to read."""

import contextlib
import json
import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from ctp import artifacts, cost, grid, preview
from ctp.artifacts import Entry
from ctp.labels import axes, slug
from ctp.plan import Plan
from ctp.spec import KINDS
from ctp.store import Store, StoreError


def plan(args: Namespace, argv: list[str]) -> int:
    """`ctp grid NAME --plan --json`; returns the exit code of `--plan`. Anything else that it says goes to stderr."""
    if not args.plan:
        print("error: --json goes with --plan", file=sys.stderr)
        return grid.USAGE
    told: list[dict[str, Any]] = []
    with _instead_of_lines(lambda *a: told.append(planned(*a))), contextlib.redirect_stdout(sys.stderr):
        code = grid.main(argv)
    for value in told:
        print(json.dumps(value, indent=1))
    return code


@contextlib.contextmanager
def _instead_of_lines(detail: Callable[..., None]) -> Iterator[None]:
    """`--plan` hands what it found to `detail`: which cells those are is decided in one place."""
    lines = preview.describe, preview.detail
    preview.describe, preview.detail = (lambda *_: None), detail
    try:
        yield
    finally:
        preview.describe, preview.detail = lines


def planned(
    plan: Plan, state: dict[str, str], todo: set[str], device: int, tflops: float, batch: int
) -> dict[str, Any]:
    """The plan as plain data: counts, and one entry a cell, inputs before what needs them.

    An entry's `state` is "done" or why the cell would run; `todo` is true where this command would run it; `axes` are
    what `--where` takes; `cost` comes from the model of ctp/cost.py (device: bytes of one GPU).
    """
    cells = []
    for k, node in plan.nodes.items():
        c = cost.of(node.cell, node.facts, batch)
        spent = {"gpu_hours": c.hours(tflops), "flops": c.flops, "stored_bytes": c.stored, "memory_bytes": c.memory}
        cells.append({"key": k, "kind": node.cell.kind, "name": slug(node.cell), "stage": node.stage,
                      "studies": list(node.studies), "inputs": list(node.inputs), "state": state[k],
                      "todo": k in todo, "axes": axes(node.cell), "cost": spent})  # fmt: skip
    kinds = Counter(node.cell.kind for node in plan.nodes.values())
    done = sum(why == "done" for why in state.values())
    counts = {"cells": len(plan.nodes), "done": done, "todo": len(todo), **kinds}
    return {"grid": plan.name, "file": str(plan.grid.path), "counts": counts, "tflops": tflops,
            "gpu_memory_bytes": device, "cells": cells}  # fmt: skip


def ls(args: Namespace, argv: list[str]) -> int:
    """`ctp store ls --json`: a list, empty where nothing is done; returns what `ls` does: 0, 1 where manifests cannot
    be believed (they are named on stderr), 3 where the store cannot be read."""
    damaged: list[str] = []
    try:
        found = artifacts.entries(Store(args.store), (args.kind,) if args.kind else tuple(KINDS), damaged)
    except StoreError as e:
        print(f"ctp.store: {e}", file=sys.stderr)
        return artifacts.UNREACHABLE
    print(json.dumps([listed(e) for e in found], indent=1))
    for line in damaged:
        print(f"ctp.store: {line}", file=sys.stderr)
    return artifacts.WRONG if damaged else artifacts.OK


def listed(e: Entry) -> dict[str, Any]:
    """One artifact: whole key, kind, name, bytes, and its manifest's numbers (`created`: seconds since 1970)."""
    names: tuple[str, ...] = ("metrics", "created", "seconds", "device")
    said = {n: e.manifest[n] for n in names if n in e.manifest}
    return {"key": e.key, "kind": e.kind, "name": e.name, "bytes": e.size, **said}
