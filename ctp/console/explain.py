"""`--explain CELL`: a cell's key, inputs, folder, cost and MLflow run."""

import difflib
import json
import re
import time
from typing import Any

from ctp.cells.labels import params, slug
from ctp.common.messages import one_line, shown
from ctp.common.redact import scrub
from ctp.common.terminal import duration, size
from ctp.console.progress import how_far
from ctp.planning import cost
from ctp.planning.graph import Node, Plan
from ctp.planning.gridtext import GridError
from ctp.planning.states import Kind, State, states
from ctp.storage.drivers import records
from ctp.storage.remote import StoreError
from ctp.storage.store import Store
from ctp.tracking.entries import KEY, sqlite_file

_KEY = re.compile("[0-9a-f]{6,64}")
NEAREST, LISTED = 3, 8


def find(plan: Plan, text: str) -> Node:
    """The one cell with this slug, folder or beginning of a key, or whose slug alone contains these words.

    Raises GridError with the nearest names where there is none, and with the names where there are several.
    """
    slugs = {k: slug(n.cell) for k, n in plan.nodes.items()}
    wanted = text.strip().rstrip("/").rpartition("/")[2]  # the path of its folder is as good
    tries = (
        lambda k: _KEY.fullmatch(wanted.lower()) and k.startswith(wanted.lower()),
        lambda k: wanted in (slugs[k], f"{slugs[k]}-{k[:12]}"),
        lambda k: all(part in f"{plan.nodes[k].cell.kind} {slugs[k]}" for part in text.split()),
    )
    for holds in tries:
        found = [k for k in plan.nodes if holds(k)] if text.strip() else []
        if len(found) == 1:
            return plan.nodes[found[0]]
        if found:
            more = [f"and {len(found) - LISTED} more"] if len(found) > LISTED else []
            listed = [f"{k[:12]} {plan.nodes[k].cell.kind} {slugs[k]}" for k in found[:LISTED]]
            raise GridError([f"--explain {shown(text)}: {len(found)} cells of {plan.name} are called so; "
                             f"the first digits of a key choose one: {'; '.join([*listed, *more])}"])  # fmt: skip
    names = list(dict.fromkeys(slugs.values()))
    near = difflib.get_close_matches(wanted, names, n=NEAREST, cutoff=0.5)
    hint = f"; did you mean {' or '.join(near)}?" if near else f"; `--plan` lists the cells of {plan.name}"
    raise GridError([f"--explain {shown(text)}: no cell of {plan.name} is called so{hint}"])


def explain(plan: Plan, text: str, store: Store, tracking: str) -> dict[str, Any]:
    """Plain data of the cell that `text` names. Raises as `find`, and StoreError."""
    node = find(plan, text)
    cell = node.cell
    state = states(plan, store)
    for driver in records(store, plan.name):
        for at_work in driver.cells if driver.state == "alive" else ():
            if at_work.key in state and not state[at_work.key].done:
                where = f"{driver.machine}, {how_far(at_work) or 'no step reported yet'}"
                state[at_work.key] = State(Kind.RUNNING, where)
    out: dict[str, Any] = {
        "key": node.key, "kind": cell.kind, "name": slug(cell), "state": str(state[node.key]), "version": cell.VERSION,
        "studies": list(node.studies), "folder": store.folder(node.ref),
        "inputs": [{"key": i, "name": slug(plan.nodes[i].cell), "state": str(state[i])} for i in node.inputs],
        "needed_by": sum(node.key in n.inputs for n in plan.nodes.values()),
        "settings": {n: v for n, v in params(cell).items() if n.startswith("spec.")},
    }  # fmt: skip
    if state[node.key].done:
        out["manifest"] = store.manifest(node.ref)
    else:
        expected = cost.of(cell, node.facts)
        out["expected"] = {"flops": expected.flops, "stored_bytes": expected.stored, "memory_bytes": expected.memory}
        if state[node.key].kind is Kind.FAILED:
            out["failure"] = store.failures.uri(node.ref)
    return {**out, "mlflow": run_of(tracking, plan.name, node.key)}


