"""Is a run what the paper measured, by its model, text, lengths and settings?"""

from typing import Any

import pandas as pd

from . import paper
from .paper import PaperNumber
from .roles import own_name


def incomparable(number: PaperNumber, run: Any) -> str:
    """Why this run is not what the paper measured; "" where it is."""
    where = number.where
    for axis in ("model", "dataset", "task", "learned_on"):
        if axis in where and run[axis] != own_name(where[axis]):
            return f"{axis} {run[axis]}"
    for axis in ("k", "rank"):
        if run[axis] != where.get(axis, run[axis]):
            return f"{axis} {run[axis]}"
    if "dataset" in where:
        if run["split"] != paper.document()["datasets"][where["dataset"]]["split"]:
            return f"split {run['split']}"
        if run.seq_len != paper.protocol("seq_len"):
            return f"windows of {run.seq_len}"
    if "task" in where and run.shots != paper.protocol("shots"):
        return f"{run.shots} shots"
    for setting, what in (("text.count", "windows"), ("limit", "documents")):
        if not pd.isna(some := run.get(f"spec.measure.{setting}", None)):
            return f"the first {some} {what} only"
    if "task" in where and run.metric not in ("", "acc_norm"):
        return f"{run.metric} and not normalised accuracy, of which the task has none"
    return _settings(number, run)


def _settings(number: PaperNumber, run: Any) -> str:
    """Which setting of text, compression or learning is not the paper's; "" where none is. What is not set is not."""
    wanted = dict(paper.document()["settings"])
    if "dataset" in number.where:
        wanted |= paper.document()["datasets"][number.where["dataset"]].get("settings", {})
    for place in ("target", "recovery.source", "source"):
        wanted |= {f"{place}.{n}": v for n, v in paper.document()["of_each"].items()}
    for name, value in wanted.items():
        have = run.get(f"spec.{name}", None)
        pruned_only = name.endswith(".refit") and pd.isna(run.get(f"spec.{name.removesuffix('refit')}bits", None))
        if not pd.isna(have) and str(have) != str(value) and not pruned_only:  # no scales, nothing to fit
            return f"{name} = {have}, not {value}"
    return ""
