"""The finished evaluations of a grid, read from MLflow as one table."""

import os
from pathlib import Path
from typing import Any

import pandas as pd

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")

import mlflow

AXES = ["model", "dataset", "split", "seq_len"]  # one matrix each
SOURCE = ["source", "recovery", "adapter", "k", "learned_on"]  # one row each
NUMBERS = ["ppl", "ppl_paper", "nll_sum", "scored_tokens", "positions"]


class AnalysisError(Exception):
    """What MLflow holds cannot be put into one table; the message says why and what to do."""


def existing(uri: str) -> str:
    """The tracking URI, as it is. Raises AnalysisError for an SQLite file that is not there: MLflow would make one."""
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).is_file():
        raise AnalysisError(
            f"there is no MLflow database at {uri}: run the grid, or say --store or MLFLOW_TRACKING_URI"
        )
    return uri


def evaluations(grid: str, where: str = "") -> pd.DataFrame:
    """One row a finished perplexity evaluation of the grid, as it was last run.

    Columns: every param of the run, the numbers, `tokenizer` and `run_id`. `where` is one more MLflow filter. Raises
    AnalysisError where there is no such experiment, no run, a run without a number, or rows of different tokenizers.
    """
    wanted = "attributes.status = 'FINISHED' and params.measure = 'perplexity' and tags.`ctp.current` = 'yes'"
    try:
        if mlflow.get_experiment_by_name(grid) is None:
            raise AnalysisError(f"MLflow at {mlflow.get_tracking_uri()} has no experiment {grid!r}")
        runs: Any = mlflow.search_runs(
            experiment_names=[grid], filter_string=f"{wanted} and {where}" if where else wanted, max_results=50_000
        )
    except mlflow.exceptions.MlflowException as e:
        raise AnalysisError(f"MLflow at {mlflow.get_tracking_uri()}: {e}") from e
    if runs.empty:
        raise AnalysisError(f"{grid}: no finished perplexity evaluation" + (f" where {where}" if where else ""))
    params = {c: c.removeprefix("params.") for c in runs.columns if c.startswith("params.")}
    numbers = {f"metrics.{n}": n for n in NUMBERS}
    table = runs[[*params, *numbers, "tags.ctp.tokenizer_sha256", "run_id"]].rename(columns=params | numbers)
    table = table.rename(columns={"tags.ctp.tokenizer_sha256": "tokenizer"})
    lacking = table[table[NUMBERS].isna().any(axis=1)]
    if len(lacking):
        raise AnalysisError(f"run {lacking.iloc[0].run_id} is finished but lacks one of {', '.join(NUMBERS)}")
    mixed = table.groupby("model").tokenizer.nunique()
    if (mixed > 1).any():
        raise AnalysisError(f"{mixed.idxmax()}: runs with different tokenizers do not belong in one table")
    for name in ("k", "seq_len"):
        table[name] = table[name].astype(int)
    for name in ("adapter", "learned_on", "seed"):
        table[name] = table[name].fillna("") if name in table else ""
    return table