def run_of(tracking: str, experiment: str, key: str) -> str:
    """The cell's MLflow run: id, status and a link to a server's page; or why that is not known."""
    file = sqlite_file(tracking)
    if file is not None and not file.exists():
        return "no run yet"  # a client would make a database
    try:
        from ctp.tracking.experiment import MlflowClient  # slow to import; ctp.tracking.experiment sets its options

        client = MlflowClient(tracking_uri=tracking)
        known = client.get_experiment_by_name(experiment)
        runs = client.search_runs([known.experiment_id], f"tags.`{KEY}` = '{key}'", max_results=1) if known else []
    except Exception as e:  # whatever a broken server or database raises
        return scrub(one_line(f"{tracking} cannot be asked ({type(e).__name__}: {e})"))
    if known is None or not runs:
        return "no run yet"
    run = runs[0].info
    web = f"{tracking}/#/experiments/{known.experiment_id}/runs/{run.run_id}" if tracking.startswith("http") else ""
    return scrub(f"run {run.run_id}, {run.status}  {web}".rstrip())


def lines(found: dict[str, Any]) -> list[str]:
    """The same as text."""
    rows: list[tuple[str, str]] = [
        ("key", found["key"]), ("state", one_line(found["state"])), ("studies", ", ".join(found["studies"])),
        *(("input", f"{i['key'][:12]} {i['name']} ({one_line(i['state'])})") for i in found["inputs"]),
        ("needed by", f"{found['needed_by']} cells"),
        ("folder", found["folder"]),
        *(_made(found["manifest"]) if "manifest" in found else _to_make(found)),
        ("MLflow", found["mlflow"]), ("version", f"{found['version']} of {found['kind']} cells"),
    ]  # fmt: skip
    out = [f"{found['kind']} {found['name']}", *(f"  {name:<12} {value}" for name, value in rows), "settings"]
    settings = ((n.removeprefix("spec."), json.dumps(v, ensure_ascii=False)) for n, v in found["settings"].items())
    return out + [f"  {name} = {value}" for name, value in settings]


def _made(m: dict[str, Any]) -> list[tuple[str, str]]:
    files = m["files"]
    named = ", ".join(f"{n} ({size(f['size'])})" for n, f in files.items())
    rows = [("files", f"{size(sum(f['size'] for f in files.values()))}: {named}")]
    if "seconds" in m:
        machine = f" ({m['machine']})" if m.get("machine") else ""
        computed = f", computed in {m['computed_in']}" if "computed_in" in m else ""
        rows.append(("took", f"{duration(m['seconds'])} on {m.get('device')}{machine}{computed}"))
    if "peak_memory_bytes" in m:
        rows.append(("peak memory", size(m["peak_memory_bytes"])))
    if "created" in m:
        when = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(m["created"]))
        rows.append(("made", f"{when}, git commit {m.get('git_commit') or 'unknown'}"))
    if versions := m.get("versions"):
        rows.append(("with", ", ".join(f"{n} {v}" for n, v in versions.items() if v)))
    return rows + [("metric", f"{n} = {v:g}") for n, v in sorted(m.get("metrics", {}).items())]


def _to_make(found: dict[str, Any]) -> list[tuple[str, str]]:
    e = found["expected"]
    takes = f"{e['flops']:.2g} operations, {size(e['memory_bytes'])} of memory, {size(e['stored_bytes'])} stored"
    rows = [("expected", f"{takes} (cost model)")]
    return [*rows, ("traceback", found["failure"])] if "failure" in found else rows


def show(plan: Plan, text: str, store: Store, tracking: str, as_json: bool) -> None:
    """Print what is known of the cell that `text` names. Raises as `explain`."""
    try:
        found = explain(plan, text, store, tracking)
    except OSError as e:
        raise StoreError(f"store {store.uri!r} cannot be read: {e}") from e
    print(json.dumps(found) if as_json else "\n".join(lines(found)))
