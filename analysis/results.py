"""From an entry of the paper to the runs that answer it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from . import paper, roles
from .paper import PaperNumber
from .roles import Roles
from .runs import REQUIRED, AnalysisError, artifact, check_alike, finished, in_words, invocations, of_measure, varied

COLUMN = {"target": "target_level", "source": "source_level"}  # axis of an entry -> column, where they differ
IN_ROLES = ("model", "dataset", "task", "learned_on")
SIZES = ("k", "rank")  # a small grid may have other sizes than the paper in the same places


@dataclass(frozen=True)
class Measured:
    """What was measured for one entry. rows: its runs, which differ in seeds only; one number each."""

    rows: pd.DataFrame

    @property
    def n(self) -> int:
        """How many runs: more than one where there are several seeds."""
        return len(self.rows)

    def mean(self, metric: str) -> float:
        """Mean over the runs. Raises AnalysisError where one lacks the number."""
        if metric not in self.rows or self.rows[metric].isna().any():
            raise AnalysisError(f"run {self.rows.iloc[0].run_id} lacks {metric}")
        return float(self.rows[metric].mean())

    def std(self, metric: str) -> float:
        """Standard deviation over the runs (n - 1), 0 for one."""
        return float(self.rows[metric].std(ddof=1)) if self.n > 1 else 0.0

    @property
    def first(self) -> Any:
        """One of the runs, for what they share."""
        return self.rows.iloc[0]


Found = Mapping[PaperNumber, Measured | None]


def stand_ins(found: Found) -> str:
    """One sentence where something else plays the part of the paper's model, text, task, k or rank; "" where not."""
    parts: dict[str, str] = {}
    for entry, measured in found.items():
        if measured is None:
            continue
        for axis, wanted in entry.where.items():
            if axis in IN_ROLES and measured.first[axis] != roles.own_name(wanted):
                parts[paper.title(wanted)] = str(measured.first[axis])
            elif axis in SIZES and measured.first[axis] != wanted:
                parts[f"{axis} = {wanted}"] = str(measured.first[axis])
    return f"Not the paper's: {', '.join(f'{v} for {n}' for n, v in parts.items())}." if parts else ""


class Results:
    """The finished cells of a grid, looked up by entries of the paper.

    rows: as `analysis.runs.finished` gives them. studies: names in the grid file; an entry of a table that has a study
    of its name is answered by cells of that study alone.
    """

    def __init__(self, rows: pd.DataFrame, names: Roles, studies: set[str]) -> None:
        self.roles, self.studies = names, studies
        self._frames = {measure: rows[rows.measure == measure] for measure in REQUIRED}
        self._of_study: dict[tuple[str, str], pd.DataFrame] = {}

    @classmethod
    def read(cls, grid: str) -> "Results":
        """From MLflow. Raises AnalysisError where it has no such grid, or a run without its numbers."""
        rows = finished(grid)
        for measure in REQUIRED:
            of_measure(rows, measure, grid)
        newest = invocations(grid)[0].info.run_id
        return cls(rows, *roles.of_grid(artifact(newest, "grid.yaml")))

    def of(self, entry: PaperNumber) -> Measured | None:
        """What was measured for an entry, None where it has not run.

        Raises AnalysisError where runs that differ in more than seeds claim it.
        """
        rows = self.rows(entry)
        if len(rows) < 2:
            return None if rows.empty else Measured(rows)
        seeds = [c for c in rows.columns if c.startswith("spec.") and c.endswith(".seed")]
        other = varied(rows)
        if other or not seeds or rows.duplicated(seeds).any():
            some = ", ".join(rows.run_id[:2])
            raise AnalysisError(
                f"{entry.name}: {len(rows)} runs claim it ({some}, …); they differ in {in_words(other)}"
            )
        return Measured(rows)

    def table(self, entries: Iterable[PaperNumber]) -> dict[PaperNumber, Measured | None]:
        """Every entry's measurement. Raises AnalysisError where their tokenizers, data or protocols do not agree."""
        found = {e: self.of(e) for e in entries}
        used = [m.rows for m in found.values() if m is not None]
        if used:
            check_alike(pd.concat(used).drop_duplicates("run_id").reset_index(drop=True))
        return found

    def rows(self, entry: PaperNumber) -> pd.DataFrame:
        """The runs of an entry."""
        rows = self.study(entry.table, entry.where["measure"])
        fits = pd.Series(True, index=rows.index)
        for axis, wanted in entry.where.items():
            if axis not in ("measure", *SIZES):
                names = self.roles.names(wanted) if axis in IN_ROLES else {wanted}
                fits &= rows[COLUMN.get(axis, axis)].isin(names)
        for axis in SIZES:
            if axis in entry.where:
                fits &= rows[axis] == self._size(entry, axis, rows.loc[fits, axis])
        return rows[fits]  # at once: it copies hundreds of columns

    def study(self, table: str, measure: str) -> pd.DataFrame:
        """The runs by one measure that a table may use."""
        rows = self._frames[measure]
        if table not in self.studies:
            return rows
        if (table, measure) not in self._of_study:
            mine = rows.studies.map(lambda names: table in names).astype(bool)  # of no rows, map makes no bools
            self._of_study[table, measure] = rows[mine]
        return self._of_study[table, measure]

    def _size(self, entry: PaperNumber, axis: str, sizes: pd.Series) -> int:
        """The grid's k or rank in the place of the paper's; -1 where none is."""
        wanted = entry.where[axis]
        if wanted == 0:
            return 0
        kin = {e.where.get(axis, 0) for e in paper.entries(entry.table)} - {0}
        found = roles.nearest(wanted, kin, set(sizes) - {0})
        return -1 if found is None else found
