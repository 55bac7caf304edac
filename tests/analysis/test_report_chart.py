"""Figures and tables of a report: axes, marks, digits, the order of compressions, colours that can be told apart."""

import math
import re
from pathlib import Path

import pandas as pd
import pytest

from analysis.render import Table
from analysis.report import page
from analysis.report.chart import Scale, levels
from analysis.report.figures import series_of, severity
from analysis.report.table import STEPS, change, heat, of_paper, percent, reach, steady, step


def contrast(one, other):
    """WCAG 2's contrast ratio of two colours #rrggbb, from 1 to 21."""
    dark, light = sorted(map(_luminance, (one, other)))
    return (light + 0.05) / (dark + 0.05)


def _luminance(colour):
    linear = [c / 255 / 12.92 if c / 255 <= 0.04045 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in _rgb(colour)]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def _rgb(colour):
    return [int(colour[i : i + 2], 16) for i in (1, 3, 5)]


def test_compressions_stand_by_kind_and_strength():
    def row(**settings):
        return {f"spec.target.compression.{n}": v for n, v in settings.items()}

    named = {"dense": {}, "p50": {"sparsity": "0.5"}, "p75": {"sparsity": "0.75"}, "q4": {"bits": "4"},
             "q2": {"bits": "2"}, "both": {"sparsity": "0.5", "bits": "4"}}  # fmt: skip
    assert sorted(sorted(named), key=lambda n: severity(n, row(**named[n]))) == list(named)


@pytest.mark.parametrize(
    ("low", "high", "log"), [(3.0, 4.0, False), (10.0, 1e8, True), (0.0, 5.0, False), (7, 7, False)]
)
def test_axes_have_round_ticks_inside(low, high, log):
    scale = Scale.over([low, high], 0, 100)
    ticks = scale.ticks()
    assert scale.log == log
    assert 2 <= len(ticks) <= 6
    places = [x for x, _ in ticks]
    assert places == sorted(places)
    assert 0 <= places[0] < places[-1] <= 100
    assert 0 < scale(low) <= scale(high) < 100


def test_a_chart_has_a_mark_for_each_number():
    chart = levels("t", "ppl", [("a", [10.0, None]), ("b", [100.0, 1000.0])], ["without", "with"], ("dense", 9.0))
    assert [(m.series, m.text) for m in chart.marks] == [
        (0, "a, without: 10"),
        (0, "b, without: 100"),
        (1, "b, with: 1k"),
    ]
    xs = [m.x for m in chart.marks]
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1], abs=0.2)  # a decade each, on a logarithmic axis
    assert chart.alt == "t: dense 9; a 10 without; b 100 without, 1k with."
    assert chart.rules[0][0] < xs[0]


def test_contrast_is_wcags():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.478, abs=0.001)  # W3C's own example of just too little


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_words_and_marks_stand_out(theme):
    """WCAG 2.2 AA: 4.5 for words, 3 for marks."""
    own = page.PALETTE[theme]
    for ground in (own["bg"], own["soft"]):
        for word in ("ink", "muted", "accent", "ok", "bad"):
            assert contrast(own[word], ground) >= 4.5, (word, ground)
    assert all(contrast(c, own["bg"]) >= 3 for c in (*page.SERIES[theme], own["rule"]))
    used = set(re.findall(r"var\(--([a-z0-9]+)\)", "".join(p.read_text() for p in templates())))
    assert used - {f"s{i}" for i in range(8)} <= own.keys()


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_numbers_stand_out_on_every_colour_of_a_heat_map(theme):
    assert len(STEPS[theme]) == 9
    colours = page._named(theme)
    assert all(contrast(c, colours[f"i{i}"]) >= 4.5 for i, c in enumerate(STEPS[theme]))
    ground = page.PALETTE[theme]["bg"]
    far = [contrast(c, ground) for c in STEPS[theme]]  # the further from no change, the further from the ground
    assert far[:5] == sorted(far[:5], reverse=True)
    assert far[4:] == sorted(far[4:])
    assert f"--h4:{STEPS[theme][4]};" in page.colours()


