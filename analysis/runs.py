"""The finished cells of a grid, read from MLflow as one table a measure."""

import json
import os
from typing import Any

import pandas as pd

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")

import mlflow

from ctp.common.redact import scrub
from ctp.tracking.entries import CURRENT, KIND, every_run, sqlite_file

from .paper import level

AXES = ["model", "dataset", "split", "seq_len"]  # one matrix each
SOURCE = ["source", "recovery", "adapter", "k", "learned_on"]  # one row each
NUMBERS = ["ppl", "ppl_paper", "nll_sum", "scored_tokens", "positions"]
REQUIRED = {
    "perplexity": NUMBERS,
    "task": ["score"],
    "latency": ["prefill_seconds", "decode_seconds_per_token"],
    "generation": ["questions"],
    "neighbours": ["fraction_below_0.16"],
    "learn": ["trainable_parameters"],
}
WORDS = ("kind", "model", "compression", "target", "source", "recovery", "recovery_label", "learned_on", "dataset",
         "split", "task", "adapter", "seed", "dtype")  # fmt: skip
NOT_LEARNED = ("none", "untrained", "imported")  # sources of what this grid did not learn
COUNTS = ("k", "rank", "seq_len", "shots")
TAGS = {"ctp.tokenizer_sha256": "tokenizer", "ctp.data": "data", "ctp.protocol": "protocol",
        "ctp.device": "device", "ctp.machine": "machine", "ctp.metric": "metric"}  # fmt: skip
CELLS = f"tags.`{CURRENT}` = 'yes' and tags.`{KIND}` != 'grid'"  # that the grid still has


class AnalysisError(Exception):
    """What MLflow holds cannot be put into one table; the message says why and what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(scrub(message))


def existing(uri: str) -> str:
    """The tracking URI, as it is. Raises AnalysisError for an SQLite file that is not there: MLflow would make one."""
    file = sqlite_file(uri)
    if file is not None and not file.is_file():
        raise AnalysisError(
            f"there is no MLflow database at {uri}: run the grid, or say --store or MLFLOW_TRACKING_URI"
        )
    return uri


def evaluations(grid: str, where: str = "", dataset: str = "") -> pd.DataFrame:
    """The finished perplexities of a grid, as `finished` gives them; on one data set, where given.

    Raises AnalysisError where there is no such experiment, no run, or a run without one of its numbers.
    """
    filters = "params.measure = 'perplexity'", f"params.dataset = '{dataset}'" if dataset else "", where
    runs = finished(grid, " and ".join(f for f in filters if f))
    if runs.empty and dataset:
        known = sorted(evaluations(grid, where).dataset.unique())
        raise AnalysisError(f"{grid} has nothing on {dataset!r}; it has: {', '.join(known)}")
    if runs.empty:
        raise AnalysisError(f"{grid}: no finished perplexity evaluation" + (f" where {where}" if where else ""))
    return of_measure(runs, "perplexity", grid)


def finished(grid: str, where: str = "") -> pd.DataFrame:
    """One row a finished run of a cell that the grid still has. where: one more MLflow filter.

    Columns: every param of the run (COUNTS as int, 0 where it has none; WORDS as str, "" where it has none), every
    metric, the TAGS, `studies` (a tuple of names), `run_id`, and the compressions in the paper's words: `target_level`,
    `source_level`. Raises AnalysisError where there is no such experiment or MLflow does not answer.
    """
    wanted = f"attributes.status = 'FINISHED' and {CELLS}"
    return frame(search(grid, f"{wanted} and {where}" if where else wanted))


def search(grid: str, which: str) -> list[Any]:
    """All runs of a grid's experiment that an MLflow filter selects.

    Raises AnalysisError where there is no such experiment or MLflow does not answer.
    """
    client = mlflow.MlflowClient()
    try:
        experiment = client.get_experiment_by_name(grid)
        if experiment is None:
            raise AnalysisError(f"MLflow at {mlflow.get_tracking_uri()} has no experiment {grid!r}")
        return every_run(client, experiment.experiment_id, which)
    except mlflow.exceptions.MlflowException as e:
        raise AnalysisError(f"MLflow at {mlflow.get_tracking_uri()}: {e}") from e


def invocations(grid: str) -> list[Any]:
    """The runs of a grid's invocations, the newest first. Raises AnalysisError where there is none."""
    found = search(grid, f"tags.`{KIND}` = 'grid'")
    if not found:
        raise AnalysisError(
            f"MLflow at {mlflow.get_tracking_uri()} has no run of an invocation of {grid!r}: `ctp track sync {grid}` "
            "makes one"
        )
    return sorted(found, key=lambda r: -r.info.start_time)


def frame(runs: list[Any]) -> pd.DataFrame:
    """MLflow's runs of cells as the rows that `finished` promises.

    Words are Python objects: hundreds of columns of Arrow's are slow to pick from.
    """
    params = {n for r in runs for n in r.data.params}
    rows = typed(pd.DataFrame([_row(r, params) for r in runs], columns=None if runs else [*WORDS, *COUNTS]))
    return rows.astype({c: object for c in rows.columns if isinstance(rows[c].dtype, pd.StringDtype)}).copy()


def _row(run: Any, params: set[str]) -> dict[str, Any]:
    """A run as a row. params: names of params, which go before metrics called alike."""
    data = run.data
    row = {n: v for n, v in data.metrics.items() if n not in params} | data.params | {"run_id": run.info.run_id}
    row |= {n: data.tags[t] for t, n in TAGS.items() if t in data.tags}
    return row | {"studies": tuple(data.tags.get("ctp.studies", "").split(","))}


