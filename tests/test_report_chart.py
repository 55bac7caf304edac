"""Figures of a report: axes, marks, the order of compressions, and colours that people can tell from the ground."""

import re
from pathlib import Path

import pytest

from analysis import report
from analysis.report_chart import Scale, levels
from analysis.report_figures import severity, won_back
from analysis.report_table import contrast, shade


def test_shares_of_the_loss():
    assert won_back(10.0, 20.0, 10.0) == pytest.approx(100)
    assert won_back(10.0, 20.0, 20.0) == 0
    assert won_back(10.0, 20.0, 40.0) == pytest.approx(-100)
    assert won_back(10.0, 40.0, 20.0) == pytest.approx(50)  # half of the log-perplexity that was lost
    assert won_back(10.0, 10.2, 9.0) is None  # nothing was lost
    assert won_back(None, 20.0, 9.0) is None


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
    own = report.PALETTE[theme]
    for ground in (own["bg"], own["soft"]):
        for ink in ("ink", "muted", "accent", "ok", "bad"):
            assert contrast(own[ink], ground) >= 4.5, (ink, ground)
    assert all(contrast(c, own["bg"]) >= 3 for c in (*report.SERIES[theme], own["rule"]))
    used = set(re.findall(r"var\(--([a-z0-9]+)\)", "".join(p.read_text() for p in templates())))
    assert used - {f"s{i}" for i in range(8)} <= own.keys()


def test_numbers_stand_out_on_every_colour_of_a_heat_map():
    for share in (i / 200 for i in range(201)):
        assert max(contrast(shade(share), ink) for ink in ("#000000", "#ffffff")) >= 4.5
    assert (shade(0), shade(1), shade(-3)) == ("#fee838", "#00224e", "#fee838")


def templates():
    return [p for p in (Path(report.__file__).parent / "templates").iterdir() if p.suffix in (".css", ".html")]
