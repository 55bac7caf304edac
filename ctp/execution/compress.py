"""What a Compress cell does, by its method."""

from dataclasses import replace
from functools import singledispatch

from ctp.cells import Checkpoint, Compression, Dense, Solver
from ctp.compression.walk import compress_model
from ctp.execution.jobs import CompressJob
from ctp.formats import checkpoint
from ctp.formats.artifact import Compressed, Routing
from ctp.models.config import model_facts


def compress(job: CompressJob) -> dict[str, float]:
    """Write the compressed model into `job.folder`; returns its metrics. A method's own `compress(job)` comes first."""
    spec = job.cell.compression
    return spec.compress(job) if hasattr(spec, "compress") else builtin_compress(spec, job)


@singledispatch
def builtin_compress(spec: Compression, job: CompressJob) -> dict[str, float]:
    """What the built-in method does that `spec` is, or is derived from."""
    raise NotImplementedError(f"method {spec.method!r} has no compress(job)")


@builtin_compress.register
def _dense(spec: Dense, job: CompressJob) -> dict[str, float]:
    """The model itself is the artifact, at its pinned revision: only its location is recorded."""
    job.record["location"] = job.location(job.base)
    return {"parameters": model_facts(job.record["location"], job.base.revision).parameters, "sparsity": 0.0}


@builtin_compress.register
def _checkpoint(spec: Checkpoint, job: CompressJob) -> dict[str, float]:
    """With the base model's tokenizer: all cells of a model score the same tokens."""
    folder = checkpoint.fetch(job.location(spec), spec.revision)
    small = checkpoint.open_checkpoint(folder, job.base.dtype, job.base_tokenizer())
    small.model()  # raises where a weight is missing or odd
    small.save(job.folder)
    return small.stats()


@builtin_compress.register
def _solve(spec: Solver, job: CompressJob) -> dict[str, float]:
    model, tokenizer = job.load_base()
    ids = job.calibration(tokenizer)
    routing = Routing()
    layers = compress_model(model, ids, spec, progress=job.progress, routing=routing)
    small = replace(Compressed.of(model, layers, tokenizer), routing=routing)
    small.save(job.folder)
    if text := routing.notice():
        job.notice(f"{job.base.name} {spec.label}: {text}")
        job.record["experts_short_of_tokens"] = routing.short
    return small.stats()
