"""What MLflow holds of a cell: the tags, params and metrics of its run. Nothing of MLflow itself is needed here."""

import gc
import hashlib
import os
import platform
import re
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote

from ctp.cells.cell import Evaluate, canonical
from ctp.cells.events import OUTCOMES, Event
from ctp.cells.labels import fingerprints, params, slug
from ctp.common.redact import scrub
from ctp.machine.process import signs
from ctp.machine.versions import git_commit, versions
from ctp.planning.graph import Node
from ctp.storage.manifest import Manifest
from ctp.storage.store import DEFAULT_STORE

if TYPE_CHECKING:  # MLflow takes a second
    from mlflow import MlflowClient
    from mlflow.entities import Run

KEY, KIND, CURRENT, STUDIES, PARENT = "ctp.key", "ctp.kind", "ctp.current", "ctp.studies", "mlflow.parentRunId"
ERROR, LEFT_OUT = "ctp.error", "ctp.left_out"
CURVES = {n: f"train/{n}" for n in ("loss", "val_loss", "lr")}  # of a history's points: what they are called here
TOKENS_PER_S = "train/tokens_per_s"  # reported while a prompt is learned, and in no history
SYNCED = "ctp.synced"  # of the experiment: what it was brought up to date with
GRID_FILE, MANIFESTS = "grid.yaml", "manifests.json"
LARGEST = 64 * 2**20  # bytes of MANIFESTS
OWN = ("seconds", "peak_memory_bytes")  # metrics of every cell
NAME = "letters, digits, spaces and _ - . : / (no / at either end, none doubled), at most 250 in all"
_NAME = re.compile(r"[\w.\- :]+(/[\w.\- :]+)*")


class TrackError(Exception):
    """MLflow cannot be reached or does not take what it is given."""

    def __init__(self, message: str) -> None:
        super().__init__(scrub(message))


def name_problem(name: object) -> str:
    """Why MLflow does not take this as the name of a metric, param or tag; empty where it does."""
    if not isinstance(name, str) or len(name) > 250 or not _NAME.fullmatch(name):
        return f"allowed: {NAME}"
    return "allowed: no part that is . or .." if {".", ".."} & set(name.split("/")) else ""


def safe(name: str) -> str:
    """The name itself, or one like it that MLflow takes."""
    if not name_problem(name):
        return name
    parts = (re.sub(r"[^\w.\- :]", "_", part) for part in name.split("/"))
    plain = "/".join("_" if part in (".", "..") else part for part in parts if part) or "_"
    return plain if len(plain) <= 250 else f"{plain[:237]}-{hashlib.sha256(name.encode()).hexdigest()[:12]}"


def tracking_uri(store: str) -> str:
    """MLFLOW_TRACKING_URI, else an SQLite file beside a local store (in ./results for a remote one)."""
    if given := os.environ.get("MLFLOW_TRACKING_URI"):
        return given
    folder = Path(DEFAULT_STORE if "://" in store else store).absolute().parent
    return sqlite_uri(folder / "mlflow.db")


def sqlite_uri(file: Path) -> str:
    """The address of an SQLite file: in a URL "?" and "%" mean something else than in a path.

    Where they are in it the slashes are quoted too: MLflow makes the folder that it reads out of the address unquoted.
    """
    return f"sqlite:///{quote(str(file), safe='') if set('?%') & set(str(file)) else file}"


def sqlite_file(uri: str) -> Path | None:
    """The file that an address of SQLite stands for; None for other addresses."""
    place = uri.removeprefix("sqlite:///").partition("?")[0]
    return Path(unquote(place)) if uri.startswith("sqlite:///") else None


@dataclass(frozen=True)
class Entry:
    """What MLflow holds of a cell. metrics: (name, value, step), as of `end`.

    start, end: milliseconds since 1970, of a finished cell. left_out: metrics whose name or value MLflow does
    not take, which an earlier version of ctp stored.
    """

    params: dict[str, str]
    tags: dict[str, str]
    metrics: list[tuple[str, float, int]] = field(default_factory=list)
    start: int | None = None
    end: int = 0
    left_out: tuple[str, ...] = ()


def entry(grid: str, node: Node, manifest: Manifest | None = None, history: Iterable[dict[str, Any]] = ()) -> Entry:
    """The entry of a cell: with a manifest that of a finished one. history: of learning, by step.

    MLflow takes 6,000 characters of a param.
    """
    settings = {safe(n): str(v)[:6000] for n, v in reversed(params(node.cell).items())}
    tags = {KEY: node.key, KIND: node.cell.kind, "ctp.grid": grid, "mlflow.runName": slug(node.cell)}
    tags |= current_tags(node)
    if manifest is None:
        return Entry(settings, tags)
    numbers = manifest["metrics"] | {"seconds": manifest["seconds"], "peak_memory_bytes": manifest["peak_memory_bytes"]}
    left_out = tuple(n for n, v in numbers.items() if name_problem(n) or not isinstance(v, int | float))
    metrics = [(n, float(v), 0) for n, v in numbers.items() if n not in left_out]
    metrics += [
        (called, float(point[name]), int(point["step"]))
        for point in history
        for name, called in CURVES.items()
        if point.get(name) is not None
    ]
    tags |= _made(manifest) | ({LEFT_OUT: ", ".join(left_out)[:5000]} if left_out else {})
    end = int(1000 * manifest["created"])
    return Entry(settings, tags, metrics, end - int(1000 * manifest["seconds"]), end, left_out)


