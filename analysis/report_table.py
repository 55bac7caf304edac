"""Tables of a report: cells that know how they sort, and heat maps, whose cells are coloured by their logarithm."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import pandas as pd

from analysis.render import Table, short

# Cividis from its bright end to its dark one: even steps of lightness, the same to colour-blind people.
RAMP = ("#fee838", "#e1cc55", "#c3b369", "#a59c74", "#8a8678", "#707173", "#575d6d", "#3b496c", "#123570", "#00224e")
LONG = 20  # rows; a longer table begins closed
INKS = ("#000000", "#ffffff")


@dataclass(frozen=True)
class Value:
    """A cell. sort: what it sorts by, where that is not its text. style: of heat maps. tone: ok, bad or nothing."""

    text: str
    sort: float | None = None
    style: str = ""
    tone: str = ""


@dataclass
class Sheet:
    """A table of a report. numeric: which columns end together. long: too long to be open from the start."""

    caption: str
    head: list[str]
    rows: list[list[Value]]
    numeric: set[int] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)
    long: bool = False
    sortable: bool = True


@dataclass(frozen=True)
class Heat:
    """A heat map. scale: (css gradient, labels from its bright end to its dark one)."""

    sheet: Sheet
    gradient: str
    labels: list[str]


def text(value: object) -> Value:
    """Words."""
    return Value(str(value))


def number(value: float | None, shown: str = "") -> Value:
    """A number as `short` shows it, or as given; a dash where there is none."""
    if value is None or not math.isfinite(value):
        return Value("-" if value is None or math.isnan(value) else "∞", math.inf)
    return Value(shown or (short(value) if abs(value) < 1e4 or value > 1e6 else f"{value:,.0f}"), float(value))


def of_paper(table: Table) -> Sheet:
    """A table of `analysis.tables` in the paper's order; cells that it leaves empty under a label repeat the label."""
    numeric = set() if table.wide else set(range(table.labels, len(table.head)))
    rows: list[list[Value]] = []
    for row in table.body:
        above = [v.text for v in rows[-1]] if rows and not row[0] else row
        rows.append([Value(c or (above[i] if i < table.labels else "")) for i, c in enumerate(row)])
    head = [h or ("row" if i == 0 else "setting") for i, h in enumerate(table.head)]
    caption = f"{_spoken(table.name)}. {table.title}"
    return Sheet(caption, head, rows, numeric, list(table.notes), len(rows) > LONG, sortable=False)


def _spoken(name: str) -> str:
    """table5 -> Table 5."""
    return f"{name.rstrip('0123456789').capitalize()} {name.lstrip('abcdefghijklmnopqrstuvwxyz')}"


def heat(caption: str, corner: str, values: pd.DataFrame, shown: pd.DataFrame) -> Heat:
    """A matrix of positive numbers, one colour scale over all of it. shown: the same as text."""
    finite = [float(v) for v in values.to_numpy().ravel() if math.isfinite(v) and v > 0]
    low, high = min(finite), max(finite)
    rows = []
    for name, row in values.iterrows():
        cells = [Value(str(name))]
        for column, value in row.items():
            there = math.isfinite(value) and value > 0
            style = _style(_share(float(value), low, high)) if there else ""
            said = str(shown.at[name, column]) if there else "-"
            cells.append(Value(said if "±" in said or not there else short(float(value)),
                               float(value) if there else math.inf, style))  # fmt: skip
        rows.append(cells)
    middle = [low * (high / low) ** (i / 4) for i in range(5)]
    columns = {*range(1, len(values.columns) + 1)}
    sheet = Sheet(caption, [corner, *map(str, values.columns)], rows, columns)
    return Heat(sheet, f"linear-gradient(to right, {', '.join(RAMP)})", [short(v) for v in middle])


def _share(value: float, low: float, high: float) -> float:
    return math.log(value / low) / math.log(high / low) if high > low else 0.0


def _style(share: float) -> str:
    colour = shade(share)
    ink = max(INKS, key=lambda i: contrast(i, colour))
    return f"background:{colour};color:{ink}"


def shade(share: float) -> str:
    """The colour of a share from 0 to 1 of the ramp, as #rrggbb."""
    place = min(max(share, 0.0), 1.0) * (len(RAMP) - 1)
    i = min(int(place), len(RAMP) - 2)
    mixed = [round(a + (b - a) * (place - i)) for a, b in zip(_rgb(RAMP[i]), _rgb(RAMP[i + 1]), strict=True)]
    return "#" + "".join(f"{c:02x}" for c in mixed)


def contrast(one: str, other: str) -> float:
    """WCAG 2's contrast ratio of two colours #rrggbb, from 1 to 21."""
    dark, light = sorted(map(_luminance, (one, other)))
    return (light + 0.05) / (dark + 0.05)


def _luminance(colour: str) -> float:
    linear = [c / 255 / 12.92 if c / 255 <= 0.04045 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in _rgb(colour)]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def _rgb(colour: str) -> Sequence[int]:
    return [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
