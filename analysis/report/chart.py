"""Small charts for one column of a page, as geometry: `templates/parts.html` writes them as SVG.

They follow the page's light and dark colours, say in words what they show, and need no matplotlib; `analysis.plots`
draws PNG and PDF for papers, which these cannot be. Lengths are in units of an SVG that is WIDTH wide.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..render import SPREAD, short

WIDTH, LETTER, LINE = 360, 6.1, 24  # LETTER: of a label, for each character
BOTTOM = 178.0  # of a plot with a vertical axis
SIDE = 4.5  # between the marks of two series on one line
POINTS = 200  # of a line at most


@dataclass(frozen=True)
class Mark:
    """A point. series: which colour and shape. text: what it says when pointed at. bar: ends of its spread, on y."""

    x: float
    y: float
    series: int
    text: str = ""
    bar: tuple[float, float] | None = None


@dataclass(frozen=True)
class Box:
    """A bar of a histogram."""

    x: float
    y: float
    width: float
    height: float
    text: str


@dataclass
class Chart:
    """One panel. alt: all that it shows, in words. left, right, top, bottom: edges of the plot.

    ticks: (place, label). lines: (series, "x,y x,y"). links: (x, y, x) of level lines. rules: (x, y, x, y) of reference
    lines. legend: (series, label), where series -1 is the rule.
    """

    caption: str
    alt: str
    height: float
    left: float
    top: float
    right: float
    bottom: float
    xticks: list[tuple[float, str]] = field(default_factory=list)
    yticks: list[tuple[float, str]] = field(default_factory=list)
    xlabel: str = ""
    ylabel: str = ""
    lines: list[tuple[int, str]] = field(default_factory=list)
    links: list[tuple[float, float, float]] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)
    boxes: list[Box] = field(default_factory=list)
    rules: list[tuple[float, float, float, float]] = field(default_factory=list)
    legend: list[tuple[int, str]] = field(default_factory=list)
    width: float = WIDTH


@dataclass(frozen=True)
class Scale:
    """Values of an axis -> places on it; logarithmic where they spread. Values must be finite."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    @classmethod
    def over(cls, values: Sequence[float], start: float, end: float, zero: bool = False) -> "Scale":
        """From `start` to `end`, with some air around the values; down to 0 where asked for and not logarithmic."""
        low, high = min(values), max(values)
        if low > 0 and high > SPREAD * low:
            return cls(low * (low / high) ** 0.05, high * (high / low) ** 0.05, start, end, True)
        air = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
        return cls(0.0 if zero and low >= 0 else low - air, high + air, start, end)

    def __call__(self, value: float) -> float:
        if self.log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 1)

    def ticks(self, most: int = 5) -> list[tuple[float, str]]:
        """At most so many round numbers, with their labels."""
        return [(self(v), short(v) if v else "0") for v in self._round(most)]

    def _round(self, most: int) -> list[float]:
        if self.log:
            first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            for steps in ((1, 2, 5), (1, 3), (1,)):
                found = [m * 10.0**e for e in range(first, last + 1) for m in steps]
                inside = [v for v in found if self.low <= v <= self.high]
                if len(inside) <= most:
                    return inside
            return inside[:: math.ceil(len(inside) / most)]
        rough = (self.high - self.low) / most
        unit = 10.0 ** math.floor(math.log10(rough))
        step = next(m * unit for m in (1, 2, 2.5, 5, 10) if m * unit >= rough)
        first = math.ceil(self.low / step)
        return [round(i * step, 12) for i in range(first, math.floor(self.high / step) + 1)]


def cut(text: str, most: int = 24) -> str:
    """A label that fits."""
    return text if len(text) <= most else text[: most - 1] + "…"


def _chart(caption: str, alt: str, left: float, bottom: float) -> Chart:
    return Chart(caption, alt, bottom + 36, left, 4, WIDTH - 14, bottom)


Row = tuple[str, Sequence[float | None]]  # name, a value for each series


