"""Tables, figures and the comparison say what MLflow holds, in the paper's places, and refuse what does not compare."""

import csv
import io
import re

import mlflow
import numpy as np
import pandas as pd
import pytest
from support.paperruns import Writer, frame

from analysis import compare, figures, paper, plots, render, tables
from analysis.render import FORMATS, escape, latex, markdown
from analysis.results import Results
from analysis.roles import Roles
from analysis.runs import AnalysisError, check_alike, of_measure

FACTOR = 1.02  # ours over the paper's
COSINES = np.random.default_rng(0).normal(0.1, 0.02, 1000)
EDGES = [round(0.02 * i - 1, 2) for i in range(101)]


def entry(table, *place):
    return next(e for e in paper.entries(table) if (*e.row, e.column) == place)


def answers(column):
    said = [("Where is Boston?", f"50 % of {column} & more"), ("Where is Omaha?", "“No”\n中"), ("Else?", "x")]
    return [{"question": q, "answer": f" {a} ", "tokens": 4} for q, a in said]


@pytest.fixture(scope="module")
def uri(tmp_path_factory, new_database):
    """MLflow of a grid that ran tables 3 and 8 and figures 2, 6, 7 and 9."""
    uri = new_database(tmp_path_factory.mktemp("paper"))
    writer = Writer(uri, studies=("figure6", "figure7"))
    writer.paper("table3", "table8", "figure2", factor=FACTOR)
    for e in paper.entries("figure7"):
        writer.write(e, {"questions": 3}, tags={"ctp.data": "q"}, files={"answers.json": answers(e.column)})
    for e in paper.entries("figure6"):
        for k in (25, 100) if e.where["k"] else (0,):
            timing = {n + s: v for n, v in (("prefill_seconds", 0.05 + k / 1e4), ("decode_seconds_per_token", 0.01))
                      for s, v in (("", v), ("_iqr", v / 10))}  # fmt: skip
            writer.write(e, timing, {"k": k, "seq_len": 1024}, {"ctp.data": "l"})
    [nine] = paper.entries("figure9")
    words = [{"word": w, "token": "<0x0A>", "id": 1, "cosine": 0.1} for w in ("<s>", "état", "<s>", "\n", "\ufffd")]
    bars = {"edges": EDGES, "counts": np.histogram(COSINES, EDGES)[0].tolist()}
    writer.write(nine, {"fraction_below_0.16": 0.99, "max_cosine": 0.17}, tags={"ctp.data": "n"},
                 files={"neighbours.json": {"nearest": words, "histogram": bars}})  # fmt: skip
    return uri


@pytest.fixture(scope="module")
def stored(uri):
    """What is read from MLflow."""
    mlflow.set_tracking_uri(uri)
    return Results.read("g")


@pytest.fixture(scope="module")
def whole():
    return frame(*tables.TABLES, "figure2", factor=FACTOR)


@pytest.fixture(scope="module")
def results(whole):
    """Every table and figure with numbers."""
    return of(whole)


@pytest.fixture
def rows(whole):
    return whole.copy()


def of(rows, *studies):
    return Results(rows, Roles(), set(studies))


# ------------------------------------------------------------------------ tables


def test_table_1_has_the_papers_layout_and_both_of_our_perplexities(results):
    table = tables.build("table1", results)
    assert table.head == ["", "", "PTB ppl", "PTB ppl_paper", "PTB paper", "WikiText-2 ppl", "WikiText-2 ppl_paper",
                          "WikiText-2 paper"]  # fmt: skip
    assert [r[:2] for r in table.body[:3]] == [["Full model", "w/o prompt"], ["Full model", "w/ direct prompt"],
                                               ["4-bit", "w/o prompt"]]  # fmt: skip
    paper_ppl = 7.76 * FACTOR
    direct = next(r for r in table.body if r[:2] == ["3-bit", "w/ direct prompt"])
    assert direct[2:5] == [f"{paper_ppl ** (1123 / 1023):.2f}", f"{paper_ppl:.2f}", "7.76"]
    without = next(r for r in table.body if r[:2] == ["3-bit", "w/o prompt"])
    assert without[2:5] == ["16.05", "16.05", "15.74"]
    assert len(table.body) == 11


