"""What an Evaluate cell does, by its measure."""

import json
import shutil
from dataclasses import asdict, astuple
from functools import partial, singledispatch
from typing import cast

from ctp.cells import Generation, Latency, Measure, Neighbours, Perplexity, Task
from ctp.execution.jobs import EvaluateJob
from ctp.machine.arithmetic import dtype_name
from ctp.machine.memory import AtOnce, smaller
from ctp.machine.record import machine


def measure(job: EvaluateJob) -> dict[str, float]:
    """Numbers about `job.model`, behind `job.prompt` if there is one; files go into `job.folder`. A measure's own
    `measure(job)` comes first.

    If memory runs out, a batched measure starts again with fewer inputs at a time. Raises OutOfMemory if one input is
    too many.
    """
    if not job.cell.measure.batched:
        return _once(job)
    requested, at_once = job.runtime.batch, AtOnce(job.runtime.batch, job.runtime.halved)
    record = cast(dict[str, object], job.record)
    before = record.copy()

    def attempt(batch: int) -> dict[str, float]:
        for left in job.folder.iterdir():
            left.unlink() if left.is_file() else shutil.rmtree(left)
        record.clear()
        record.update(before)
        job.runtime, job.lowered = job.runtime.model_copy(update={"batch": batch}), smaller(requested, batch)
        return _once(job)

    metrics = at_once(attempt)
    record |= job.lowered
    return metrics


def _once(job: EvaluateJob) -> dict[str, float]:
    spec = job.cell.measure
    return spec.measure(job) if hasattr(spec, "measure") else builtin_measure(spec, job)


@singledispatch
def builtin_measure(spec: Measure, job: EvaluateJob) -> dict[str, float]:
    """What the built-in method does that `spec` is, or is derived from."""
    raise NotImplementedError(f"method {spec.method!r} has no measure(job)")


# Each imports what it computes with: lm-evaluation-harness, for one, takes seconds.
@builtin_measure.register
def _perplexity(spec: Perplexity, job: EvaluateJob) -> dict[str, float]:
    from ctp.evaluation.perplexity import PerplexityResult, perplexity

    ids = job.windows(spec.text)
    done, results = 0, []
    for windows, front in job.behind(ids):
        progress = partial(_progress_after, job, done, len(ids))
        results.append(perplexity(job.model, windows, front, batch=job.runtime.batch, progress=progress))
        done += len(windows)
    result = PerplexityResult(*(sum(column) for column in zip(*map(astuple, results), strict=True)))
    sums = {n: getattr(result, n) for n in ("nll_sum", "scored_tokens", "positions")}
    return {"ppl": result.ppl, "ppl_paper": result.ppl_paper, **sums}


def _progress_after(job: EvaluateJob, done: int, of: int, more: int, _: int) -> None:
    job.progress(done + more, of)


@builtin_measure.register
def _task(spec: Task, job: EvaluateJob) -> dict[str, float]:
    """The task's metrics; `samples.jsonl` has a line for each document."""
    from ctp.evaluation.tasks import build, run_task

    task = build(job.location(spec), spec.revision, spec.shots)
    result = run_task(
        task, job.model, job.tokenizer, job.prompt,
        batch=job.runtime.batch, limit=spec.limit, text=job.hard_prompt, progress=job.progress,
    )  # fmt: skip
    with (job.folder / "samples.jsonl").open("w", encoding="utf-8") as f:
        f.writelines(json.dumps(line, default=str) + "\n" for line in result.samples)
    job.record["task"] = {**result.about, "shots": spec.shots}
    return result.metrics


@builtin_measure.register
def _latency(spec: Latency, job: EvaluateJob) -> dict[str, float]:
    """latency.json has every single timing and the machine."""
    from ctp.evaluation.latency import latency

    model = job.model
    attention = model.config._attn_implementation
    about = machine() | {"device": job.device, "dtype": dtype_name(model.dtype), "attention": attention}
    result = latency(
        model, spec.seq_len, spec.new_tokens, job.prompt, batch=spec.batch, warmup=spec.warmup, repeats=spec.repeats,
        progress=job.progress,
    )  # fmt: skip
    job.record["machine_detail"] = about
    job.write_json("latency.json", {"settings": spec.model_dump(), "machine": about, **asdict(result)})
    return result.metrics()


@builtin_measure.register
def _generation(spec: Generation, job: EvaluateJob) -> dict[str, float]:
    """Answers in answers.json with their lengths in tokens; `repeated_4grams` unless no answer has four tokens."""
    from ctp.evaluation.generation import answer_tokens, plain_text, repeated_4grams

    questions = [line for line in spec.questions.splitlines() if line.strip()]
    batch, front = job.runtime.batch, job.hard_prompt
    made = answer_tokens(job.model, job.tokenizer, questions, job.prompt, spec.new_tokens, batch, job.progress, front)
    answers = [plain_text(job.tokenizer, ids) for ids in made]
    rows = zip(questions, answers, made, strict=True)
    job.write_json("answers.json", [{"question": q, "answer": a, "tokens": len(ids)} for q, a, ids in rows])
    written, empty = sum(map(len, made)), sum(not answer.strip() for answer in answers)
    out = {"questions": len(made), "tokens": written, "tokens_per_answer": written / len(made), "empty_answers": empty}
    repeated = repeated_4grams(made)
    return out if repeated is None else {**out, "repeated_4grams": repeated}


@builtin_measure.register
def _neighbours(spec: Neighbours, job: EvaluateJob) -> dict[str, float]:
    """neighbours.json has the nearest word of each row and the histogram of all cosines."""
    from ctp.evaluation.neighbours import histogram, nearest_words, neighbours, summary

    if job.prompt is None:
        raise ValueError("neighbours are those of a prompt's rows: there is no prompt here (LoRA has none)")
    cosines, ids = neighbours(job.prompt, job.model.get_input_embeddings().weight, spec.top)
    nearest = nearest_words(cosines, ids, job.tokenizer)
    job.write_json("neighbours.json", {"top": spec.top, "nearest": nearest, "histogram": histogram(cosines)})
    return summary(cosines, ids)
