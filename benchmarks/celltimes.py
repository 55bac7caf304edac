"""Seconds of cells: from the cost model alone, or as a store's manifests say that such cells took.

Of every method in a store, seconds = fixed + operations / (share x this machine's matmul speed) is fitted by least
squares, neither below 0; operations are the cost model's (ctp/cost.py), the speed is measured here, in the number
format that the cell computed in. On a GPU the share is taken to be the same, and `fixed` the same number of seconds.

A share above 1 (the cost model counts more operations than there were) becomes 1. Where the largest cell of a method is
too small to tell (below `LEAST` seconds of matmul), the share is that of all cells of its kind.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from ctp.cells import Dense, Learned
from ctp.cells.cell import Cell, Compress, Evaluate, Learn, from_json
from ctp.models import sources
from ctp.models.config import model_facts
from ctp.models.sources import Facts
from ctp.planning import cost
from ctp.storage.catalog import Artifact as Entry
from ctp.storage.catalog import entries
from ctp.storage.store import Store

SIZE, TIMES = 2048, 5  # of the matrices that are multiplied to measure the speed, and how often
LEAST = 1.0
FIXED = 10.0  # seconds that a cell takes beside reading and computing, where nothing was measured: an assumption
Kind = tuple[str, str]  # of a cell, and its method


@dataclass(frozen=True)
class Pace:
    """Of the cells of one method. fixed: seconds that each takes. share: of the matmul speed that they reach, inf where
    they compute nothing. cells: that were measured. missed: root mean square of what the fit misses, over their mean.
    own: fitted to cells of this method, and not to all of its kind.
    """

    fixed: float
    share: float
    cells: int = 0
    missed: float = 0.0
    own: bool = True

    def seconds(self, flops: float, speed: float) -> tuple[float, float]:
        """(fixed, computing) of so many operations where a matmul runs at `speed` operations a second."""
        return self.fixed, flops / (self.share * speed)


def kind(cell: Cell) -> Kind:
    """What the time of a cell goes by."""
    if isinstance(cell, Compress):
        return cell.kind, cell.compression.method
    if isinstance(cell, Learn):
        return cell.kind, cell.recovery.method
    assert isinstance(cell, Evaluate)
    return cell.kind, cell.measure.method


def number_format(cell: Cell) -> str:
    """What a cell multiplies matrices in: the model's dtype, or autocast's where it learns under that."""
    if isinstance(cell, Compress):
        return cell.model.dtype
    if isinstance(cell, Evaluate):
        return cell.target.model.dtype
    assert isinstance(cell, Learn)
    precision = cell.recovery.precision if isinstance(cell.recovery, Learned) else "fp32"
    return {"fp32": cell.source.model.dtype, "bf16": "bfloat16", "fp16": "float16"}[precision]


def matmul_speed(dtype: str, threads: int) -> float:
    """Operations a second of a matmul on this machine's CPU: the median of some."""
    import torch

    torch.set_num_threads(threads)
    a = torch.randn(SIZE, SIZE).to(getattr(torch, dtype))
    seconds = []
    for _ in range(TIMES + 1):
        begun = time.perf_counter()
        a @ a
        seconds.append(time.perf_counter() - begun)
    return 2 * SIZE**3 / statistics.median(seconds[1:])


def fit(points: Iterable[tuple[float, float]]) -> Pace:
    """The Pace of cells of (seconds that a matmul of as many operations takes, seconds that the cell took).

    Where the larger cells did not take longer, or all are of one size, all the time is put down to their operations:
    then nothing is known of what is fixed, and they are not made out to be faster than they were.
    """
    x, y = zip(*points, strict=True)
    mean = statistics.fmean(y)
    if not any(x):
        fixed, slope = mean, 0.0
    else:
        spread = statistics.pvariance(x)
        slope = statistics.covariance(x, y) * (len(x) - 1) / len(x) / spread if spread > 0 else 0.0
        fixed = mean - slope * statistics.fmean(x)
        if slope <= 0 or fixed < 0:
            fixed, slope = 0.0, sum(a * b for a, b in zip(x, y, strict=True)) / sum(a * a for a in x)
    errors = [b - fixed - slope * a for a, b in zip(x, y, strict=True)]
    missed = math.sqrt(statistics.fmean(e * e for e in errors)) / mean if mean else 0.0
    return Pace(fixed, min(1.0, 1 / slope) if slope else math.inf, len(x), missed)


def measured(store: Store, speed: Callable[[str], float]) -> dict[Kind, Pace]:
    """The pace of every method in the store; speed: number format -> operations a second of a matmul here.

    Raises ValueError where the store is empty, or a model is not to be found.
    """
    found = entries(store)
    if not found:
        raise ValueError(f"--measured {store.uri}: nothing is done there")
    facts = facts_of(found)
    points: dict[Kind, list[tuple[float, float]]] = {}
    for entry in found:
        cell = from_json(entry.manifest)
        flops = cost.of(cell, facts[model_of(cell)]).flops
        points.setdefault(kind(cell), []).append((flops / speed(number_format(cell)), entry.manifest["seconds"]))
    out = {k: fit(p) for k, p in points.items()}
    for k, own in points.items():
        if 0 < max(x for x, _ in own) < LEAST:
            pooled = fit(p for other, them in points.items() if other[0] == k[0] for p in them if p[0] > 0)
            out[k] = replace(pooled, cells=len(own), own=False)
    return out


def model_of(cell: Cell) -> tuple[str, str]:
    """Name and revision of the model that a cell is about."""
    while not isinstance(cell, Compress):
        cell = cell.inputs[0]
    return cell.model.name, cell.model.revision


def facts_of(found: list[Entry]) -> dict[tuple[str, str], Facts]:
    """Of every model, read where its dense artifact says that it lay; else where its name says."""
    out = {}
    cells = [(from_json(e.manifest), e.manifest) for e in found]
    at = {model_of(c): m["location"] for c, m in cells if isinstance(c, Compress) and isinstance(c.compression, Dense)}
    for model in {model_of(c) for c, _ in cells}:
        location = at.get(model) or sources.locate(*model)[2]
        out[model] = model_facts(location, model[1])
    return out


def assumed(cells: Iterable[Cell]) -> dict[Kind, Pace]:
    """Without measurements: every operation at the full given speed, and some seconds a cell."""
    return {kind(c): Pace(FIXED, 1.0) for c in cells}
