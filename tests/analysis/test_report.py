"""A grid's report: one file that tells everything, asks nobody, and believes nothing that models or strangers write.

What a person sees is looked at in Chromium (Debian: `apt-get install chromium`) where there is one.
"""

import asyncio
import re
from collections import Counter

import mlflow
import pytest
from support import browser
from support.reportruns import Parsed, everything

from analysis import paper
from analysis.compare import compare
from analysis.report import facts, findings, read
from analysis.report import page as report_page
from analysis.results import Results
from analysis.runs import AnalysisError

NEEDS = pytest.mark.skipif(browser.PATH is None, reason="no chromium, chromium-browser or google-chrome on the PATH")


@pytest.fixture(scope="module")
def uri(tmp_path_factory, new_database):
    return everything(new_database(tmp_path_factory.mktemp("mlflow")))


@pytest.fixture(scope="module")
def record(uri):
    mlflow.set_tracking_uri(uri)
    return read.Record("g")


@pytest.fixture(scope="module")
def html(record):
    return report_page.render(record, [{"python": "3.11", "torch": "2.13.0"}])


@pytest.fixture(scope="module")
def parsed(html):
    return Parsed(html)


# ------------------------------------------------------------------------ what it says


def test_it_tells_what_ran_and_what_came_out(record, parsed):
    words = re.sub(r"\s+", " ", " ".join(parsed.words))
    assert f"{len(record.cells) - 1} of {len(record.cells)} cells finished" in words
    for said in ("Table 2. Perplexity of LLaMA-7B behind prompts", "294.16", "c0ffee", "Tulsa", "in Oklahoma", "2.13.0",
                 "failed cell", "1 h 00 min", "ppl_paper divides", "over all positions", "512,000",
                 "10.00 ± 1.41 (2)"):  # fmt: skip
        assert said in words, said
    three_bit = next(e for e in paper.entries("table2") if e.row == ("3-bit w/o prompt",) and e.column == "C4")
    assert f"{1.2 * three_bit.value:.2f}" in words  # ours, beside
    assert three_bit.printed in words


def test_both_denominators_are_explained_in_two_sentences():
    assert len(re.findall(r"\.(?: |$)", facts.DENOMINATORS)) == 2


def test_verdicts_are_those_of_compare(record):
    found = facts.against_paper(record)
    verdicts = {v: n for v, n, _ in found.verdicts}
    assert verdicts["worse"] >= 8  # a fifth above the paper's, of its own model and settings
    assert {v: n for v, n in verdicts.items() if n} == Counter(line.verdict for line in compare(record.results, 0.05))
    shown = {s.caption[:7] for s in found.sheets}
    assert "Table 2" in shown
    assert "Table 5" not in shown  # no task ran


def test_nothing_of_strangers_is_markup(html, parsed):
    assert "<script>document" not in html
    assert [t for t, _ in parsed.tags].count("script") == 1
    assert not [a for _, a in parsed.tags if any(n.startswith("on") for n in a)]
    assert "img" not in {t for t, _ in parsed.tags}
    assert (
        " ".join(parsed.words).count('document.title="owned"') >= 6
    )  # grid file, charts, answers, words, error, traceback
    assert not re.search("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff]", html)


def test_nobody_is_asked_for_anything(html, parsed):
    places = [a[n] for _, a in parsed.tags for n in ("src", "href", "action", "data", "poster", "srcset") if n in a]
    assert all(p.startswith(("#", "data:")) for p in places)
    [(_, policy)] = [t for t in parsed.tags if t[1].get("http-equiv") == "Content-Security-Policy"]
    assert policy["content"].startswith("default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-")
    assert "@import" not in html
    assert "url(" not in html
    assert len(html.encode()) < 300_000


def test_every_figure_says_in_words_what_it_shows(parsed):
    charts = [a for t, a in parsed.tags if t == "svg" and a.get("role") == "img"]
    assert len(charts) >= 5  # two texts, learning, prefill and decode, cosines
    assert all(len(a["aria-label"]) > 40 for a in charts)
    of_c4 = next(a["aria-label"] for a in charts if a["aria-label"].startswith("c4"))
    assert "dense, no prompt 9.11" in of_c4
    assert "gptq-3bit-plain 12.9 no prompt" in of_c4
    ids = [a["id"] for _, a in parsed.tags if "id" in a]
    assert {a["href"][1:] for t, a in parsed.tags if t == "a"} <= set(ids)
    assert len(ids) == len(set(ids))


