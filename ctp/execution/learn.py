"""What a Learn cell does, by its method."""

from collections.abc import Callable
from functools import partial, singledispatch

from ctp.cells import Adapter, Learned, LoRA, Recovery, SoftPrompt, Untrained
from ctp.execution.jobs import LearnJob
from ctp.learning import lora, soft_prompt
from ctp.models import adapters
from ctp.prompts.files import Outcome, save_prompt
from ctp.prompts.rows import untrained_rows


def recover(job: LearnJob) -> dict[str, float]:
    """Write an adapter in PEFT's format into `job.folder`; returns its metrics. A method's own `recover(job)` comes
    first.
    """
    spec = job.cell.recovery
    return spec.recover(job) if hasattr(spec, "recover") else builtin_recover(spec, job)


@singledispatch
def builtin_recover(spec: Recovery, job: LearnJob) -> dict[str, float]:
    """What the built-in method does that `spec` is, or is derived from."""
    raise NotImplementedError(f"method {spec.method!r} has no recover(job)")


@builtin_recover.register
def _soft_prompt(spec: SoftPrompt, job: LearnJob) -> dict[str, float]:
    return _learn(partial(soft_prompt.learn, tokenizer=job.tokenizer), spec, job)


@builtin_recover.register
def _lora(spec: LoRA, job: LearnJob) -> dict[str, float]:
    return _learn(lora.learn_lora, spec, job)


def _learn(learn: Callable[..., Outcome], spec: Learned, job: LearnJob) -> dict[str, float]:
    """Learn through the job's model, from its last saved state, and save."""
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


@builtin_recover.register
def _untrained(spec: Untrained, job: LearnJob) -> dict[str, float]:
    rows = untrained_rows(spec, job.model, job.tokenizer)
    save_prompt(job.folder, rows, job.model_name)
    return {"trainable_parameters": 0, "prompt_tokens": len(rows)}


@builtin_recover.register
def _adapter(spec: Adapter, job: LearnJob) -> dict[str, float]:
    adapters.copy_adapter(adapters.fetch(job.location(spec), spec.revision), job.folder)
    return {"trainable_parameters": adapters.parameters(job.folder)}
