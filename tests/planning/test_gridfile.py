"""Grid files: axes, inheritance, overrides, and one clear error per mistake, naming its place."""

import pytest
import yaml
from support.plans import load, problems
from support.tinygrid import grid, model_folder, write_grid

from ctp.common.yaml import parse_yaml
from ctp.planning import gridfile
from ctp.planning.gridtext import GridError


@pytest.fixture
def file(tmp_path, llama_folder):
    return write_grid(tmp_path / "g.yaml", grid(llama_folder))


def test_lists_are_axes_at_any_depth():
    item = {"method": "gptq", "bits": [2, 3], "text": {"dataset": ["a", "b"], "split": "test"}}
    found = gridfile.expand(item)
    assert [(x["bits"], x["text"]["dataset"]) for x in found] == [(2, "a"), (2, "b"), (3, "a"), (3, "b")]


def test_a_study_is_what_the_file_says(file):
    found, _ = load(file)
    [study] = found.studies
    assert [c.label for c in study.compressions] == ["dense", "gptq-3bit", "sparsegpt-50-4bit"]
    assert study.sources == ("gptq-3bit",)
    assert study.targets == ("dense", "gptq-3bit", "sparsegpt-50-4bit")
    assert study.models[0].dtype == "float32"
    assert study.models[0].revision.startswith("sha256:")


def test_the_default_validation_is_another_split_of_the_same_text(file):
    found, _ = load(file)
    recovery = found.studies[0].recoveries[0]
    assert (recovery.validation.dataset, recovery.validation.split, recovery.validation.count) == (
        "pydoc",
        "validation",
        4,
    )
    assert recovery.validation.join == "\n\n"
    assert recovery.validation.revision


def test_extends_merges_mappings_and_replaces_lists(file, tmp_path):
    top = {"extends": "g", "compression": ["dense"], "sources": "all", "recovery": {"k": 9}}
    found, _ = load(write_grid(tmp_path / "top.yaml", top))
    [study] = found.studies
    assert [c.label for c in study.compressions] == ["dense"]
    assert (study.recoveries[0].k, study.recoveries[0].steps) == (9, 6)
    assert found.name == "top"


def test_one_split_can_serve_twice_by_its_documents(file):
    """C4 has no test split: what is learned from, what chooses the step and what is reported are told by documents."""
    ranges = ["recovery.text.documents=100", "recovery.validation={split: train, skip: 100, documents: 20, count: 2}",
              "measures.text={dataset: pydoc, split: train, seq_len: 24, skip: 120, count: 2}"]  # fmt: skip
    load(file, *ranges)
    assert "measures report on the same" in problems(file, *ranges, "measures.text.skip=110")[0]
    load(file, *ranges, "measures.text.skip=110", "recovery.on_reported=true")


def test_extends_in_a_circle_is_an_error(tmp_path):
    write_grid(tmp_path / "a.yaml", {"extends": "b"})
    write_grid(tmp_path / "b.yaml", {"extends": "a"})
    with pytest.raises(GridError, match="comes back to itself"):
        load(tmp_path / "a.yaml")


def test_studies_share_the_top_level_and_their_cells(file, tmp_path):
    content = yaml.safe_load(file.read_text())
    content["studies"] = {"one": {}, "two": {"sources": ["dense"]}}
    found, graph = load(write_grid(tmp_path / "s.yaml", content))
    assert [s.name for s in found.studies] == ["one", "two"]
    by_kind = [n.cell.kind for n in graph.nodes.values()]
    assert (by_kind.count("compress"), by_kind.count("learn"), by_kind.count("evaluate")) == (3, 2, 9)
    assert sum(n.studies == ("one", "two") for n in graph.nodes.values()) == 6


def test_set_goes_through_the_same_validation(file):
    found, _ = load(file, "recovery.k=2", "compression.1.bits=[3,4]", "measures.text.seq_len=12")
    [study] = found.studies
    assert study.recoveries[0].k == 2
    assert [c.label for c in study.compressions] == ["dense", "gptq-3bit", "gptq-4bit", "sparsegpt-50-4bit"]
    assert study.measures[0].text.seq_len == 12