def test_the_result_comes_first_and_its_words_are_explained(record, html, parsed):
    """Table 2: learned on C4, 10.74 becomes 7.48 on C4 and 15.74 becomes 10.81 on PTB; learned on WikiText-2, both
    become far more. What was put before a model whose own perplexity is not there is not counted."""
    assert findings.headline(findings.outcomes(record)) == [
        "huggyllama/llama-7b: on the text that it was learned on, what was learned lowers the perplexity of its own "
        "model in 1 of 1 evaluations; on other texts, that of its own model in 1 of 3 evaluations."
    ]
    order = [html.index(f'id="{i}"') for i in ("glance", "ran", "compression", "transfer", "paper", "failures", "cost")]
    assert order == sorted(order)
    sections = [f"#{a['id']}" for t, a in parsed.tags if t == "section"]
    contents = Parsed(html[html.index("<nav") : html.index("</nav>")]).tags
    assert [a["href"] for t, a in contents if t == "a"] == sections
    assert html.count('href="#failures"') == 3  # from the count, the contents and the warning
    words = " ".join(parsed.words)
    assert "1 cell failed, so everything that needs it is missing below" in words
    for word, meaning in findings.GLOSSARY:
        assert word in words
        assert meaning in words
    assert "More than 100 % happens" in words


def test_every_head_of_a_table_says_what_it_is_of(parsed):
    heads = [a for t, a in parsed.tags if t == "th"]
    assert {a.get("scope") for a in heads} == {"col", "row", "colgroup"}
    assert sum(int(a["colspan"]) for a in heads if a["scope"] == "colgroup") >= 6
    assert [t for t, _ in parsed.tags].count("caption") == [t for t, _ in parsed.tags].count("table")


def test_a_table_that_would_be_too_large_is_cut_and_says_so(record, monkeypatch):
    content = report_page._content(record, [])
    monkeypatch.setattr(report_page, "_content", lambda *_: content)
    monkeypatch.setattr(report_page, "ROWS", (5000, 3))
    whole = report_page.render(record)
    monkeypatch.setattr(report_page, "LARGEST", len(whole.encode()) - 1)
    short = report_page.render(record)
    assert "The first 3 of " in short
    assert "The first 3 of " not in whole
    monkeypatch.setattr(report_page, "LARGEST", 1000)
    with pytest.raises(AnalysisError, match="at most 1,000"):
        report_page.render(record)


def test_runs_that_do_not_belong_together_are_told_in_their_place(uri, record, monkeypatch):
    rows, results = record.rows.copy(), record.results
    one = rows[(rows.measure == "perplexity") & (rows.dataset == "c4")].index[0]
    rows.loc[one, "protocol"] = "another"
    monkeypatch.setattr(record, "rows", rows)
    monkeypatch.setitem(record.__dict__, "results", Results(rows, results.roles, results.studies))
    words = " ".join(Parsed(report_page.render(record)).words)
    assert "table2: perplexity c4: runs with different protocol do not belong in one table" in words
    assert "ptb (test" in words  # the rest is there


def test_a_run_without_its_number_leaves_its_measure_out(uri, record):
    client, run = record.client, record.measured("generation").iloc[0].run_id
    client.delete_tag(run, "ctp.protocol")
    try:
        found = read.Record("g")
    finally:
        client.set_tag(run, "ctp.protocol", "p")
    assert found.troubles == [f"generation is left out: run {run} has no tag ctp.protocol: `python -m ctp.track sync "
                              "g` writes it"]  # fmt: skip
    assert found.measured("generation").empty
    assert len(found.measured("perplexity")) == len(record.measured("perplexity"))