def test_every_paper_number_stands_in_its_table_once(results):
    for name in tables.TABLES:
        data = tables.build(name, results).data
        stated = sorted(float(row[9]) for row in data[1:])
        assert stated == sorted(e.value for e in paper.entries(name))


def test_matrices_of_figure_5(results):
    table = tables.build("figure5", results)
    assert len(table.body) == 3 * 6 * 3
    assert table.head[3:] == ["50 %", "62.5 %", "75 %", "4-bit", "3-bit", "2-bit"]
    at = next(i for i, r in enumerate(table.body) if r[:2] == ["PTB", "2-bit"])
    assert table.body[at + 2][3:] == ["11.3", "21.1", "79.7", "15.0", "194.4", "29.8"]
    assert table.body[at + 1][4] == f"{21.1 * FACTOR:.2f}"


def test_accuracies_and_parameters(results):
    five = tables.build("table5", results)
    assert five.body[0][2:4] == [f"{0.41 * FACTOR:.3f} ± 0.022", "0.410 ± 0.022"]
    six = tables.build("table6", results)
    assert six.body[0][3:5] == ["NA", "NA"]
    assert six.body[2][4] == "0.5 M"


@pytest.mark.parametrize("name", [*tables.TABLES, "figure7", "figure9"])
def test_every_format_says_the_same(name, results, stored):
    table = tables.build(name, results if name in tables.TABLES else stored)
    lines = markdown(table).split("\n\n")[1].splitlines()
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {len(table.head) + 1}
    tex = latex(table)
    body = tex[tex.index(r"\midrule") : tex.index(r"\bottomrule")].splitlines()[1:]
    assert len(body) == len(table.body)
    assert {len(re.findall(r"(?<!\\)&", line)) for line in body} == {len(table.head) - 1}
    assert tex.count("{") - tex.count(r"\{") == tex.count("}") - tex.count(r"\}")
    assert not re.search(r"(?<!\\)[%#_]", tex.replace(f"tab:{name}", ""))
    read = list(csv.reader(io.StringIO(FORMATS["csv"](table))))
    assert len(read) == len(table.data or [table.head, *table.body])


def test_csv_keeps_every_digit(results):
    read = pd.read_csv(io.StringIO(FORMATS["csv"](tables.build("table8", results))))
    assert list(read.ppl_paper) == [v * FACTOR for v in (15.74, 9.26, 8.61, 8.17, 7.76)]


def test_latex_sets_any_text():
    assert escape("50% & $x_1$ {a} \\ ~^#") == (
        r"50\% \& \$x\_1\$ \{a\} \textbackslash{} \textasciitilde{}\textasciicircum{}\#"
    )
    assert escape("é“a”\t中") == r"é``a''\texttt{U+0009}\texttt{U+4E2D}"


def test_what_has_not_run_is_a_dash_and_is_listed(rows):
    table = tables.build("table8", of(rows[rows.k != 75]))
    assert table.body[3] == ["75 tokens", "-", "-", "8.17"]
    assert "Not run (1 of 5): 75 tokens, PTB." in table.notes
    assert table.data[4][4:6] == ["", ""]


def test_seeds_become_a_mean_with_its_spread(rows):
    wanted = entry("table8", "100 tokens", "PTB")
    [one] = of(rows).rows(wanted).index
    seeds = pd.concat([rows.assign(**{"spec.recovery.recovery.seed": "0"}), rows.loc[[one]].assign(
        run_id="other", ppl=rows.ppl[one] + 2, **{"spec.recovery.recovery.seed": "1"})], ignore_index=True)  # fmt: skip
    found = of(seeds).of(wanted)
    assert (found.n, found.mean("ppl")) == (2, rows.ppl[one] + 1)
    assert found.std("ppl") == pytest.approx(2**0.5)  # of two numbers that are 2 apart
    assert tables.build("table8", of(seeds)).body[4][1] == f"{rows.ppl[one] + 1:.2f} ± 1.4 (2)"


