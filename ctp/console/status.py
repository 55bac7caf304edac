"""`--status`: what is done, failed and running of a grid, read from the store, on any machine that reaches it."""

import json
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from ctp.cells.labels import slug
from ctp.common.messages import one_line, plain
from ctp.common.terminal import aligned, duration, how_far
from ctp.console.pages import where
from ctp.planning.graph import Plan
from ctp.planning.states import Kind, states
from ctp.storage.drivers import records
from ctp.storage.store import Store

WATCH_SECONDS = 5.0
WORDS = (Kind.DONE, Kind.RUNNING, Kind.FAILED, Kind.INTERRUPTED)
LISTED = 20  # of failed or interrupted cells; --json has all
CLEAR = "\x1b[H\x1b[2J"


def status(plan: Plan, store: Store) -> dict[str, Any]:
    """Plain data: counts by kind, drivers, running, failed and interrupted cells. Raises StoreError."""
    state = states(plan, store)
    drivers = records(store, plan.name)
    at_work = {c["key"]: c for d in drivers if d["state"] == "alive" for c in d["cells"]}
    kinds: dict[str, Counter[str]] = {}
    failed, cut_off = [], []
    for k, node in plan.nodes.items():
        own = kinds.setdefault(node.cell.kind, Counter())
        said = {"key": k, "kind": node.cell.kind, "name": slug(node.cell)}
        kind = Kind.RUNNING if k in at_work and not state[k].done else state[k].kind
        own[kind if kind in WORDS else "waiting"] += 1
        if kind is Kind.FAILED:
            failed.append({**said, "error": state[k].detail, "file": store.failure(node.cell)})
        elif kind is Kind.INTERRUPTED:
            cut_off.append({**said, "state": str(state[k])})
    return {
        "grid": plan.name, "store": store.uri, "cells": len(plan.nodes),
        "kinds": {kind: dict(counts) for kind, counts in kinds.items()},
        "done": sum(c["done"] for c in kinds.values()),
        "drivers": drivers, "running": list(at_work.values()), "failed": failed, "interrupted": cut_off,
    }  # fmt: skip


def lines(said: dict[str, Any]) -> list[str]:
    """The same for people."""
    out = [f"{said['grid']}: {said['done']} of {said['cells']} cells done  ({said['store']})"]
    words = [w for w in (*WORDS, "waiting") if any(c.get(w) for c in said["kinds"].values())]
    rows = [("", *words), *((kind, *(str(c.get(w, 0)) for w in words)) for kind, c in said["kinds"].items())]
    out += [f"  {line}" for line in aligned(rows, left=(0,))]
    out += [line for driver in said["drivers"] for line in _driver(driver)] or ["No run of this grid is going on."]
    out += _some("failed", [f"{c['name']}: {one_line(c['error'])} ({c['file']})" for c in said["failed"]])
    return out + _some("interrupted", [f"{c['name']}: {c['state']}" for c in said["interrupted"]])


def _driver(d: dict[str, Any]) -> list[str]:
    ago = duration(d["silence"])
    if d["state"] == "dead":
        return [f"STALE: a run on {d['machine']} ended without a word, its last sign {ago} ago (process {d['pid']} is "
                "gone): the same command goes on from there."]  # fmt: skip
    sign = f"last sign {ago} ago" if d["state"] == "alive" else f"STALE: no sign for {ago}, its machine may be gone"
    ended = d["done"] + d["failed"] + d["skipped"]
    lasts = duration(max(0.0, time.time() - d["began"]))
    out = [f"Running on {d['machine']} (process {d['pid']}) for {lasts}: {ended} of {d['total']} cells ended; {sign}"]
    if d.get("machines", 1) > 1:
        out.append(f"  {d['machines']} machines, {d['cpus']:g} CPUs, {d['gpus']:g} GPUs")
    pages = [where(name, d.get(name.lower(), ""), d["machine"]) for name in ("MLflow", "Ray")]
    out += [f"  {page}" for page in pages if page]
    for c in d["cells"] if d["state"] == "alive" else ():
        out.append(f"  {c['kind']:<8} {c['name']}  {how_far(c) or 'for ' + duration(c['seconds'])}")
    return out


def _some(title: str, found: list[str]) -> list[str]:
    more = [f"  and {len(found) - LISTED} more (--json has all)"] if len(found) > LISTED else []
    return [f"{title}:", *(f"  {line}" for line in found[:LISTED]), *more] if found else []


def show(plan: Plan, store: Store, as_json: bool, watch: bool, wait: Callable[[float], None] = time.sleep) -> None:
    """Print the status; again every few seconds until all is done, or Ctrl-C, where it is watched."""
    while True:
        said = status(plan, store)
        text = json.dumps(said) if as_json else plain("\n".join(lines(said)))
        clear = CLEAR if watch and not as_json and sys.stdout.isatty() else ""
        print(f"{clear}{text}", flush=True)
        if not watch or (said["done"] == said["cells"] and not said["running"]):
            return
        wait(WATCH_SECONDS)
