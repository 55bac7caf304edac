"""`--log` of report, figures and tables: what they wrote is attached to the run of the grid's newest invocation."""

import argparse
import shutil
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import mlflow

from ctp.tracking.entries import KIND

from .runs import AnalysisError


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
    client = mlflow.MlflowClient()
    at = f"MLflow at {mlflow.get_tracking_uri()}"
    try:
        experiment = client.get_experiment_by_name(grid)
        ids = [experiment.experiment_id] if experiment else []
        newest = ["attributes.start_time DESC"]
        found = ids and client.search_runs(ids, f"tags.`{KIND}` = 'grid'", max_results=1, order_by=newest)
        if not found:
            raise AnalysisError(
                f"{at} has no run of an invocation of {grid!r} to attach to: `ctp track sync {grid}` makes one"
            )
        with TemporaryDirectory() as folder:
            for path, file in files.items():
                to = Path(folder, path)
                to.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, to)
            client.log_artifacts(found[0].info.run_id, folder)
    except AnalysisError:
        raise
    except Exception as e:  # each artifact store raises its own
        raise AnalysisError(f"{at} does not take {', '.join(files)}: {type(e).__name__}: {e}") from e
    return str(found[0].info.run_name)


def told(grid: str, files: Mapping[str, Path]) -> None:
    """Attach them, and say so in a line. Raises AnalysisError."""
    print(f"Attached to the MLflow run {attach(grid, files)!r}: {', '.join(files)}")
