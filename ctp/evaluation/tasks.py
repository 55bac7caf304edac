"""Tasks of lm-evaluation-harness, run on a model with or without a soft prompt in front of every request."""

import contextlib
import copy
import io
import logging
import math
import os
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ctp.data import tasks
from ctp.data.taskfiles import INSTALL, harness_version
from ctp.evaluation.harness import SoftPromptLM
from ctp.prompts.attach import frozen

try:
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.evaluator import evaluate
    from lm_eval.tasks._yaml_loader import load_yaml
except ImportError as e:
    raise ImportError(INSTALL) from e

SEEDS = {"random": 0, "numpy": 1234, "torch": 1234, "examples": 1234}  # the harness's own
BOOTSTRAP = 1000  # draws for the standard error of metrics that have no formula for it
OURS = ("score", "score_stderr", "documents")


@dataclass(frozen=True)
class TaskResult:
    """metrics: what the task reports, standard errors, `documents`, and `score`: `acc_norm`, `acc` or its first one.

    samples: for each document its hash, that of its prompt, the responses (log-likelihood and whether greedy decoding
    gives it, for each choice; or the text), its metrics. about: name, chosen metric, versions and how many inputs were
    cut to the context.
    """

    metrics: dict[str, float]
    samples: list[dict[str, Any]]
    about: dict[str, Any]


def run_task(
    task: Any,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Tensor | None,
    *,
    batch: int,
    limit: int | None = None,
    text: str = "",
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> TaskResult:
    """Run a task that `build` made on the model, behind `prompt` (k, d) where there is one.

    limit: the first so many documents. text: the hard prompt that the rows are, or "". Seeds are fixed; no chat
    template. Raises ValueError where the task cannot be run, FloatingPointError where a number is not finite.
    """
    name = task.config.task
    with quiet(), frozen(model), _seeded():
        rows = partial(_progress, progress, task)
        lm = SoftPromptLM(model, tokenizer, prompt, batch=batch, rows=rows, text=text)
        task.set_fewshot_seed(SEEDS["examples"])
        try:
            named = {"tasks": {name: task}}
            results = evaluate(lm, task_dict=named, limit=limit, bootstrap_iters=BOOTSTRAP, log_samples=True)
        except AssertionError as e:  # an answer longer than the context, no room to generate
            raise ValueError(f"the task {name} does not fit a context of {lm.max_length} tokens: {e}") from e
        finally:
            task._instances = None  # the task is kept for other cells, its requests are not
    samples = [_line(sample) for sample in results["samples"][name]]
    metrics = _metrics(results["results"][name], name)
    chosen = next((n for n in ("acc_norm", "acc") if n in metrics), next(iter(metrics), None))
    if chosen is None:
        raise ValueError(f"the task {name} reports no metric")
    documents = results["n-samples"][name]["effective"]
    about = {"name": name, "metric": chosen, "version": task.VERSION, "documents": documents}
    about |= {"harness": harness_version(), "cut": lm.cut}
    score = {f"score{end}": metrics[f"{chosen}{end}"] for end in ("", "_stderr") if f"{chosen}{end}" in metrics}
    return TaskResult({**score, **metrics, "documents": documents}, samples, about)


def _progress(progress: Callable[[int, int], None], task: Any, read: int) -> None:
    progress(min(read, len(task.instances)), len(task.instances))


def _metrics(reported: dict[str, Any], name: str) -> dict[str, float]:
    """The harness's `metric,filter` keys as names for MLflow: filter "none" is left out, so is a stderr "N/A"."""
    metrics: dict[str, float] = {}
    for key, value in reported.items():
        metric, comma, kept = key.partition(",")
        error = "_stderr" if metric.endswith("_stderr") else ""
        if not comma or (error and value == "N/A"):
            continue
        label = metric.removesuffix("_stderr") + ("" if kept == "none" else f"_{kept}")
        label = re.sub(r"[^\w.-]", "_", f"task_{label}" if label in OURS else label) + error
        if isinstance(value, str | bool) or not isinstance(value, int | float | np.number):
            raise ValueError(f"the task {name}: {key} = {value!r} is no number")
        if not math.isfinite(value):
            raise FloatingPointError(f"the task {name}: {key} = {value}")
        metrics[label] = float(value)
    return metrics


def _line(sample: dict[str, Any]) -> dict[str, Any]:
    """A document's line of samples.jsonl. Raises FloatingPointError where a log-likelihood is not finite."""
    for value in _floats(sample["filtered_resps"]):
        if not math.isfinite(value):
            raise FloatingPointError(f"document {sample['doc_id']}: a log-likelihood is {value}")
    line = {"doc": sample["doc_id"], **{n: sample[n] for n in ("doc_hash", "prompt_hash", "target")}}
    line |= {} if sample["filter"] == "none" else {"filter": sample["filter"]}
    return line | {"responses": sample["filtered_resps"], **{n: sample[n] for n in sample["metrics"]}}


def _floats(value: Any) -> Iterator[float]:
    if isinstance(value, float):
        yield value
    for inner in value if isinstance(value, list | tuple) else ():
        yield from _floats(inner)


_built: dict[tuple[str, str, int], Any] = {}


def build(location: str, revision: str, shots: int) -> Any:
    """The harness's object of a pinned task, kept with its documents for the next cell.

    Raises ValueError if the task has changed since it was pinned, or the harness cannot make it.
    """
    defined = tasks.check_pinned(location, revision)
    defined.check_shots(shots)
    memo = (location, revision, shots)
    if memo not in _built:
        config = {**load_yaml(defined.path), **defined.changes, "num_fewshot": shots}
        for key in ("tag", "group", "task_list"):  # where it belongs, not what it is
            config.pop(key, None)
        try:
            with quiet():
                built = ConfigurableTask(config=copy.deepcopy(config))
        except Exception as e:  # a template, a field, a split, a function: whatever is wrong in it
            why = " ".join(f"{type(e).__name__}: {e}".split())
            raise ValueError(f"the harness cannot make the task {defined.name}: {why}") from e
        tasks.check_pinned(location, revision)  # still what was pinned
        _built[memo] = built
    return _built[memo]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No log lines, progress bars or prints of the harness, and no processes of its own for bootstrapping."""
    logger, serial = logging.getLogger("lm_eval"), "DISABLE_MULTIPROC"
    level, before = logger.level, os.environ.get(serial)
    logger.setLevel(logging.ERROR)
    os.environ[serial] = "1"
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
        os.environ.pop(serial) if before is None else os.environ.update({serial: before})


@contextlib.contextmanager
def _seeded() -> Iterator[None]:
    """Every generator seeded as the harness does; put back on the way out."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        random.seed(SEEDS["random"])
        np.random.seed(SEEDS["numpy"])
        torch.manual_seed(SEEDS["torch"])
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