def levels(caption: str, unit: str, rows: Sequence[Row], series: Sequence[str],
           reference: tuple[str, float] | None = None) -> Chart:  # fmt: skip
    """A line for each name, on it a mark for each series that has a value; a rule at the reference. Smaller is left."""
    there = [(name, {s: v for s, v in enumerate(own) if v is not None}) for name, own in rows]
    alt = [f"{reference[0]} {short(reference[1])}"] if reference else []
    alt += [f"{name} {', '.join(f'{short(v)} {series[s]}' for s, v in own.items())}" for name, own in there]
    left = 10 + LETTER * max(len(cut(name)) for name, _ in rows)
    chart = _chart(caption, f"{caption}: {'; '.join(alt)}.", left, 8 + LINE * len(rows))
    values = [v for _, own in there for v in own.values()] + ([reference[1]] if reference else [])
    scale = Scale.over(values, left + 6, WIDTH - 20)
    chart.xticks, chart.xlabel = scale.ticks(), unit + (", log scale" if scale.log else "")
    for i, (name, own) in enumerate(there):
        y = 8 + LINE * (i + 0.5)
        chart.yticks.append((y, cut(name)))
        chart.links.append((scale(min(own.values())), y, scale(max(own.values()))))
        apart = [SIDE * (s - (len(series) - 1) / 2) for s in range(len(series))]  # marks that meet are both seen
        chart.marks += [Mark(scale(v), y + apart[s], s, f"{name}, {series[s]}: {short(v)}") for s, v in own.items()]
    chart.legend = [(s, label) for s, label in enumerate(series) if any(s in own for _, own in there)]
    if reference:
        place = scale(reference[1])
        chart.rules.append((place, chart.top, place, chart.bottom))
        chart.legend.append((-1, f"{reference[0]}: {short(reference[1])}"))
    return chart


Line = tuple[str, Sequence[tuple[float, float]]]  # label, (x, y) by x


def curves(caption: str, xlabel: str, ylabel: str, lines: Sequence[Line], zero: bool = False,
           spread: Sequence[Sequence[float]] = (), series: Sequence[int] = ()) -> Chart:  # fmt: skip
    """Lines over a common axis; where there is a spread, it is drawn around each point (whole height, in y's unit).
    series: which colour and shape each line has, where that is not its place."""
    thin = [(label, points[:: math.ceil(len(points) / POINTS)]) for label, points in lines]
    xs, ys = [x for _, p in thin for x, _ in p], [y for _, p in thin for _, y in p]
    y = Scale.over(ys, BOTTOM, 8, zero)
    left = 26 + LETTER * max(len(label) for _, label in y.ticks())
    x = Scale(min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1, left + 8, WIDTH - 16)
    ends = [f"{label} {short(p[0][1])} at {p[0][0]:g} to {short(p[-1][1])} at {p[-1][0]:g}" for label, p in thin]
    chart = _chart(caption, f"{caption}, {ylabel} over {xlabel}: {'; '.join(ends)}.", left, BOTTOM)
    chart.xticks, chart.yticks = x.ticks(6), y.ticks(5)
    chart.xlabel, chart.ylabel = xlabel, ylabel + (" (log)" if y.log else "")
    for i, (label, points) in enumerate(thin):
        s = series[i] if series else i
        chart.lines.append((s, " ".join(f"{x(a)},{y(b)}" for a, b in points)))
        chart.legend.append((s, label))
        for n, (a, b) in enumerate(points if len(points) <= 12 else ()):
            half = spread[i][n] / 2 if spread else 0.0
            bar = (y(max(b - half, y.low)), y(min(b + half, y.high))) if half else None
            chart.marks.append(Mark(x(a), y(b), s, f"{label}: {short(b)} at {a:g}", bar))
    return chart


def histogram(caption: str, xlabel: str, ylabel: str, edges: Sequence[float], shares: Sequence[float],
              rule: tuple[str, float]) -> Chart:  # fmt: skip
    """Bars between edges (one more than shares, in percent), cut to where they are; a rule at a value."""
    bars = [(low, high, v) for low, high, v in zip(edges, edges[1:], shares, strict=False) if v > 0]
    first, last, left = bars[0][0], bars[-1][1], 26 + LETTER * 4
    x = Scale(min(first, rule[1]) - 0.02, max(last, rule[1]) + 0.02, left, WIDTH - 14)
    y = Scale(0, 1.08 * max(shares), BOTTOM, 8)
    low, high, _ = max(bars, key=lambda bar: bar[2])
    alt = (f"{caption}: values from {first:.2f} to {last:.2f}, most of them near {(low + high) / 2:.2f}; line at "
           f"{rule[1]:g}, {rule[0]}.")  # fmt: skip
    chart = _chart(caption, alt, left, BOTTOM)
    chart.xticks, chart.yticks, chart.xlabel, chart.ylabel = x.ticks(6), y.ticks(5), xlabel, ylabel
    for low, high, share in bars:
        width, height, text = x(high) - x(low) - 0.8, BOTTOM - y(share), f"{low:.2f} to {high:.2f}: {share:.2g} %"
        chart.boxes.append(Box(x(low) + 0.4, y(share), round(width, 1), round(height, 1), text))
    chart.rules.append((x(rule[1]), chart.top, x(rule[1]), BOTTOM))
    chart.legend = [(-1, f"{rule[1]:g}: {rule[0]}")]
    return chart