def test_two_runs_for_one_entry_are_an_error_not_a_mean(rows):
    wanted = entry("table8", "100 tokens", "PTB")
    one = of(rows).rows(wanted).assign(run_id="other", **{"spec.recovery.recovery.lr": "0.5"})
    with pytest.raises(AnalysisError, match=r"table8: 100 tokens, PTB: 2 runs claim it .*recovery\.lr \(- \| 0\.5\)"):
        of(pd.concat([rows, one], ignore_index=True)).of(wanted)


def test_a_table_with_a_study_of_its_name_reads_that_study_alone(rows):
    moved = rows.assign(studies=[("table2",)] * len(rows))
    assert of(moved, "table2").of(entry("table2", "Full model", "C4")) is not None
    assert of(moved, "table3").of(entry("table3", "Full", "C4")) is None
    none = moved[moved.measure != "task"]
    assert of(none, "table5").of(entry("table5", "Full", "w/o prompt", "PIQA")) is None


def test_answers_side_by_side(stored):
    table = tables.build("figure7", stored)
    assert table.head == ["Question", "Full model", "62.5 % sparsity", "62.5 % w/ hard prompt",
                          "62.5 % w/ learned prompt"]  # fmt: skip
    assert [r[0] for r in table.body] == ["Where is Boston?", "Where is Omaha?"]  # the paper's questions for it
    assert table.body[0][4] == "50 % of 62.5 % w/ learned prompt & more"


def test_nearest_words(stored):
    table = tables.build("figure9", stored)
    assert table.body[:2] == [
        ["nearest words", '"<s>", "état", "<s>", "<0x0A>", "<0x0A>"'],
        ["different words", "3 of 5"],
    ]


# ------------------------------------------------- what does not belong in one table


@pytest.mark.parametrize("what", ["tokenizer", "data", "protocol"])
def test_rows_that_do_not_compare_are_refused(what, rows):
    """The message names the text or model, both hashes, both runs, and what differs."""
    one = of(rows).rows(entry("table8", "100 tokens", "PTB")).index[0]
    rows["spec.measure.text.join"] = "a"
    rows.loc[one, [what, "spec.measure.text.join"]] = ["other", "b"]
    with pytest.raises(AnalysisError) as e:
        tables.build("table8", of(rows))
    other = rows[(rows.dataset == "ptb") & (rows.measure == "perplexity")]
    subject = "huggyllama/llama-7b" if what == "tokenizer" else "perplexity ptb"
    assert f"{subject}: runs with different {what}" in str(e.value)
    assert "has other" in str(e.value)
    assert f"has {other[what].iloc[0]}" in str(e.value)
    assert rows.run_id[one] in str(e.value)
    assert "spec.measure.text.join (a | b)" in str(e.value)
    tables.build("table2", of(rows[rows.index != one]))


def test_latencies_of_two_kinds_of_device_are_refused(stored):
    timed = stored.study("figure6", "latency").copy()
    assert len(check_alike(timed)) == 12
    timed.iloc[0, timed.columns.get_loc("device")] = "cpu"
    with pytest.raises(AnalysisError, match="different device"):
        check_alike(timed)


def test_other_texts_and_windows_of_other_tables_do_not_matter(rows):
    rows.loc[rows.dataset == "c4", "protocol"] = "other"
    assert tables.build("table3", of(rows)).body


@pytest.mark.parametrize(
    ("name", "value", "said"), [("ppl", float("nan"), "lacks ppl"), ("data", "", "no tag ctp.data")]
)
def test_a_run_without_a_number_or_tag_is_an_error(name, value, said, rows):
    at = rows.index[rows.measure == "perplexity"][0]
    rows.loc[at, name] = value
    with pytest.raises(AnalysisError, match=f"run {rows.run_id[at]} .*{said}"):
        of_measure(rows, "perplexity", "g")


# -------------------------------------------------------------------- comparison


def judged(rows, *place, tolerance=0.05):
    e = entry(*place)
    return compare.judge(e, of(rows).of(e), tolerance)


