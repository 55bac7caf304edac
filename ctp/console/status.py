"""`--status`: which cells of a grid are done, failed and running, read from the store on any machine."""

import sys
import time
from collections import Counter
from collections.abc import Callable

from pydantic import BaseModel

from ctp.cells.labels import slug
from ctp.common.messages import one_line, plain
from ctp.common.terminal import aligned, duration
from ctp.console.pages import where
from ctp.console.progress import how_far
from ctp.planning.graph import Plan
from ctp.planning.states import Kind, states
from ctp.storage.drivers import CellAtWork, Driver, records
from ctp.storage.store import Store

WATCH_SECONDS = 5.0
COLUMNS = (Kind.DONE, Kind.RUNNING, Kind.FAILED, Kind.INTERRUPTED, "waiting")
LISTED = 20  # of failed or interrupted cells; --json has all
CLEAR = "\x1b[H\x1b[2J"


class Status(BaseModel):
    """kinds: numbers of cells by kind and state, one of COLUMNS. failed, interrupted: key, kind and name of cells, with
    error and file, or state."""

    grid: str
    store: str
    cells: int
    kinds: dict[str, dict[str, int]]
    done: int
    drivers: list[Driver]
    running: list[CellAtWork]
    failed: list[dict[str, str]]
    interrupted: list[dict[str, str]]


def status(plan: Plan, store: Store) -> Status:
    """The status of a plan's cells. Raises StoreError."""
    state = states(plan, store)
    drivers = records(store, plan.name)
    at_work = {c.key: c for d in drivers if d.state == "alive" for c in d.cells}
    kinds: dict[str, Counter[str]] = {}
    failed, interrupted = [], []
    for k, node in plan.nodes.items():
        name = {"key": k, "kind": node.cell.kind, "name": slug(node.cell)}
        kind = Kind.RUNNING if k in at_work and not state[k].done else state[k].kind
        kinds.setdefault(node.cell.kind, Counter())[kind if kind in COLUMNS else "waiting"] += 1
        if kind is Kind.FAILED:
            failed.append({**name, "error": state[k].detail, "file": store.failures.uri(node.ref)})
        elif kind is Kind.INTERRUPTED:
            interrupted.append({**name, "state": str(state[k])})
    return Status(grid=plan.name, store=store.uri, cells=len(plan.nodes), kinds={n: dict(c) for n, c in kinds.items()},
                  done=sum(s.done for s in state.values()), drivers=drivers, running=list(at_work.values()),
                  failed=failed, interrupted=interrupted)  # fmt: skip


def lines(s: Status) -> list[str]:
    """The status as text."""
    out = [f"{s.grid}: {s.done} of {s.cells} cells done  ({s.store})"]
    columns = [w for w in COLUMNS if any(c.get(w) for c in s.kinds.values())]
    rows = [("", *columns), *((kind, *(str(c.get(w, 0)) for w in columns)) for kind, c in s.kinds.items())]
    out += [f"  {line}" for line in aligned(rows, left=(0,))]
    out += [line for driver in s.drivers for line in _driver(driver)] or ["No run of this grid is going on."]
    out += _some("failed", [f"{c['name']}: {one_line(c['error'])} ({c['file']})" for c in s.failed])
    return out + _some("interrupted", [f"{c['name']}: {c['state']}" for c in s.interrupted])


def _driver(d: Driver) -> list[str]:
    ago = duration(d.silence)
    if d.state == "dead":
        return [f"STALE: a run on {d.machine} ended unnoticed, its last sign {ago} ago (process {d.pid} is "
                "gone): the same command goes on from there."]  # fmt: skip
    sign = f"last sign {ago} ago" if d.state == "alive" else f"STALE: no sign for {ago}, its machine may be gone"
    lasts, ended = duration(max(0.0, time.time() - d.began)), d.done + d.failed + d.skipped
    out = [f"Running on {d.machine} (process {d.pid}) for {lasts}: {ended} of {d.total} cells ended; {sign}"]
    about = d.cluster, where("MLflow", d.mlflow, d.machine), where("Ray", d.ray, d.machine)
    out += [f"  {line}" for line in about if line]
    for c in d.cells if d.state == "alive" else ():
        out.append(f"  {c.kind:<8} {c.name}  {how_far(c) or 'for ' + duration(c.seconds)}")
    return out


def _some(title: str, found: list[str]) -> list[str]:
    more = [f"  and {len(found) - LISTED} more (--json has all)"] if len(found) > LISTED else []
    return [f"{title}:", *(f"  {line}" for line in found[:LISTED]), *more] if found else []


def show(plan: Plan, store: Store, as_json: bool, watch: bool, wait: Callable[[float], None] = time.sleep) -> None:
    """Print the status; watch: again every few seconds until all is done, or Ctrl-C."""
    while True:
        found = status(plan, store)
        text = found.model_dump_json(exclude_none=True) if as_json else plain("\n".join(lines(found)))
        clear = CLEAR if watch and not as_json and sys.stdout.isatty() else ""
        print(f"{clear}{text}", flush=True)
        if not watch or (found.done == found.cells and not found.running):
            return
        wait(WATCH_SECONDS)