def test_numbers_may_be_written_in_scientific_notation(tmp_path):
    assert parse_yaml("[1e-3, 2E4, 1.5e-2, 1e]") == [0.001, 20000.0, 0.015, "1e"]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["compresion=1"], ["compresion: unknown key 'compresion'; did you mean 'compression'?"]),
        (["compression.1.bits=5"], ["compression[1].bits = 5: should be 2, 3, 4 or 8",]),
        (["compression.1.method=gptqq"], ["compression[1]: unknown method 'gptqq'; did you mean 'gptq'?"]),
        (["compression.1.bitz=5"], ["compression[1].bitz: unknown key 'bitz'; did you mean 'bits'?"]),
        (["compression.2.sparsity=1.5"], ["compression[2].sparsity = 1.5: should be less than 1"]),
        (["recovery.lr=-1"], ["recovery.lr = -1: should be greater than 0"]),
        (["recovery.lr=fast"], ["recovery.lr = 'fast': should be a valid number"]),
        (["recovery.text.spli=x"], ["recovery.text.spli: unknown key 'spli'; did you mean 'split'?"]),
        (["recovery.text.dataset=pydok"], ["recovery.text: unknown data set 'pydok'; did you mean 'pydoc'?"]),
        (["extends=demo"], ["--set 'extends=demo'"]),
        (["measures.text.split=tset"], ["measures.text: pydoc has no split 'tset'; it has: train"]),
        (["calibration.count=three"], ["calibration.count = 'three': should be a valid integer"]),
        (["calibration=null"], ["calibration is missing"]),
        (["models=null"], ["models is missing"]),
        (["models=/no/such/model"], ["models = '/no/such/model': there is no folder '/no/such/model'"]),
        (["models=nobody/nothing"], ["models = 'nobody/nothing': 'nobody/nothing' is no folder, the hub cannot"]),
        (["sources=[gptq-4bit]"], ["sources: unknown compression 'gptq-4bit'; did you mean"]),
        (["transfer=some"], ["transfer = 'some': allowed: all, own"]),
        (["compression.1.group_size=7", "sources=all"], ["compression.group_size = 7 (gptq-3bit-g7): must divide"]),
        (["recovery.k=50"], ["recovery.text.seq_len = 24 and a prompt of 50: beyond the context of tiny-llama, 64"]),
        (["measures.text.seq_len=62"], ["measures.text.seq_len = 62 and a prompt of 4: beyond the context"]),
        (["measures.text.seq_len=65"], ["measures.text.seq_len = 65: beyond the context of tiny-llama, 64 tokens"]),
        (["datasets={own: {path: /no/such}}", "measures.text.dataset=own"], ["measures.text: own: "]),
        (["datasets={own: {pfad: x}}"], ["datasets.own: data set 'own' needs either 'path'"]),
        (["compression.0=gptq"], ["compression[0].bits is missing"]),
        (["recovery.k=[]"], ["recovery.k = []: an axis needs at least one value"]),
        (["models=[[]]"], ["models[0] = []: an axis needs at least one value"]),
        (["studies={}"], ["studies = {}: a mapping of study names to mappings, at least one"]),
        (["recovery.lr=.inf"], ["recovery.lr = inf: should be a finite number"]),
        (["compression.1.method={a: 1}"], ["compression[1]: unknown method {'a': 1}"]),
        (["compression.2={method: sparsegpt, pattern: '2:5'}"], ["compression.pattern = 5 (sparsegpt-2:5): must"]),
        (["recovery.validation.split=test"], ["recovery.validation = pydoc test: measures report on the same"]),
        (["recovery.validation.split=train"], ["recovery: validation shares documents with the text"]),
        (["calibration.revision=abc"], ["calibration: revision = 'abc': pydoc train is sha256:"]),
        (["models={name: MODEL, revision: abc}"], ["models: revision = 'abc': tiny-llama is sha256:"]),
        (["calibration.seed=-1"], ["calibration.seed = -1: should be greater than or equal to 0"]),
        (["models=package:no.such/x.gguf"], ["models = 'package:no.such/x.gguf': the package 'no.such'"]),
        (["compression.1.bits=[3,3]"], ["compression: 'gptq-3bit' appears twice"]),
        (["models={name: MODEL, dtype: float16}"], ["recovery.precision = 'fp32': tiny-llama is float16"]),
    ],
)  # fmt: skip
def test_each_mistake_is_one_line_that_names_its_place(file, llama_folder, settings, expected):
    found = problems(file, *[s.replace("MODEL", str(llama_folder)) for s in settings])
    assert found[0].startswith(expected[0]), found


def test_all_mistakes_are_told_at_once(file):
    assert len(problems(file, "recovery.lr=-1", "compression.1.bits=5", "nonsense=1")) == 3


@pytest.mark.parametrize("setting", ["recovery", "=3", "compression.9.bits=3", "compression.x=3", "models.a.b=3"])
def test_a_setting_that_leads_nowhere_is_told(file, setting):
    with pytest.raises(GridError, match="--set"):
        load(file, setting)


@pytest.mark.parametrize("text", ["a: [1", "- 1\n- 2", "models: a\nmodels: b"])
def test_files_that_are_no_grid(tmp_path, text):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(GridError, match=r"bad\.yaml"):
        load(tmp_path / "bad.yaml")


def test_unknown_grid_names_the_nearest():
    with pytest.raises(GridError, match="did you mean 'demo'"):
        load("demoo")
    with pytest.raises(GridError, match="there is no grid file"):
        load("nowhere/x.yaml")


def test_a_folder_that_is_no_model_is_told(tmp_path, file):
    (tmp_path / "empty").mkdir()
    assert "without config.json" in problems(file, f"models={tmp_path / 'empty'}")[0]


def test_a_changed_weight_file_is_another_model(tmp_path):
    folder = model_folder(tmp_path / "m")
    path = write_grid(tmp_path / "g.yaml", grid(folder))
    before = load(path)[0].studies[0].models[0].revision
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    assert load(path)[0].studies[0].models[0].revision != before


def test_a_study_in_parts_is_one_study(tmp_path, llama_folder):
    whole = grid(llama_folder)
    parts = [{"title": "Two", "targets": "dense"}, {"targets": "gptq-3bit", "transfer": "own"}]
    found, graph = load(write_grid(tmp_path / "g.yaml", {**whole, "studies": {"both": parts}}))
    assert [(s.name, s.title, s.targets) for s in found.studies] == [
        ("both", "Two", ("dense",)), ("both", "", ("gptq-3bit",))]  # fmt: skip
    assert {n.studies for n in graph.nodes.values()} == {("both",)}
    bad = write_grid(tmp_path / "b.yaml", {**whole, "studies": {"both": [{"targets": "dens"}, 3]}})
    assert problems(bad) == [
        "studies.both[0].targets: unknown compression 'dens'; did you mean 'dense'? "
        "Allowed: dense, gptq-3bit, sparsegpt-50-4bit",
        "studies.both[1] = 3: a mapping; allowed keys: " + ", ".join(gridfile.STUDY_KEYS),
    ]