def current_tags(node: Node) -> dict[str, str]:
    """Tags that follow the grid as it is now, and what an evaluation may be compared with."""
    own = fingerprints(node.cell) if isinstance(node.cell, Evaluate) else {}
    return {CURRENT: "yes", STUDIES: ",".join(node.studies), **{f"ctp.{n}": v for n, v in own.items()}}


def _made(manifest: Manifest) -> dict[str, str]:
    """Tags that say where and by which code a cell was computed, and on which text."""
    found = {"device": manifest["device"], "git_commit": manifest["git_commit"] or ""}
    if "computed_in" in manifest:
        found["computed_in"] = manifest["computed_in"]
    if "at_once" in manifest:
        found["at_once"] = str(manifest["at_once"])
    if "task" in manifest:
        found["metric"] = manifest["task"]["metric"]
    if detail := manifest.get("machine_detail"):
        gpus = [g.get("name", "GPU") for g in detail.get("gpus") or []]
        found["machine"] = ", ".join(gpus) or f"{detail.get('cpu')}, {detail.get('threads')} threads"
    return {safe(f"ctp.{n}"): str(v) for n, v in (found | manifest.get("text", {})).items()}


def fingerprint(done: Iterable[Node]) -> str:
    """One hash (hex) of these finished cells and of all tags that a check of MLflow would compare."""
    whole = hashlib.sha256()
    for node in sorted(done, key=lambda n: n.key):
        whole.update(canonical([node.key, sorted(current_tags(node).items())]).encode())
    return whole.hexdigest()


def every_run(client: "MlflowClient", experiment: str, which: str) -> "list[Run]":
    """All runs of an experiment for which an MLflow filter holds, page by page.

    Each run is hundreds of small objects that live until the page is read: Python's collector, which looks at all of
    them again and again, would take more than half of the time.
    """
    runs: list[Run] = []
    token, collecting = None, gc.isenabled()
    gc.disable()
    try:
        while token != "":
            page = client.search_runs([experiment], which, max_results=5000, page_token=token)
            runs += page
            token = page.token or ""
    finally:
        if collecting:
            gc.enable()
    return runs


class Invocation:
    """One call of `ctp grid`, from its start on. cells: how many it is to run; None where it only writes to MLflow."""

    def __init__(self, grid: str, command: str, cells: int | None) -> None:
        self.grid, self.command, self.cells = grid, command, cells
        self.began = time.time()
        self.ended: dict[str, str] = {}  # key of a cell -> done, failed or skipped

    def tags(self) -> dict[str, str]:
        """The name of its run starts with its time (UTC): MLflow's table cuts names off."""
        name = f"{time.strftime('%Y-%m-%d %H:%M:%S', time.gmtime(self.began))} {self.grid}"
        own = {KIND: "grid", "ctp.grid": self.grid, "ctp.command": scrub(self.command), "mlflow.runName": name}
        return own | {"ctp.git_commit": git_commit() or "", **signs()}

    def params(self) -> dict[str, str]:
        """The driver's machine and versions; the manifests have the workers'."""
        found = versions()
        return {"host": platform.node(), **{n: str(found[n]) for n in ("ctp", "torch", "transformers") if found[n]}}

    def tell(self, event: Event) -> None:
        """Count an event of a cell."""
        if outcome := OUTCOMES.get(type(event)):
            self.ended[event.key] = outcome

    def metrics(self) -> dict[str, float]:
        """grid/cells: how many it was to run, and how many of them are done, failed and skipped; grid/seconds: since it
        began. Not `seconds`, which is a cell's: MLflow would draw both in one chart."""
        found: dict[str, float] = {"seconds": time.time() - self.began}
        if self.cells is not None:
            count = Counter(self.ended.values())
            found |= {"cells": max(self.cells, len(self.ended)), **{n: count[n] for n in OUTCOMES.values()}}
        return {f"grid/{n}": v for n, v in found.items()}


def document(manifests: Mapping[str, str]) -> tuple[str, int]:
    """One JSON object of manifests by key, a line each, and how many it has: the first LARGEST bytes of them."""
    lines = [f'"{k}": {manifest}' for k, manifest in manifests.items()]
    sizes = accumulate(len(line) + 2 for line in lines)
    count = sum(size <= LARGEST for size in sizes)
    return "{\n" + ",\n".join(lines[:count]) + "\n}\n", count
