"""The drivers (running grids) that a store knows of, by the records that they keep in it."""

import time
from typing import Literal

from pydantic import BaseModel

from ctp.machine.process import BEAT, DEAD_SECONDS, OWNER, is_alive, signs
from ctp.storage.store import Store

RUNNING = "running"
SILENT_SECONDS = 60.0  # without a sign, after which a driver is silent


class CellAtWork(BaseModel):
    """A running cell. seconds: since it started; left: until its last step; the others as in cells.events.Progress."""

    key: str
    kind: str
    name: str
    seconds: float
    step: int | None = None
    steps: int | None = None
    loss: float | None = None
    best_val_loss: float | None = None
    tokens_per_s: float | None = None
    at_once: int | None = None
    left: float | None = None


class About(BaseModel):
    """Where to look at a run. command: its arguments; mlflow, ray: URIs; machines, cpus, gpus: once they are known."""

    command: str = ""
    mlflow: str = ""
    ray: str = ""
    machines: int | None = None
    cpus: float | None = None
    gpus: float | None = None

    @property
    def cluster(self) -> str:
        """Its size as text; empty for a single machine."""
        many = (self.machines or 1) > 1
        return f"{self.machines} machines, {self.cpus:g} CPUs, {self.gpus:g} GPUs" if many else ""


class Driver(About):
    """A driver's record. signs: of its process; total, done, failed, skipped: cells; began: seconds since 1970.

    path, silence (seconds since its last sign), state: as read.
    """

    grid: str
    machine: str
    pid: int
    signs: dict[str, str]
    total: int
    done: int
    failed: int
    skipped: int
    began: float
    cells: list[CellAtWork]
    path: str = ""
    silence: float = 0.0
    state: Literal["alive", "silent", "dead"] = "alive"

    @property
    def is_left(self) -> bool:
        """Is its driver dead, or has it been silent for longer than a running one can be?"""
        return self.state == "dead" or self.silence > DEAD_SECONDS


def records(store: Store, grid: str | None) -> list[Driver]:
    """The drivers of a grid (None: of all), the last sign first. state: "silent" after SILENT_SECONDS (its machine may
    be gone), "dead" where its process is known to have ended. Raises StoreError where the store does not answer.
    """
    found = []
    for path in store.folders.glob(RUNNING, "*.json"):
        try:
            driver = Driver.model_validate_json(store.folders.read(path) or b"")
            if grid not in (None, driver.grid):
                continue
            silence = max(0.0, time.time() - float(driver.signs[BEAT]))
            state = _state(driver.signs, silence)
        except (ValueError, KeyError):
            continue  # cut off while it was written, or of another version
        found.append(driver.model_copy(update={"path": path, "silence": silence, "state": state}))
    return sorted(found, key=lambda d: d.silence)


def _state(driver: dict[str, str], silence: float) -> str:
    here = driver[OWNER].partition(" ")[0] == signs()[OWNER].partition(" ")[0]
    if here and not is_alive(driver, 0.0):
        return "dead"
    return "silent" if silence > SILENT_SECONDS else "alive"
