"""What the commands of this package share: which grid, whose MLflow."""

import argparse
from typing import Any

import mlflow

from ctp.common.terminal import program
from ctp.storage.store import Store, default_store
from ctp.tracking.entries import tracking_uri

from .results import Results
from .runs import existing


def parser(module: str, doc: str | None, default: str | None = None) -> argparse.ArgumentParser:
    """The parser of `python -m analysis.MODULE`, with GRID (default: what it is where it is left out) and --store."""
    p = argparse.ArgumentParser(
        prog=program(f"{__package__}.{module}"), description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    optional: dict[str, Any] = {"nargs": "?", "default": default} if default else {}
    p.add_argument("grid", metavar="GRID", help="name of the grid, which is its MLflow experiment", **optional)
    p.add_argument("--store", default=default_store(), metavar="URI", help="whose neighbour mlflow.db is read, without "
                   "MLFLOW_TRACKING_URI (default %(default)s)")  # fmt: skip
    return p


def results(args: argparse.Namespace) -> Results:
    """The finished cells of `args.grid`. Raises AnalysisError or StoreError."""
    mlflow.set_tracking_uri(existing(tracking_uri(Store(args.store).uri)))
    return Results.read(args.grid)
