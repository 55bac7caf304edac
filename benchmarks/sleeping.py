"""Cells that sleep a stated time and compute nothing: what is left of a run's time is the scheduler's own.

A worker that runs `WORKER` as a plugin takes `execute` of this module for ctp's: the artifact is published by
the real store, and torch is never imported. Without it nothing here replaces anything.
"""

import os
import time
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from ctp.cells import Compression, Measure, Recovery
from ctp.cells.cell import Cell, Compress, Evaluate, Learn, key
from ctp.cells.events import Report
from ctp.cells.inputs import Finite, Model
from ctp.cells.runtime import Runtime
from ctp.models.sources import Facts
from ctp.planning.graph import Node, Plan
from ctp.planning.gridfile import Grid
from ctp.storage.ref import identity, ref
from ctp.storage.store import Store

Seconds = Annotated[float, Finite, Field(ge=0)]
WORKER = {
    "sleeping": "import sys\nimport benchmarks.sleeping\nsys.modules['ctp.execution.execute'] = benchmarks.sleeping\n"
}
PATIENCE = 120.0  # seconds that a gate waits for the others
FACTS = Facts(dtype="float32", context=None, parameters=1, layers=1, linear_parameters=1, in_features=(1,), vocab=1,
              width=1, refused={})  # fmt: skip


class SleepingCompression(Compression):
    """Sleeps. gate: a folder where `number` of these wait for each other first, so that as many workers run."""

    method: Literal["sleeping_compression"] = "sleeping_compression"
    name: str
    seconds: Seconds
    gate: str = ""
    number: int = 0

    @property
    def label(self) -> str:
        return self.name


class SleepingRecovery(Recovery):
    """Sleeps."""

    method: Literal["sleeping_recovery"] = "sleeping_recovery"
    seconds: Seconds


class SleepingMeasure(Measure):
    """Sleeps."""

    method: Literal["sleeping_measure"] = "sleeping_measure"
    seconds: Seconds


def seconds(cell: Cell) -> float:
    """How long a cell sleeps."""
    method = cell.method
    assert isinstance(method, SleepingCompression | SleepingRecovery | SleepingMeasure)
    return method.seconds


def execute(cell: Cell, store: Store, runtime: Runtime, report: Report) -> None:
    """Sleep and publish, as ctp's own computes and publishes. Raises TimeoutError where a gate stays shut."""
    with store.publish(ref(cell), identity(cell)) as draft:
        if isinstance(cell, Compress) and isinstance(cell.compression, SleepingCompression) and cell.compression.gate:
            _wait(Path(cell.compression.gate), key(cell), cell.compression.number)
        time.sleep(seconds(cell))
        (draft.path / "result.json").write_text("{}\n")
        draft.record |= {"metrics": {"process": os.getpid()}, "seconds": seconds(cell)}


def _wait(gate: Path, name: str, number: int) -> None:
    (gate / name).touch()
    end = time.monotonic() + PATIENCE
    while len(list(gate.iterdir())) < number:
        if time.monotonic() > end:
            raise TimeoutError(f"{number} workers did not start within {PATIENCE:.0f} s")
        time.sleep(0.05)


def transfer_grid(compressions: int, lengths: tuple[float, float, float], gates: int, gate: Path) -> Plan:
    """Every compression has a prompt, and every prompt is measured on every compression, as the paper's figure 5 does.

    lengths: seconds of a compression, of learning and of a measurement. gates: as many cells that wait for each other
    come first; learning needs them too.
    """
    model = Model(name="sleeper", revision="1", dtype="float32")
    compress, learn, measure = lengths
    first = [
        Compress(
            model=model, compression=SleepingCompression(name=f"gate-{i}", seconds=0, gate=str(gate), number=gates)
        )
        for i in range(gates)
    ]
    small = [
        Compress(model=model, compression=SleepingCompression(name=f"small-{i}", seconds=compress))
        for i in range(compressions)
    ]
    learned = [Learn(source=c, recovery=SleepingRecovery(seconds=learn)) for c in small]
    recoveries: list[Learn | None] = [None, *learned]
    measured = [
        Evaluate(target=c, recovery=r, measure=SleepingMeasure(seconds=measure)) for c in small for r in recoveries
    ]
    opened = tuple(key(c) for c in first)
    nodes = {}
    cells: list[Cell] = [*first, *small, *learned, *measured]
    for cell in cells:
        inputs = tuple(key(i) for i in cell.inputs) + (opened if isinstance(cell, Learn) else ())
        nodes[key(cell)] = Node(cell, key(cell), inputs, ("sleeping",), FACTS)
    return Plan("sleeping", Grid("sleeping", Path("sleeping.yaml"), "", (), {}), nodes)