def test_a_heat_map_is_coloured_by_what_a_prompt_changes():
    values = pd.DataFrame([[10.0, 1000.0], [5.0, 1000.0], [12.0, math.nan]], ["no prompt", "p", "q"], ["a", "b"])
    shown = values.map(str)
    shown.at["q", "a"] = "12.0 ± 1.0 (3)"
    found = heat("t", "corner", values, shown, "no prompt", {("p", "a"), ("q", "b")}, reach([values], "no prompt"))
    rows = [[(v.text, v.tone, v.more) for v in row[1:]] for row in found.sheet.rows]
    assert rows == [
        [("10.0", "", ""), ("1,000", "", "")],
        [("5.00", "h0 own", "−50 %"), ("1,000", "h4", "+0 %")],
        [("12.0 ± 1.0 (3)", "h5", "+20 %"), ("-", "", "")],
    ]
    assert found.ends == ("2x lower", "as no prompt", "2x higher")
    assert reach([values, values * 0], "none there") == 1
    far = heat("t", "c", values, shown, "no prompt", set(), 50.0)
    assert far.ends == ("4x lower or more", "as no prompt", "4x higher or more")
    assert [v.tone for v in far.sheet.rows[1][1:]] == ["h2", "h4"]
    alone = heat("t", "c", values.drop("no prompt"), shown, "no prompt", set(), 1.0)
    assert {v.tone for row in alone.sheet.rows for v in row} == {""}


def test_steps_and_changes():
    assert [step(r, 4.0) for r in (0.01, 0.25, 0.5, 1.0, 1.1, 2.0, 4.0, 99.0)] == [0, 0, 2, 4, 4, 6, 8, 8]
    assert [change(r) for r in (0.6, 1.0, 2.52, 9.4, 12.2)] == ["−40 %", "+0 %", "+152 %", "+840 %", "12x"]


def test_numbers_of_a_column_have_the_same_digits():
    shown = {7.5: "7.50", 31: "31.0", 999.4: "999", 999.6: "1,000", 1573.1: "1,573", 9999.6: "10.0k", 13_000: "13.0k",
             2e6: "2.00M", 76e6: "76.0M", 3e12: "3e12", 0.0: "0.00"}  # fmt: skip
    assert {v: steady(v) for v in shown} == shown
    assert [percent(v).text for v in (1409.7, -0.4, -12.3)] == ["1,410 %", "0 %", "−12 %"]


def test_a_table_of_the_paper_is_grouped_and_says_first_what_stands_in():
    table = Table("table2", "T", ["", "C4 ppl", "C4 ppl_paper", "C4 paper", "PTB ours", "PTB paper"],
                  [["full", "1958.14", "7.6e+07", "15.74", "0.333 ± 0.211", "26 M"], ["", "-", "1.5", "NA", "1", "2"]],
                  lead="Not the paper's: a for b.", notes=["more"])  # fmt: skip
    sheet = of_paper(table)
    assert sheet.head == ["row", "ours, ppl", "ours, ppl_paper", "paper", "ours", "paper"]
    assert (sheet.groups, sheet.ungrouped) == ([("C4", 3), ("PTB", 2)], 1)
    assert (sheet.lead, sheet.notes) == ("Not the paper's: a for b.", ["more"])
    assert [v.text for v in sheet.rows[0]] == ["full", "1,958.14", "76.0M", "15.74", "0.333 ± 0.211", "26 M"]
    assert sheet.rows[1][0].text == "full"
    plain = of_paper(Table("figure5", "T", ["text", "", "sparsegpt 50", "dense"], [["x", "ppl", "1", "2"]], labels=2))
    assert (plain.groups, plain.head) == ([], ["text", "setting", "sparsegpt 50", "dense"])


def test_a_model_keeps_its_colour_from_panel_to_panel():
    assert series_of([0, 4, 5]) == [0, 4, 5]
    assert series_of([4, 4, 0, 4]) == [4, 1, 0, 2]  # the first keeps it, others take what is nobody's here


def test_marks_that_meet_are_both_seen():
    chart = levels("t", "ppl", [("a", [10.0, 10.0, 10.0])], ["x", "y", "z"])
    assert len({m.y for m in chart.marks}) == 3
    assert sum(m.y for m in chart.marks) / 3 == pytest.approx(chart.links[0][1])


def templates():
    return [p for p in (Path(page.__file__).parent / "templates").iterdir() if p.suffix in (".css", ".html")]
