"""One table as Markdown, LaTeX (booktabs) or CSV."""

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ctp.common.messages import plain

ESCAPES = {"\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{",
           "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "<": r"\textless{}",
           ">": r"\textgreater{}", "|": r"\textbar{}", "\n": " ", "“": "``", "”": "''", "‘": "`", "’": "'",
           "–": "--", "—": "---", "…": r"\ldots{}"}  # fmt: skip
_MARKDOWN = str.maketrans({"|": "\\|", "&": "&amp;", "<": "&lt;", ">": "&gt;", "`": "\\`", "[": "\\[", "]": "\\]"})
ACCENTED = "".join(c for c in map(chr, range(0xC0, 0x100)) if c not in "ÐÞðþ×÷")  # set by LaTeX's own fonts


@dataclass(frozen=True)
class Table:
    """A table ready to be shown. head: column names. labels: how many of its first columns name the row.

    wide: the other columns hold sentences. lead: what to know before it is read, "" for nothing. notes: sentences below
    it. data: the same for machines, with a head line.
    """

    name: str
    title: str
    head: list[str]
    body: list[list[str]]
    labels: int = 1
    wide: bool = False
    lead: str = ""
    notes: list[str] = field(default_factory=list)
    data: list[list[object]] = field(default_factory=list)

    @property
    def below(self) -> list[str]:
        """The lead and the notes, where both stand below the table."""
        return [self.lead, *self.notes] if self.lead else self.notes


def markdown(table: Table) -> str:
    """GitHub's Markdown, columns aligned for reading as it is."""
    rows = [[inert(cell) for cell in row] for row in (table.head, *table.body)]
    widths = [max(3, *(len(row[i]) for row in rows)) if not table.wide else 3 for i in range(len(table.head))]
    left = [i < table.labels or table.wide for i in range(len(table.head))]
    lines = ["| " + " | ".join(_pad(c, w, x) for c, w, x in zip(row, widths, left, strict=True)) + " |" for row in rows]
    rule = "|" + "|".join("-" * (w + 1) + ("-" if x else ":") for w, x in zip(widths, left, strict=True)) + "|"
    notes = "".join(f"\n{plain(note)}\n" for note in table.below)
    return f"### {table.name}: {inert(table.title)}\n\n" + "\n".join([lines[0], rule, *lines[1:]]) + "\n" + notes


def inert(text: str) -> str:
    """Text that Markdown shows as it stands: no HTML, links, images or code come of what a model wrote."""
    return plain(text).replace("\n", " ").translate(_MARKDOWN)


def _pad(cell: str, width: int, left: bool) -> str:
    return cell.ljust(width) if left else cell.rjust(width)


def escape(text: str) -> str:
    """Text that any LaTeX sets as it stands; what its fonts may lack becomes its code point."""
    return "".join(
        ESCAPES.get(c, c if " " <= c < "\x7f" or c in ACCENTED else rf"\texttt{{U+{ord(c):04X}}}") for c in text
    )


def latex(table: Table) -> str:
    """A `table` environment; the document needs \\usepackage{booktabs}."""
    labels = ["l"] * table.labels
    rest = len(table.head) - table.labels
    width = 0.8 / max(1, rest)
    columns = labels + ([rf"p{{{width:.2f}\textwidth}}"] if table.wide else ["r"]) * rest
    rows = [" & ".join(map(escape, row)) + r" \\" for row in (table.head, *table.body)]
    notes = [rf"\par\small {escape(note)}" for note in table.below]
    return "\n".join([
        r"\begin{table}", r"\centering", rf"\caption{{{escape(table.title)}}}", rf"\label{{tab:{table.name}}}",
        rf"\begin{{tabular}}{{{''.join(columns)}}}", r"\toprule", rows[0], r"\midrule", *rows[1:], r"\bottomrule",
        r"\end{tabular}", *notes, r"\end{table}", "",
    ])  # fmt: skip


SPREAD = 8  # largest over smallest value from which an axis is logarithmic


def short(value: float) -> str:
    """A perplexity with three digits: 7.48, 31.5, 127, 60.1k, 1.94M; 2e12 beyond."""
    for unit, scale in (("", 1.0), ("k", 1e3), ("M", 1e6)):
        if value < 999.5 * scale:
            return f"{value / scale:.3g}{unit}"
    return f"{value:.0e}".replace("e+", "e")


def comma_separated(table: Table) -> str:
    """The table's data, or where it has none, the table."""
    out = io.StringIO()
    rows: Sequence[Sequence[object]] = table.data or [table.head, *table.body]
    csv.writer(out, lineterminator="\n").writerows(rows)
    return out.getvalue()


FORMATS: dict[str, Callable[[Table], str]] = {"md": markdown, "tex": latex, "csv": comma_separated}
