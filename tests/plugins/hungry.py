"""A measure whose process the kernel ends, as for its memory, where it takes more than `fits` inputs at a time."""

import os
import signal
from typing import TYPE_CHECKING, Literal

from ctp.cells import Measure

if TYPE_CHECKING:
    from ctp.execution.jobs import EvaluateJob


class Hungry(Measure):
    method: Literal["hungry"] = "hungry"
    fits: int = 1

    @property
    def label(self) -> str:
        return f"hungry-{self.fits}"

    def measure(self, job: "EvaluateJob") -> dict[str, float]:
        if job.runtime.batch > self.fits:
            os.kill(os.getpid(), signal.SIGKILL)
        return {"batch": job.runtime.batch}
