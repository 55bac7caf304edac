"""What MLflow holds of one invocation of a grid: name, tags, params, numbers and manifests of its parent run."""

import platform
import time
from collections import Counter
from collections.abc import Mapping

from ctp.alive import signs
from ctp.redact import scrub
from ctp.runinfo import KIND
from ctp.versions import git_commit, versions

GRID_FILE, MANIFESTS = "grid.yaml", "manifests.json"
LARGEST = 64 * 2**20  # bytes of MANIFESTS
VERSIONS = ("ctp", "torch", "transformers")
OUTCOMES = ("done", "failed", "skipped")


class Invocation:
    """One call of `ctp grid`, from its begin on. cells: how many it is to run; None where it only writes down."""

    def __init__(self, grid: str, command: str, cells: int | None) -> None:
        self.grid, self.command, self.cells = grid, command, cells
        self.began = time.time()
        self.ended: dict[str, str] = {}  # key of a cell -> done, failed or skipped: what it came to last

    @property
    def name(self) -> str:
        """When it began, in UTC, tells it from others; first, for the UI's table cuts names off."""
        return f"{time.strftime('%Y-%m-%d %H:%M:%S', time.gmtime(self.began))} {self.grid}"

    def tags(self) -> dict[str, str]:
        own = {KIND: "grid", "ctp.grid": self.grid, "ctp.command": scrub(self.command), "mlflow.runName": self.name}
        return own | {"ctp.git_commit": git_commit() or "", **signs()}

    def params(self) -> dict[str, str]:
        """Where it ran, and with what: the driver's; workers may have others, which the manifests tell."""
        found = versions()
        return {"host": platform.node(), **{n: str(found[n]) for n in VERSIONS if found[n]}}

    def tell(self, event: Mapping[str, object]) -> None:
        """An event of a cell."""
        if event["event"] in OUTCOMES:
            self.ended[str(event["key"])] = str(event["event"])

    def metrics(self) -> dict[str, float]:
        """grid/cells: that it was to run, of which so many are done, failed and skipped; grid/seconds: since it began.
        Not `seconds`, which is a cell's: sums and their parts would be bars of one chart."""
        found: dict[str, float] = {"seconds": time.time() - self.began}
        if self.cells is not None:
            count = Counter(self.ended.values())
            found |= {"cells": max(self.cells, len(self.ended)), **{n: count[n] for n in OUTCOMES}}
        return {f"grid/{n}": v for n, v in found.items()}


def document(manifests: Mapping[str, str]) -> tuple[str, int]:
    """One JSON object of manifests by key, each on a line of its own, and how many it has: of more than LARGEST bytes
    in all the first."""
    lines: list[str] = []
    room = LARGEST
    for k, manifest in manifests.items():
        line = f'"{k}": {manifest}'
        room -= len(line) + 2
        if room < 0:
            break
        lines.append(line)
    return "{\n" + ",\n".join(lines) + "\n}\n", len(lines)
