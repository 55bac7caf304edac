"""A cell of learning: from its texts to its folder."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from ctp.methods import Learned
from ctp.recover.state import Outcome

if TYPE_CHECKING:
    from ctp.job import LearnJob


def recover_with(learn: Callable[..., Outcome], spec: Learned, job: "LearnJob") -> dict[str, float]:
    """What a cell of learning does: `learn` through the job's model, on from its last saved state, and save.

    learn: called as `learn(model, windows, validation, spec, runtime=…, resume=…, checkpoint=…, report=…)`.
    """
    windows, validation = job.windows(spec.text), job.windows(spec.validation)
    with job.partial() as resume:
        learned = learn(
            job.model, windows, validation, spec,
            runtime=job.runtime, resume=resume, checkpoint=job.keep, report=job.report,
        )  # fmt: skip
    learned.save(job.folder, job.model_name)
    job.record["train_seconds"] = learned.seconds
    if "at_once" in learned.history[-1]:
        job.record["at_once"] = learned.history[-1]["at_once"]
    return {
        "best_step": learned.best_step,
        "best_val_loss": learned.best_val_loss,
        "initial_val_loss": learned.history[0]["val_loss"],
        "trainable_parameters": learned.trainable_parameters,
    }