def test_the_command(uri, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    file = tmp_path / "new" / "report.html"
    assert report_page.main(["g", "--out", str(file), "--store", str(tmp_path / "none"), "--log"]) == 0
    said, attached = capsys.readouterr().out.splitlines()
    assert said == str(file)
    assert attached.startswith("Attached to the MLflow run")
    assert file.read_text(encoding="utf-8").startswith("<!doctype html>")
    [grid] = mlflow.search_runs(["1"], "tags.`ctp.kind` = 'grid'", output_format="list")
    kept = mlflow.artifacts.load_text(f"runs:/{grid.info.run_id}/report.html")
    assert kept == file.read_text(encoding="utf-8")
    assert report_page.main(["nothing", "--store", str(tmp_path / "none")]) == 1
    assert "no experiment 'nothing'" in capsys.readouterr().err


# ------------------------------------------------------------------------ as a person sees it


async def look(folder, file, look, **how):
    async with browser.page(folder) as page:
        await page.open(file, **how)
        found = await look(page)
        return found, page.errors, page.requests


@pytest.fixture(scope="module")
def file(html, tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(html, encoding="utf-8")
    return path


TOP = "getComputedStyle(document.body).backgroundColor"
WIDER = "document.documentElement.scrollWidth - innerWidth"
RIGHT = "c.getBoundingClientRect().right"
COLUMN = "[...document.querySelectorAll('.sortable')[1].tBodies[0].rows].map(r => Number(r.cells[2].dataset.sort))"


@NEEDS
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)], ids=["desktop", "phone, dark"])
def test_it_looks_right_and_asks_for_nothing(file, tmp_path, width, dark):
    async def visit(page):
        facts = [
            await page.run(e) for e in (TOP, WIDER, "document.title", "document.querySelectorAll('svg.chart').length")
        ]
        overlap = await page.run(f"[...document.querySelectorAll('.chart')].every(c => {RIGHT} <= innerWidth)")
        return facts, overlap, browser.colours(await page.screenshot())

    (facts, inside, (colours, size)), errors, requests = asyncio.run(
        look(tmp_path, file, visit, width=width, dark=dark)
    )
    ground = report_page.PALETTE["dark" if dark else "light"]["bg"]
    rgb = ", ".join(str(int(ground[i : i + 2], 16)) for i in (1, 3, 5))
    assert facts[:3] == [f"rgb({rgb})", 0, "g: report"]  # the theme, nothing to scroll sideways, no stranger's script
    assert facts[3] >= 5
    assert inside
    assert colours > 100  # antialiased words and colours: not an empty page
    assert size[0] == width
    assert errors == []
    assert {u.partition(":")[0] for u in requests} <= {"file", "data"}


@NEEDS
def test_tables_sort_and_the_theme_turns(file, tmp_path):
    async def visit(page):
        before = await page.run(COLUMN)
        head = "document.querySelectorAll('.sortable')[1].tHead.rows[0].cells[2]"
        await page.run(f"{head}.querySelector('button').click()")
        up = await page.run(COLUMN), await page.run(f"{head}.getAttribute('aria-sort')")
        await page.run(f"{head}.querySelector('button').click()")
        down = await page.run(COLUMN)
        await page.run("document.querySelector('.theme').click()")
        return before, up, down, await page.run(TOP)

    (before, (up, said), down, ground), errors, _ = asyncio.run(look(tmp_path, file, visit))
    assert len(set(before)) > 1
    assert up == sorted(before)
    assert said == "ascending"
    assert down == sorted(before, reverse=True)
    assert ground == "rgb(16, 21, 27)"
    assert errors == []


@NEEDS
def test_a_table_sorts_by_keyboard(file, tmp_path):
    async def visit(page):
        await page.run("document.querySelector('.sortable thead th:nth-child(3) button').focus()")
        for kind in ("keyDown", "keyUp"):
            await page.ask("Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", text="\r",
                           windowsVirtualKeyCode=13)  # fmt: skip
        return await page.run("document.activeElement.closest('th').getAttribute('aria-sort')")

    said, errors, _ = asyncio.run(look(tmp_path, file, visit))
    assert (said, errors) == ("ascending", [])


@NEEDS
@pytest.mark.parametrize("width", [1280, 390])
def test_no_label_lies_on_another_or_sticks_out(file, tmp_path, width):
    async def visit(page):
        await page.run("document.querySelectorAll('details').forEach(d => { d.open = true; })")
        return await page.run(browser.MEETING), await page.run(WIDER)

    found, errors, _ = asyncio.run(look(tmp_path, file, visit, width=width))
    assert (found, errors) == (([], 0), [])


@NEEDS
def test_paper_is_light_whatever_was_chosen(file, tmp_path):
    async def visit(page):
        await page.run("document.documentElement.dataset.theme = 'dark'")
        chosen = await page.run(TOP)
        await page.ask("Emulation.setEmulatedMedia", media="print")
        return chosen, await page.run(TOP), await page.run("getComputedStyle(document.querySelector('nav')).display")

    found, _, _ = asyncio.run(look(tmp_path, file, visit, dark=True))
    assert found == ("rgb(16, 21, 27)", "rgb(255, 255, 255)", "none")


@NEEDS
def test_without_scripts_everything_is_there(file, tmp_path):
    async def visit(page):
        return browser.colours(await page.screenshot())[0], await page.height()

    (colours, height), _, requests = asyncio.run(look(tmp_path, file, visit, scripts=False))
    assert colours > 100
    assert height > 2000
    assert len(requests) == 1
