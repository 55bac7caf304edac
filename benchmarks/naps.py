"""A compression that sleeps: what is left of a run's time beside its cells is the scheduler's."""

import time
from typing import TYPE_CHECKING, Literal

from ctp.cells import Dense

if TYPE_CHECKING:
    from ctp.plugin import CompressJob


class Nap(Dense):
    """Like the dense model, it stores no weights."""

    method: Literal["nap"] = "nap"  # type: ignore[assignment]
    index: int = 0
    seconds: float = 0.1

    def compress(self, job: "CompressJob") -> dict[str, float]:
        time.sleep(self.seconds)
        job.write_json("nap.json", {"index": self.index})
        return {"slept": self.seconds}
