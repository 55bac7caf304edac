"""Pinning tasks of lm-evaluation-harness: what a revision follows, and what is refused in one sentence."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.tinytasks import DATA, SHIPPED, needs_data, own_task

from ctp.data import taskfiles, tasks
from ctp.evaluation.tasks import build


def test_a_revision_follows_definition_data_and_harness(tmp_path, monkeypatch):
    path = own_task(tmp_path / "own")
    (tmp_path / "own" / "template").write_text("description: Add.\nprocess_docs: !function code.same\n")
    (tmp_path / "own" / "code.py").write_text("def same(docs):\n    return docs\n")
    Path(path).write_text("include: template\n" + Path(path).read_text())
    seen = [tasks.locate(path)]
    for name, add in [
        ("sums.yaml", "#"),
        ("template", "#"),
        ("code.py", "#"),
        ("test.jsonl", "\n"),
        ("train.jsonl", "\n"),
    ]:
        file = tmp_path / "own" / name
        file.write_text(file.read_text() + add)
        seen.append(tasks.locate(path))
        with pytest.raises(ValueError, match=r"sums .* has changed since it was pinned"):
            tasks.check_pinned(seen[-1][2], seen[-2][1])
    with monkeypatch.context() as patched:
        patched.setattr(taskfiles, "version", lambda name: "0.5")
        seen.append(tasks.locate(path))
        with pytest.raises(ValueError, match=r"0\.5 here"):
            tasks.check_pinned(seen[-1][2], seen[-2][1])
    assert len({revision for _, revision, _ in seen}) == len(seen)
    assert {(name, location) for name, _, location in seen} == {("sums", seen[0][2])}
    assert tasks.check_pinned(seen[-2][2], seen[-2][1]).config["description"] == "Add."
    assert build(seen[-2][2], seen[-2][1], 0).config.description == "Add."


def test_where_it_lies_is_not_part_of_it(tmp_path, monkeypatch):
    first, second = own_task(tmp_path / "a"), own_task(tmp_path / "b")
    assert tasks.locate(first)[1] == tasks.locate(second)[1]
    assert tasks.locate("sums.yaml", base=tmp_path / "a") == tasks.locate(first)
    monkeypatch.chdir(tmp_path)
    assert tasks.locate("b/sums.yaml", base=tmp_path / "a") == tasks.locate(second)
    _, revision, location = tasks.locate(first)
    Path(first).unlink()
    with pytest.raises(ValueError, match=r"sums.yaml is missing on this machine"):
        tasks.check_pinned(location, revision)


def test_a_folder_of_data_is_pinned_and_read(tmp_path):
    path = own_task(tmp_path / "own", dataset_path="data", dataset_kwargs=None)
    (tmp_path / "own" / "data").mkdir()
    for split in ("train", "test"):
        (tmp_path / "own" / f"{split}.jsonl").rename(tmp_path / "own" / "data" / f"{split}.jsonl")
    _, revision, location = tasks.locate(path)
    assert len(build(location, revision, 0).eval_docs) == 6
    (tmp_path / "own" / "data" / "test.jsonl").write_text('{"question": "1 + 1?", "answer": "2"}')
    with pytest.raises(ValueError, match="has changed"):
        build(location, revision, 0)


@needs_data
def test_local_data_may_lack_what_only_examples_need(tmp_path, monkeypatch):
    monkeypatch.setenv("CTP_DATA_DIR", str(DATA))
    name, revision, location = tasks.locate("hellaswag")
    assert (name, json.loads(location)) == ("hellaswag", {"task": "harness:hellaswag", "data": str(DATA / "hellaswag")})
    assert build(location, revision, 0).config.training_split is None
    with pytest.raises(ValueError, match=r"shots = 3: the local data of hellaswag has no train\.jsonl"):
        tasks.locate("hellaswag", shots=3)
    (tmp_path / "openbookqa").mkdir()
    (tmp_path / "openbookqa" / "validation.jsonl").write_text("{}")
    with pytest.raises(ValueError, match=r"openbookqa needs test.jsonl, and .* has none"):  # not validation instead
        tasks.locate("openbookqa", tmp_path)


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("openbokqa", "unknown task 'openbokqa'; did you mean 'openbookqa'"),
        ("mmlu", "mmlu is a group of tasks: name single ones, such as mmlu_abstract_algebra"),
        ("ai2_arc", "ai2_arc is a group of tasks: name single ones, such as arc_easy"),
        ("squad_completion", "made by Python code"),
        ("humaneval", "runs code that the model writes"),
        (
            "arc_easy",
            r"the hub \(allenai/ai2_arc\) cannot be reached; give --data DIR or CTP_DATA_DIR with a folder arc",
        ),
        ("nothing.yaml", "there is no task file 'nothing.yaml'"),
    ],
)
def test_names_that_are_no_task(name, error):
    with pytest.raises(ValueError, match=error):
        tasks.locate(name)


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"task": None}, "task = None must be a name"),
        ({"task": "a b"}, "task = 'a b' must be a name"),
        ({"group": "all"}, "is a group of tasks"),
        ({"include": "gone.yaml"}, "gone.yaml is missing"),
        ({"include": "sums.yaml"}, "sums.yaml includes itself"),
        ({"dataset_path": None}, "dataset_path = None must name"),
        ({"dataset_path": "./gone"}, "there is no folder .*gone with files"),
        ({"dataset_kwargs": None}, "needs dataset_kwargs.data_files"),
        ({"dataset_kwargs": {"data_files": {"test": "gone.jsonl"}}}, "there is no file .*gone.jsonl"),
        ({"dataset_kwargs": {"data_files": {"test": "https://x.org/a.jsonl"}}}, "from the web, which cannot be pinned"),
    ],
)
def test_mistakes_in_a_task_of_ones_own(tmp_path, fields, error):
    path = own_task(tmp_path / "own", **fields)
    with pytest.raises(ValueError, match=error):
        tasks.locate(path)


def test_shots_that_a_task_cannot_be_put_with():
    with pytest.raises(ValueError, match=r"shots = 1: the task ctp_piqa is defined without examples"):
        tasks.locate("ctp_piqa.yaml", base=SHIPPED, shots=1)


def test_the_hubs_commit_is_pinned(monkeypatch):
    import huggingface_hub

    asked_for = []

    def info(self, name, **fields):
        asked_for.append(name)
        return type("Info", (), {"sha": "a" * 40 if len(asked_for) == 1 else "b" * 40})()

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", info)
    (name, first, location), (_, second, _) = tasks.locate("arc_easy"), tasks.locate("arc_easy")
    assert asked_for == ["allenai/ai2_arc"] * 2
    assert first != second
    assert json.loads(location) == {"task": f"harness:{name}", "commit": "a" * 40}
    assert tasks.check_pinned(location, first).changes == {"dataset_kwargs": {"revision": "a" * 40}}


def test_planning_imports_neither_torch_nor_the_harness(monkeypatch):
    code = (
        "import sys; from pathlib import Path; from ctp.data import tasks; "
        f"tasks.locate('ctp_piqa.yaml', base=Path({str(SHIPPED)!r})); "
        "print({'torch', 'lm_eval', 'datasets', 'transformers'} & set(sys.modules))"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_without_the_harness_one_sentence_says_what_to_install(monkeypatch):
    def missing(name):
        raise taskfiles.PackageNotFoundError(name)

    monkeypatch.setattr(taskfiles, "version", missing)
    with pytest.raises(ValueError, match=r"pip install 'ctp\[tasks\]'"):
        tasks.locate("piqa")
