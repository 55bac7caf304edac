"""Estimates from a store: which missing cells it has with other settings, and how long similar cells took.

At most READ manifests are read for each of the two, in threads.
"""

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

from ctp.cells.cell import KINDS, from_json
from ctp.cells.labels import flat
from ctp.planning import cost
from ctp.planning.cost import Cost, Pace
from ctp.planning.graph import Node, Plan
from ctp.planning.resources import Resources
from ctp.planning.states import Kind, State
from ctp.storage.manifest import MANIFEST, Manifest, parse
from ctp.storage.ref import split
from ctp.storage.remote import StoreError
from ctp.storage.store import Store

READ, READERS = 200, 16
SAMPLES = 8  # finished cells of one sort that are looked at
ALIKE = 10.0  # sizes of cells, by the cost model, within which their times are compared
NEIGHBOURS = 3
NAMED = 3  # settings, where several differ
OTHER_KEY = "the store has it under another key"
FOLLOWS = State(Kind.STALE, "an input is")


@dataclass(frozen=True)
class Sample:
    """What a finished cell took: seconds and bytes, and its cost by the model."""

    seconds: float
    memory: float
    device: str
    cost: Cost


Samples = Mapping[tuple[str, ...], list[Sample]]


@dataclass(frozen=True)
class Expected:
    """What a cell is going to take: seconds, bytes, hours of GPUs. device: where similar cells were measured; empty
    where the cost model tells."""

    seconds: float
    memory: float
    gpu_hours: float
    device: str = ""


def stale(plan: Plan, state: Mapping[str, State], store: Store) -> tuple[dict[str, State], dict[str, Manifest]]:
    """key -> state of the missing cells that the store has under the same name with another key; and the manifests that
    were read for it. Raises StoreError."""
    folders = {k: n.ref.folder for k, n in plan.nodes.items()}
    others = _others(set(folders.values()), store)
    missing = [k for k in plan.nodes if state[k].kind in (Kind.NEEDS, Kind.NEVER)]
    named = {k: others.get((plan.nodes[k].cell.kind, split(folders[k])[0]), []) for k in missing}
    found = [k for k in missing if named[k]]
    first = [k for k in found if not any(named.get(i) for i in plan.nodes[k].inputs)]
    read = _read(store, {k: f"{plan.nodes[k].cell.kind}/{named[k][-1]}" for k in first[:READ]})
    why = {k: State(Kind.STALE, differences(plan.nodes[k], read[k])) for k in read}
    for k in found:
        if k not in why:
            inputs = any(i in why for i in plan.nodes[k].inputs)
            why[k] = FOLLOWS if inputs else State(Kind.STALE, OTHER_KEY)
    return why, read


def _others(planned: set[str], store: Store) -> dict[tuple[str, str], list[str]]:
    """(kind, name without key) -> folders of finished cells that the plan does not have."""
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    for kind in KINDS:
        for name in sorted(store.folders.finished(kind) - planned):
            found[kind, split(name)[0]].append(name)
    return found


def differences(node: Node, manifest: Manifest) -> str:
    """What makes the cell's key another one than the manifest's: settings and versions, as they were and are."""
    was, now = flat(manifest["spec"], ""), flat(node.cell.model_dump(mode="json"), "")
    changed = [n for n in dict.fromkeys((*now, *was)) if was.get(n) != now.get(n)]
    parts = [f"{n.removeprefix('.')} was {_short(was.get(n))}, is {_short(now.get(n))}" for n in changed[:NAMED]]
    if len(changed) > NAMED:
        parts.append(f"{len(changed) - NAMED} more settings")
    if manifest.get("version") != node.cell.VERSION:
        parts.append(f"VERSION of {node.cell.kind} was {manifest.get('version')}, is {node.cell.VERSION}")
    if not parts and list(node.inputs) != manifest["inputs"]:
        names = [n for n in node.cell.INPUTS if getattr(node.cell, n) is not None]
        differ = [n for n, a, b in zip(names, node.inputs, manifest["inputs"], strict=False) if a != b]
        parts.append(f"its {' and '.join(differ) or 'inputs'} was made by another VERSION")
    return "; ".join(parts) or OTHER_KEY