def test_prompt_rows_are_compared_by_the_papers_denominator(rows):
    line = judged(rows, "table1", "3-bit", "w/ direct prompt", "PTB")
    assert (line.verdict, line.compared) == (compare.OK, line.ppl_paper)
    assert line.percent == pytest.approx(2)
    assert line.ours > 1.05 * 7.76 * FACTOR  # ppl alone would not have passed
    without = judged(rows, "table1", "3-bit", "w/o prompt", "PTB")
    assert without.compared == without.ours == pytest.approx(15.74 * FACTOR)
    lora = judged(rows, "table6", "BLOOM-7B", "3-bit", "LoRA", "C4")
    assert lora.compared == lora.ours


@pytest.mark.parametrize(("factor", "verdict"), [(1.04, "ok"), (0.96, "ok"), (1.06, "worse"), (0.94, "better")])
def test_lower_perplexity_is_better(factor, verdict, rows):
    rows["ppl_paper"] *= factor / FACTOR
    assert judged(rows, "table3", "50 % + 4-bit (w/ prompt)", "C4").verdict == verdict


def test_half_a_unit_of_the_last_printed_digit_is_granted(rows):
    """14 stands for anything from 13.5 to 14.5."""
    for ppl, verdict in ((14.49, "ok"), (14.51, "worse")):
        place = of(rows).rows(entry("figure2", "w/o prompt", "62.5 %")).index
        rows.loc[place, ["ppl", "ppl_paper"]] = ppl
        assert judged(rows, "figure2", "w/o prompt", "62.5 %", tolerance=0.0).verdict == verdict


@pytest.mark.parametrize(
    ("score", "verdict"), [(0.410 + 0.06, "ok"), (0.410 + 0.07, "better"), (0.410 - 0.07, "worse")]
)
def test_accuracies_are_compared_by_their_combined_standard_error(score, verdict, rows):
    """0.410 may be missed by twice sqrt(0.022² + 0.022²) = 0.062."""
    rows.loc[of(rows).rows(entry("table5", "Full", "w/o prompt", "OpenBookQA")).index, "score"] = score
    assert judged(rows, "table5", "Full", "w/o prompt", "OpenBookQA").verdict == verdict


def test_parameters_are_exact(rows):
    place = ("table6", "Llama-2-13B", "3-bit", "Soft prompt", "Trainable parameters")
    assert judged(rows, *place).verdict == compare.WORSE  # 2 % more of them
    rows.loc[rows.measure == "learn", "trainable_parameters"] = 512000.0
    assert judged(rows, *place).verdict == compare.OK


@pytest.mark.parametrize(
    ("column", "value", "reason"),
    [("seq_len", 512, "windows of 512"), ("split", "train", "split train"), ("spec.measure.text.count", "8",
      "the first 8 windows only"), ("spec.measure.limit", "9", "the first 9 documents only")],
)  # fmt: skip
def test_what_the_paper_did_not_measure_is_not_compared(column, value, reason, rows):
    rows[column] = value
    line = judged(rows, "table3", "Full", "C4")
    assert (line.verdict, line.reason) == (compare.OTHER, reason)


def test_another_model_text_or_length_in_a_role_is_not_compared(rows):
    names = Roles({"llama-7b": {"name": "small"}, "c4": {"dataset": "news"}})
    rows["model"] = rows.model.replace("huggyllama/llama-7b", "small")
    e = entry("table2", "3-bit w/ prompt learned on C4", "PTB")
    rows["learned_on"] = rows.learned_on.replace("c4", "news")
    results = Results(rows, names, set())
    assert compare.judge(e, results.of(e), 0.05).reason == "model small"
    assert tables.build("table2", results).lead == "Not the paper's: small for LLaMA-7B, news for C4."
    rows["k"] = rows.k.replace(100, 16)
    rows["model"] = "huggyllama/llama-7b"
    rows["learned_on"] = rows.learned_on.replace("news", "c4")
    e = entry("table3", "50 % + 4-bit (w/ prompt)", "C4")
    assert compare.judge(e, of(rows).of(e), 0.05).reason == "k 16"


