"""`--log` of report, figures and tables: what they wrote is attached to the run of the grid's newest invocation."""

import argparse
import shutil
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import mlflow

from .runs import AnalysisError, invocations


def add_option(p: argparse.ArgumentParser) -> None:
    """`--log`."""
    p.add_argument(
        "--log", action="store_true", help="also attach what was written to the MLflow run of the newest invocation"
    )


def attach(grid: str, files: Mapping[str, Path]) -> str:
    """Attach files to the parent run of the grid's newest invocation, under these paths; returns the run's name. What
    was attached there before under the same path is replaced.

    Raises AnalysisError where MLflow has no such run, or does not take them.
    """
    newest = invocations(grid)[0].info
    with TemporaryDirectory() as folder:
        for path, file in files.items():
            to = Path(folder, path)
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, to)
        try:
            mlflow.MlflowClient().log_artifacts(newest.run_id, folder)
        except Exception as e:  # each artifact store raises its own
            at = f"MLflow at {mlflow.get_tracking_uri()}"
            raise AnalysisError(f"{at} does not take {', '.join(files)}: {type(e).__name__}: {e}") from e
    return str(newest.run_name)


def log(grid: str, files: Mapping[str, Path]) -> None:
    """Attach them, and print that. Raises AnalysisError."""
    print(f"Attached to the MLflow run {attach(grid, files)!r}: {', '.join(files)}")