def _short(value: object) -> str:
    if value is None:
        return "not set"
    text = str(value)
    return text if len(text) <= 24 else f"{text[:20]}…"


def _read(store: Store, folders: Mapping[str, str]) -> dict[str, Manifest]:
    """The manifests of these folders, by key; without those that are gone or cannot be believed."""

    def read(folder: str) -> Manifest | None:
        path = f"{store.folders.root}/{folder}/{MANIFEST}"
        with suppress(StoreError, OSError):
            return parse(store.folders.read(path) or b"", path)
        return None

    with ThreadPoolExecutor(READERS) as pool:
        return {k: m for k, m in zip(folders, pool.map(read, folders.values()), strict=True) if m is not None}


def sort(node: Node) -> tuple[str, ...]:
    """What cells have in common whose times can be compared: kind, method and model."""
    cell, model = node.cell, node.cell.model
    return cell.kind, cell.method.method, model.name, model.revision, model.dtype


def measured(plan: Plan, todo: Collection[str], state: Mapping[str, State], store: Store,
             read: Mapping[str, Manifest], batch: int) -> Samples:  # fmt: skip
    """What finished cells took, by sort, of the sorts that are to run. read: manifests of cells' stale relatives."""
    wanted = {sort(plan.nodes[k]) for k in todo}
    done: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for k, node in plan.nodes.items():
        if state[k].done and sort(node) in wanted:
            done[sort(node)].append(k)
    few = [k for keys in done.values() for k in keys[:: math.ceil(len(keys) / SAMPLES)]][:READ]
    folders = {k: plan.nodes[k].ref.path for k in few}
    out: dict[tuple[str, ...], list[Sample]] = defaultdict(list)
    for k, manifest in {**_read(store, folders), **read}.items():
        node = plan.nodes[k]
        with suppress(KeyError, TypeError, ValueError):  # of another version, which had other settings
            size = cost.of(from_json(manifest), node.facts, batch)
            seconds, memory = float(manifest["seconds"]), float(manifest["peak_memory_bytes"])
            out[sort(node)].append(Sample(seconds, memory, str(manifest["device"]), size))
    return out


def expect(plan: Plan, todo: Collection[str], costs: Mapping[str, Cost], samples: Samples, each: Resources,
           tflops: float, pace: Pace) -> dict[str, Expected]:  # fmt: skip
    """Of each cell that is to run: from similar ones, in proportion to their size, where some were measured, else from
    the cost model at `pace`. GPUs are whole ones, at least one, as memory asks for; tflops: of one.
    """
    out = {}
    for k in todo:
        node, c = plan.nodes[k], costs[k]
        gpus = max(1.0, each.of(c.memory, True)["GPU"])
        ratios = [(_ratio(c, s.cost), s) for s in samples.get(sort(node), [])]
        alike = [(ratio, s) for ratio, s in ratios if 1 / ALIKE <= ratio <= ALIKE]
        near = sorted(alike, key=lambda pair: abs(math.log(pair[0])))[:NEIGHBOURS]
        if not near:
            out[k] = Expected(pace.seconds(node.cell, c), c.memory, gpus * c.hours(tflops))
            continue
        seconds = statistics.median(s.seconds * ratio for ratio, s in near)
        device = Counter(s.device for _, s in near).most_common(1)[0][0]
        hours = seconds / 3600 if device == "cuda" else c.hours(tflops)
        out[k] = Expected(seconds, max(s.memory for _, s in near), gpus * hours, device)
    return out


def _ratio(c: Cost, other: Cost) -> float:
    return c.flops / other.flops if c.flops and other.flops else 1.0 if c.flops == other.flops else math.inf
