"""Tables of a report: cells that know how they sort, and heat maps, coloured by how far a number is from a baseline."""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from ..render import Table, short

# From much lower than the baseline over as low to much higher: blue and orange, which colour-blind people tell apart.
STEPS = {
    "light": ["#1f5fa8", "#4f86c6", "#8fb5de", "#c4d9ee", "#f0f1f3", "#fbdcba", "#f2b680", "#dd8742", "#b35806"],
    "dark": ["#7bb8ff", "#4f90d6", "#366699", "#294664", "#222b35", "#533a26", "#845530", "#c07a3c", "#ffab61"],
}
WHITE = {"light": (0, 8), "dark": (2, 3, 4, 5, 6)}  # steps on which text is white, on others black
MIDDLE = len(STEPS["light"]) // 2
NARROWEST, WIDEST = 1.2, 4.0  # times the baseline, at the ends of a colour scale
LONG = 20  # rows; a longer table begins closed
MINUS = "\N{MINUS SIGN}"


@dataclass(frozen=True)
class Value:
    """A cell. sort: what it sorts by, where that is not its text. tone: ok, bad, a step of a heat map, or nothing.
    more: a second, smaller line."""

    text: str
    sort: float | None = None
    tone: str = ""
    more: str = ""


@dataclass
class Sheet:
    """A table of a report. long: it begins closed; without it, where it has more than LONG rows. lead: what has to be
    known before it is read. numeric: columns that are aligned to the right; without it, those of numbers alone. groups:
    (title, columns) over all columns after the first ones, which have none.
    """

    caption: str
    head: list[str]
    rows: list[list[Value]]
    notes: list[str] = field(default_factory=list)
    long: bool | None = None
    numeric: set[int] | None = None
    sortable: bool = True
    lead: str = ""
    groups: list[tuple[str, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.long is None:
            self.long = len(self.rows) > LONG
        if self.numeric is None:
            columns = enumerate(zip(*self.rows, strict=True))
            self.numeric = {i for i, column in columns if all(v.sort is not None for v in column)}

    @property
    def ungrouped(self) -> int:
        """Columns before the groups."""
        return len(self.head) - sum(n for _, n in self.groups)


Show = str | tuple[str, str] | Callable[[Any], Value]


def listing(caption: str, rows: pd.DataFrame, columns: Mapping[str, Show], notes: Sequence[str] = (),
            long: bool | None = None) -> Sheet:  # fmt: skip
    """A table of some rows. columns: by its head what each shows: a column of words, or of numbers with their format,
    or what is made of the whole row."""

    def cell(row: Any, show: Show) -> Value:
        if isinstance(show, str):
            return text(row[show] or "-")
        return number(row.get(show[0]), show[1]) if isinstance(show, tuple) else show(row)

    body = [[cell(row, show) for show in columns.values()] for _, row in rows.iterrows()]
    return Sheet(caption, list(columns), body, list(notes), long)


@dataclass(frozen=True)
class Heat:
    """A heat map. ends: what its colour scale says at its low, middle and high end."""

    sheet: Sheet
    ends: tuple[str, str, str]
    steps: range = range(len(STEPS["light"]))


def text(value: object) -> Value:
    """Words."""
    return Value(str(value))


def number(value: float | None, form: str = "") -> Value:
    """A number in a format of `str.format`, without it as `steady` shows it; a dash where there is none."""
    if value is None or not math.isfinite(value):
        return Value("-" if value is None or math.isnan(value) else "∞", math.inf)
    return Value(form.format(value) if form else steady(value), float(value))


def steady(value: float) -> str:
    """Three digits, zeros at the end too, as in a column of numbers: 7.50, 31.0, 1,250, 60.1k, 2.00M."""
    if 999.5 <= abs(value) < 9999.5:
        return f"{value:,.0f}"
    for unit, scale in (("", 1.0), ("k", 1e3), ("M", 1e6)):
        if abs(value) < 999.5 * scale:
            return f"{value / scale:#.3g}".rstrip(".") + unit
    return short(value)


def percent(value: float | None) -> Value:
    """A share of a hundred: 85 %, −12 %, 1,410 %."""
    if value is None or not math.isfinite(value):
        return number(value)
    return Value(f"{round(value):,} %".replace("-", MINUS), value)


KINDS = {"ppl": "ours, ppl", "ppl_paper": "ours, ppl_paper", "paper": "paper", "ours": "ours"}


def of_paper(table: Table) -> Sheet:
    """A table of `analysis.tables` in the paper's order; cells that it leaves empty under a label repeat the label."""
    rows: list[list[Value]] = []
    for row in table.body:
        above = [v.text for v in rows[-1]] if rows and not row[0] else row
        rows.append([Value(_legible(c) or (above[i] if i < table.labels else "")) for i, c in enumerate(row)])
    head = [h or ("row" if i == 0 else "setting") for i, h in enumerate(table.head)]
    caption = f"{_spoken(table.name)}. {table.title}"
    numeric = set() if table.wide else set(range(table.labels, len(table.head)))
    sheet = Sheet(caption, head, rows, list(table.notes), None, numeric, False, table.lead)
    return _grouped(sheet, table.labels)


def _grouped(sheet: Sheet, labels: int) -> Sheet:
    """Columns "C4 ppl", "C4 paper" become "ours, ppl" and "paper" under "C4"; others stay as they are."""
    parts = [h.rpartition(" ") for h in sheet.head[labels:]]
    if parts and all(title and kind in KINDS for title, _, kind in parts):
        sheet.head[labels:] = [KINDS[kind] for *_, kind in parts]
        sheet.groups = list(Counter(title for title, *_ in parts).items())
    return sheet


def _legible(cell: str) -> str:
    """Its large numbers as people write them: 1,958.14 and 76.0M."""
    cell = re.sub(r"\d(?:\.\d+)?e\+\d+", lambda m: steady(float(m[0])), cell)
    return re.sub(r"(?<![\d.,])\d{4,}(?=\.\d)", lambda m: f"{int(m[0]):,}", cell)


def _spoken(name: str) -> str:
    """table5 -> Table 5."""
    return f"{name.rstrip('0123456789').capitalize()} {name.lstrip('abcdefghijklmnopqrstuvwxyz')}"


def reach(matrices: Iterable[pd.DataFrame], base: str) -> float:
    """How many times their column's baseline the entries of some matrices come to, up or down, at most."""
    found = (r for m in matrices if base in m.index for r in (m / m.loc[base]).to_numpy().ravel())
    return math.exp(max((abs(math.log(r)) for r in found if math.isfinite(r) and r > 0), default=0.0))


def heat(caption: str, corner: str, values: pd.DataFrame, shown: pd.DataFrame, base: str, own: Set[tuple[str, str]],
         widest: float) -> Heat:  # fmt: skip
    """A matrix of positive numbers, coloured by their ratio to the row `base` of their column.

    shown: the same as text, which is used where it has a spread. own: (row, column) to be framed. widest: as `reach`
    has it; matrices that have it in common can be compared by their colours.
    """
    ratios = values / values.loc[base] if base in values.index else values * math.nan
    end = min(max(widest, NARROWEST), WIDEST)
    rows = []
    for (name, row), (_, against) in zip(values.iterrows(), ratios.iterrows(), strict=True):
        cells = [Value(str(name))]
        for (column, value), ratio in zip(row.items(), map(float, against), strict=True):
            label = str(shown.at[name, column])
            cell = number(value if value > 0 else None)
            cell = Value(label, cell.sort) if "±" in label else cell
            if name != base and cell.text != "-" and math.isfinite(ratio):
                tone = f"h{step(ratio, end)}" + (" own" if (name, column) in own else "")
                cell = Value(cell.text, cell.sort, tone, change(ratio))
            cells.append(cell)
        rows.append(cells)
    more = " or more" if widest > end else ""
    ends = (f"{end:.2g}x lower{more}", f"as {base}", f"{end:.2g}x higher{more}")
    return Heat(Sheet(caption, [corner, *map(str, values.columns)], rows, long=False), ends)


def step(ratio: float, end: float) -> int:
    """Which of STEPS a ratio has, where the scale goes from 1 / end to end."""
    return MIDDLE + round(MIDDLE * min(max(math.log(ratio) / math.log(end), -1.0), 1.0))


def change(ratio: float) -> str:
    """A ratio as a change: -40 %, +3 %, 12x."""
    return f"{ratio:.0f}x" if ratio >= 9.5 else f"{100 * (ratio - 1):+.0f} %".replace("-", MINUS)