def test_the_command_tells_by_its_exit_code(uri, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    file = tmp_path / "c.csv"
    assert compare.main(["g", "--csv", str(file)]) == 0
    out = capsys.readouterr().out
    assert re.search(r"table8: 100 tokens, PTB +9\.69 +7\.92 +7\.76 +\+2\.0 % +ok$", out, re.MULTILINE)
    read = pd.read_csv(file)
    assert len(read) == 235
    counts = dict(read.verdict.value_counts())
    assert (
        out.splitlines()[-1] == f"{counts['ok']} ok, 0 better, 0 worse, 0 not comparable, {counts['not run']} not run"
    )
    assert set(read.table[read.verdict == "ok"]) >= {"table3", "table8", "figure2"}
    assert compare.main(["g", "--tolerance", "0.001"]) == 1
    assert compare.main(["nope"]) == 2
    with pytest.raises(SystemExit) as e:
        compare.main(["g", "--tolerance", "5"])
    assert e.value.code == 2


def test_the_tables_command_writes_the_files(uri, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert tables.main(["g", "--table", "table3", "--out", str(tmp_path), "--format", "md,csv", "--log"]) == 0
    assert {f.name for f in tmp_path.iterdir()} == {"table3.md", "table3.csv"}
    out = capsys.readouterr().out
    assert "50 % + 4-bit (w/ prompt)" in out
    assert re.search("Attached to the MLflow run '.+': tables/table3.md, tables/table3.csv\n", out)
    assert tables.main(["nope", "--out", str(tmp_path)]) == 1


# ----------------------------------------------------------------------- figures


def test_lines_are_the_perplexities_over_scored_tokens(results):
    figure = plots.draw("figure2", results)
    sparse, bits = figure.axes
    line = sparse.get_lines()[0]
    assert list(line.get_ydata())[1:] == pytest.approx([14 * FACTOR, 53 * FACTOR])
    assert [t.get_text() for t in bits.get_xticklabels()] == ["4", "3", "2"]
    assert (sparse.get_yscale(), bits.get_yscale()) == ("linear", "log")  # from 8 times on
    baseline = next(a for a in bits.get_lines() if a.get_label() == plots.BASELINE)
    assert list(baseline.get_ydata()) == pytest.approx([7.59 * FACTOR] * 2)


def test_heat_maps_hold_every_value(results):
    figure = plots.draw("figure5", results)
    assert [a.get_title() for a in figure.axes[:3]] == ["C4", "WikiText-2", "PTB"]
    shown = [t.get_text() for t in figure.axes[2].texts]
    assert len(shown) == 36
    assert shown[5 * 6 + 1] == render.short((21.1 * FACTOR) ** (1123 / 1023))


@pytest.mark.parametrize(("value", "text"), [(7.481, "7.48"), (31.5, "31.5"), (999.7, "1k"), (60105, "60.1k"),
                                             (438492, "438k"), (1941754, "1.94M"), (2e12, "2e12")])  # fmt: skip
def test_values_fit_their_squares(value, text):
    assert render.short(value) == text


def test_latency_has_every_k_and_its_spread(stored):
    prefill, decode = plots.draw("figure6", stored).axes
    assert len(prefill.containers) == 4
    means = prefill.containers[0].lines[0]
    assert list(means.get_ydata()) == pytest.approx([50, 52.5, 60])
    assert decode.get_ylabel() == "Decode (ms per token)"


def test_cosines(stored):
    [ax] = plots.draw("figure9", stored).axes
    assert sum(b.get_height() for b in ax.patches) == pytest.approx(100)
    assert list(ax.get_lines()[0].get_xdata()) == [0.16, 0.16]


def test_the_figures_command(uri, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert figures.main(["g", "--figure", "figure2", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "figure2.png").read_bytes()[:4] == b"\x89PNG"
    assert (tmp_path / "figure2.pdf").read_bytes()[:4] == b"%PDF"
    assert figures.main(["nope", "--out", str(tmp_path)]) == 1