def typed(table: pd.DataFrame) -> pd.DataFrame:
    """The same rows with the columns that `finished` promises."""
    fixed: dict[str, Any] = {}
    for name in (*WORDS, "measure", *TAGS.values()):
        fixed[name] = table[name].fillna("").astype(str) if name in table else ""
    for name in COUNTS:
        fixed[name] = pd.to_numeric(table[name]).fillna(0).astype(int) if name in table else 0
    table = table.assign(**fixed)
    target = _levels(table, "spec.target.compression", table["target"])
    own = table["source"].isin(NOT_LEARNED)
    learned = [_levels(table, path, table["source"]) for path in ("spec.recovery.source.compression",
                                                                  "spec.source.compression")]  # fmt: skip
    is_learn = table["kind"] == "learn"
    source = learned[0].where(~is_learn, learned[1]).where(~own, table["source"])
    measure = table["measure"].where(~is_learn, "learn")
    return table.assign(target_level=target, source_level=source, measure=measure)


def _levels(table: pd.DataFrame, path: str, labels: pd.Series) -> pd.Series:
    """A compression in the paper's words; the label of one that the paper has no word for."""
    names = [f"{path}.{n}" for n in ("method", "bits", "sparsity", "pattern")]
    settings = table.reindex(columns=names).itertuples(index=False)
    return pd.Series([_level(*row) or label for row, label in zip(settings, labels, strict=True)], table.index, object)


def _level(method: Any, bits: Any, sparsity: Any, pattern: Any) -> str:
    """ "" where the paper has no such compression."""
    if method not in ("dense", "gptq", "sparsegpt") or not pd.isna(pattern):
        return ""
    return level(method, None if pd.isna(bits) else int(bits), None if pd.isna(sparsity) else float(sparsity))


def of_measure(table: pd.DataFrame, measure: str, grid: str) -> pd.DataFrame:
    """The rows of one measure (or "learn"). Raises AnalysisError where one lacks a REQUIRED number or a tag."""
    rows = table[table.measure == measure]
    for name in REQUIRED.get(measure, []):
        lacking = rows if name not in rows else rows[rows[name].isna()]
        if len(lacking):
            raise AnalysisError(f"run {lacking.iloc[0].run_id} ({measure}) is finished but lacks {name}")
    for name in () if measure == "learn" else ("data", "protocol"):
        lacking = rows[rows[name] == ""]
        if len(lacking):
            raise AnalysisError(
                f"run {lacking.iloc[0].run_id} has no tag ctp.{name}: `python -m ctp.track sync {grid}` writes it"
            )
    return rows


def timings(rows: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Milliseconds by k: the mean of a latency, and of the distance between its quartiles (0 for one round alone)."""
    found = rows.reindex(columns=["k", metric, f"{metric}_iqr"]).groupby("k").mean() * 1000
    return found.set_axis(["mean", "spread"], axis=1).fillna({"spread": 0})


def check_alike(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows, which are to stand in one table.

    Raises AnalysisError where two of a model have different tokenizers, or two of a text, task or other measure
    different data or another protocol; latencies must come from one kind of machine.
    """
    rows = rows.reset_index(drop=True)
    subject = rows.measure + " " + rows.dataset.where(rows.dataset != "", rows.task)
    tokenized, timed = rows.tokenizer != "", rows.measure == "latency"
    _same(rows[tokenized], "tokenizer", rows.model[tokenized])
    _same(rows, "data", subject)
    _same(rows, "protocol", subject)
    _same(rows[timed], "device", subject[timed])
    _same(rows[timed], "machine", subject[timed])
    return rows


def _same(rows: pd.DataFrame, what: str, by: pd.Series) -> None:
    for name, group in rows.groupby(by):
        if group[what].nunique() > 1:
            one = group.iloc[0]
            other = group[group[what] != one[what]].iloc[0]
            raise AnalysisError(
                f"{str(name).strip()}: runs with different {what} do not belong in one table: {one.run_id} has "
                f"{one[what]}, {other.run_id} has {other[what]}; they differ in "
                f"{in_words(varied(group.loc[[one.name, other.name]]))}"
            )


def varied(rows: pd.DataFrame) -> dict[str, list[str]]:
    """The settings (`spec.…` params) in which rows differ, with their values; seeds are left out."""
    names = [c for c in rows.columns if c.startswith("spec.") and not c.endswith(".seed")]
    return {c: sorted(rows[c].fillna("-").unique()) for c in names if rows[c].nunique(dropna=False) > 1}


def in_words(differences: dict[str, list[str]]) -> str:
    """`varied` as text."""
    return ", ".join(f"{c} ({' | '.join(v[:3])})" for c, v in differences.items()) or "nothing that is a param"


def json_artifact(run_id: str, name: str) -> Any:
    """The content of a run's JSON file. Raises AnalysisError where the run has none of that name."""
    try:
        return json.loads(artifact(run_id, name))
    except ValueError as e:
        raise AnalysisError(f"run {run_id}: {name} is not JSON: {e}") from e


def artifact(run_id: str, name: str) -> str:
    """The text of a run's artifact. Raises AnalysisError where the run has none of that name."""
    try:
        return str(mlflow.artifacts.load_text(f"runs:/{run_id}/{name}"))
    except Exception as e:  # each artifact store raises its own
        raise AnalysisError(f"run {run_id} has no readable artifact {name}: {type(e).__name__}: {e}") from e
