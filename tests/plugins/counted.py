"""A measure that says which process took it, and whether that process had just loaded its model."""

import os
import signal
import time
from typing import TYPE_CHECKING, Literal

from ctp.cells import Measure

if TYPE_CHECKING:
    from ctp.execution.jobs import EvaluateJob


class Counted(Measure):
    """mishap: "" for none, "error", or "death" of the worker."""

    method: Literal["counted"] = "counted"
    index: int = 0
    mishap: str = ""

    @property
    def label(self) -> str:
        return f"counted-{self.index}"

    def measure(self, job: "EvaluateJob") -> dict[str, float]:
        if self.mishap == "error":
            raise ValueError("as asked")
        if self.mishap == "death":
            os.kill(os.getpid(), signal.SIGKILL)
        loaded = not hasattr(job.model, "counted")
        job.model.counted = True
        time.sleep(0.02)
        return {"pid": os.getpid(), "loaded": int(loaded)}
