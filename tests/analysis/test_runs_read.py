"""From a real grid through the tracker into a table, and from a grid file to what it covers."""

import json

import mlflow
import pandas as pd
import pytest
from mlflow.tracking import MlflowClient
from support.bench import Bench
from support.tinygrid import model_folder

from analysis import compare, coverage, paper, tables
from analysis.results import Results
from analysis.runs import AnalysisError, artifact, evaluations, of_measure, typed
from ctp.cells.cell import Evaluate, Learn
from ctp.planning import gridfile
from ctp.planning.plan import make
from ctp.storage.ref import ref
from ctp.tracking.tracker import Tracker

TEXTS = {"c4": ("train", "validation"), "ptb": ("train", "validation", "test")}


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A folder with texts by the paper's names."""
    folder = tmp_path_factory.mktemp("texts")
    for name, splits in TEXTS.items():
        (folder / name).mkdir()
        for split in splits:
            lines = [json.dumps({"text": f"{name} {split} {i}: " + "some words " * 20}) for i in range(30)]
            (folder / name / f"{split}.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def bench(tmp_path_factory, texts, new_database):
    """A part of table 2, done for real: one prompt through a 3-bit model, on C4 and PTB."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CTP_DATA_DIR", str(texts))
        text = {"dataset": "c4", "split": "train", "seq_len": 24}
        prompt = {"method": "soft_prompt", "k": 4, "text": {**text, "count": 8}, "steps": 2, "validate_every": 1,
                  "validation": {"count": 2}, "on_reported": True, "seed": [0, 1]}  # fmt: skip
        reported = [{"dataset": "c4", "split": "validation", "seq_len": 24, "count": 4},
                    {"dataset": "ptb", "split": "test", "seq_len": 24, "count": 4}]  # fmt: skip
        folder = tmp_path_factory.mktemp("bench")
        bench = Bench(
            folder, model_folder(folder / "llama-7b"), compression=["dense", {"method": "gptq", "bits": 3}],
            calibration={**text, "count": 4}, recovery=prompt, measures={"method": "perplexity", "text": reported},
        )  # fmt: skip
        for cell in bench.cells:
            bench.execute(cell)
        uri = new_database(folder)
        mlflow.set_tracking_uri(uri)
        tracker = Tracker(uri, bench.plan, bench.store)
        tracker.begin("test")
        tracker.close("FINISHED")
        bench.uri = uri
        return bench


@pytest.fixture
def results(bench):
    mlflow.set_tracking_uri(bench.uri)
    return Results.read("g")


def numbers(bench, target, dataset, seeds=()):
    """The manifests' perplexities."""
    return [
        bench.store.manifest(ref(c))["metrics"]
        for c in bench.all(Evaluate)
        if (c.target.compression.label, c.measure.text.dataset) == (target, dataset)
        and ((c.recovery is None and not seeds) or (c.recovery is not None and c.recovery.recovery.seed in seeds))
        and (c.recovery is None or c.recovery.source == c.target)
    ]


def test_table_2_holds_what_the_manifests_hold(bench, results):
    by_place = {(*e.row, e.column): m for e, m in results.table(paper.entries("table2")).items()}
    [dense] = numbers(bench, "dense", "ptb")
    assert by_place["Full model", "PTB"].mean("ppl") == dense["ppl"]
    seeds = numbers(bench, "gptq-3bit", "c4", (0, 1))
    ours = by_place["3-bit w/ prompt learned on C4", "C4"]
    assert (ours.n, ours.mean("ppl")) == (2, pytest.approx(sum(n["ppl"] for n in seeds) / 2))
    assert ours.mean("ppl_paper") < ours.mean("ppl")
    assert by_place["3-bit w/ prompt learned on WikiText-2", "C4"] is None
    table = tables.build("table2", results)
    assert table.lead == "Not the paper's: llama-7b for LLaMA-7B, 4 for k = 100."
    assert any(n.startswith("Not run (2 of 8)") for n in table.notes)


def test_nothing_of_another_model_is_compared(bench, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", bench.uri)
    assert compare.main(["g"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("0 ok, 0 better, 0 worse, ")


def test_learned_parameters_are_read_too(bench, results):
    rows = results.study("table6", "learn")
    assert set(rows.trainable_parameters) == {4 * 32}
    assert set(rows.source_level) == {"gptq-3bit"}
    assert len(rows) == len(bench.all(Learn))


def test_artifacts_are_read_from_mlflow(bench, results):
    row = evaluations("g").iloc[0]
    MlflowClient().log_text(row.run_id, '["Tulsa"]', "made/answers_too.json")
    assert json.loads(artifact(row.run_id, "made/answers_too.json")) == ["Tulsa"]
    with pytest.raises(AnalysisError, match=r"no readable artifact answers\.json"):
        artifact(row.run_id, "answers.json")


@pytest.mark.parametrize(
    ("tag", "what"), [("tokenizer_sha256", "tokenizer"), ("data", "data"), ("protocol", "protocol")]
)
def test_one_run_that_does_not_compare_spoils_its_table(bench, tag, what):
    mlflow.set_tracking_uri(bench.uri)
    client, row = MlflowClient(bench.uri), evaluations("g").iloc[0]
    before = client.get_run(row.run_id).data.tags[f"ctp.{tag}"]
    client.set_tag(row.run_id, f"ctp.{tag}", "0123456789ab")
    try:
        with pytest.raises(AnalysisError, match=f"different {what} .* has 0123456789ab|has 0123456789ab.*"):
            tables.build("table2", Results.read("g"))
    finally:
        client.set_tag(row.run_id, f"ctp.{tag}", before)
    tables.build("table2", Results.read("g"))


def test_no_rows_make_no_error():
    assert of_measure(typed(pd.DataFrame(columns=["model", "measure", "run_id"])), "perplexity", "g").empty


# ---------------------------------------------------------------------- coverage


def test_coverage_names_every_entry_that_has_no_cell(bench, texts, monkeypatch, capsys):
    monkeypatch.setenv("CTP_DATA_DIR", str(texts))
    assert compare.main([str(bench.plan.grid.path), "--coverage"]) == 1
    out = capsys.readouterr().out
    assert "missing: table2: 3-bit w/ prompt learned on WikiText-2, PTB: no cell" in out
    assert "missing: table2: 3-bit w/ prompt learned on C4, PTB: model llama-7b" in out  # a stand-in is no coverage
    assert "table2          8      0      0" in out
    assert compare.main(["no/such.yaml", "--coverage"]) == 2


def test_a_compression_that_two_cells_claim_is_no_coverage(bench, texts, monkeypatch):
    monkeypatch.setenv("CTP_DATA_DIR", str(texts))
    settings = ["compression=[{method: gptq, bits: 3}, {method: gptq, bits: 3, sym: true}]"]
    plan = make(gridfile.load(str(bench.plan.grid.path), settings, bench.pins), bench.pins)
    found = {e.name: why for e, why in coverage.covered(plan).items()}
    said = found["table2: 3-bit w/o prompt, C4"]
    assert "runs claim it" in said
    assert "spec.target.compression.sym (False | True)" in said


def test_the_whole_paper_is_planned(capsys):
    """Every entry has its cell, and no network is needed to say so."""
    assert coverage.main("full_paper", None) == 0
    assert "411 entries (235 printed numbers), 411 with their cell" in capsys.readouterr().out
