"""Local copies of hub texts: fetched whole or not at all, verified, and read as the hub's own."""

import hashlib
import inspect
import json
import shutil

import datasets
import huggingface_hub
import pytest
from support.shared import DATA, needs

from ctp.corpora import main
from ctp.data.documents import locate_text, read_documents
from ctp.data.texts import CORPORA

TEXTS = ["one\u2028line", "", "no it was n't", "two\nlines", "ünï"]  # a JSON line may hold what ends a line elsewhere
OPENBOOK = [{"id": "7-980", "question_stem": "The sun is", "choices": {"text": ["a", "b"], "label": ["A", "B"]},
             "answerKey": "B"}]  # fmt: skip
PTB_COMMIT = "d" * 40


@pytest.fixture
def hub(monkeypatch):
    """`load_dataset` over rows in memory, real `datasets` objects; what it was asked is recorded."""
    asked, load = [], datasets.load_dataset
    rows = {
        "allenai/c4": [{"text": t, "timestamp": "2019", "url": "u"} for t in TEXTS],
        "Salesforce/wikitext": [{"text": t} for t in TEXTS],
        "ptb-text-only/ptb_text_only": [{"sentence": t} for t in TEXTS],
        "allenai/openbookqa": OPENBOOK,
    }

    def load_dataset(path, /, **options):
        inspect.signature(load).bind(path, **options)
        asked.append((path, options))
        if path not in rows:
            raise datasets.exceptions.DatasetNotFoundError(f"Dataset '{path}' doesn't exist on the Hub")
        whole = datasets.Dataset.from_list(rows[path])
        return whole.to_iterable_dataset() if options.get("streaming") else whole

    def dataset_info(self, name, revision, timeout):
        asked.append((name, revision))
        return type("Info", (), {"sha": PTB_COMMIT})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
    return asked


def run(capsys, *args):
    code = main([str(a) for a in args])
    out = capsys.readouterr()
    return code, out.out, out.err


@pytest.mark.parametrize("name", ["c4", "wikitext2", "ptb"])
def test_a_local_copy_has_the_texts_that_the_hub_has(tmp_path, capsys, hub, name):
    corpus = CORPORA[name]
    code, out, _ = run(capsys, "fetch", tmp_path, name, "--documents", "train=all,validation=4")
    assert code == 0
    for split in corpus.splits:
        location, revision = locate_text(corpus, split, tmp_path)
        path = tmp_path / corpus.folder / f"{split}.jsonl"
        assert revision == f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"
        first = 4 if (name, split) == ("c4", "validation") else None
        remote = read_documents(locate_text(corpus, split)[0], corpus, split, first)
        assert read_documents(location, corpus, split) == remote == TEXTS[:first]
        assert f"{corpus.folder}/{split}.jsonl: {len(remote)} rows" in out


def test_the_manifest_tells_what_the_files_are(tmp_path, capsys, hub):
    assert run(capsys, "fetch", tmp_path, "c4", "ptb", "--documents", "train=3")[0] == 0
    said = json.loads((tmp_path / "c4" / "manifest.json").read_text())
    assert {n: said[n] for n in ("hub", "commit", "config")} == {
        "hub": "allenai/c4", "commit": "1588ec454efa1a09f29cd18ddd04fe05fc8653a2", "config": None
    }  # fmt: skip
    path = tmp_path / "c4" / "train.jsonl"
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    expected = {"rows": 3, "bytes": path.stat().st_size, "sha256": digest, "documents": 3}
    assert said["files"]["train.jsonl"] == expected
    assert json.loads((tmp_path / "ptb" / "manifest.json").read_text())["commit"] == PTB_COMMIT
    assert ("ptb-text-only/ptb_text_only", "refs/convert/parquet") in hub
    options = dict(hub)["allenai/c4"]  # streamed: a shard has 356,000 documents
    assert options["streaming"]
    assert {p.name for p in (tmp_path / "c4").iterdir()} == {"manifest.json", "train.jsonl", "validation.jsonl"}


def test_a_tasks_rows_have_all_their_columns(tmp_path, capsys, hub):
    assert run(capsys, "fetch", tmp_path, "openbookqa")[0] == 0
    for split in ("train", "validation", "test"):
        rows = (tmp_path / "openbookqa" / f"{split}.jsonl").read_text().splitlines()
        assert [json.loads(r) for r in rows] == OPENBOOK
    assert hub[0] == ("allenai/openbookqa", {"split": "train", "name": "main",
                                             "revision": "388097ea7776314e93a529163e0fea805b8a6454"})  # fmt: skip


def test_what_verifies_is_not_fetched_again(tmp_path, capsys, hub):
    assert run(capsys, "fetch", tmp_path, "c4", "ptb")[0] == 0
    hub.clear()
    code, out, _ = run(capsys, "fetch", tmp_path, "c4", "ptb")
    assert (code, hub) == (0, [])
    assert "c4/train.jsonl: there" in out
    (tmp_path / "ptb" / "test.jsonl").write_text("")
    assert run(capsys, "fetch", tmp_path, "ptb")[0] == 0
    expected = {"split": "test", "revision": PTB_COMMIT}  # at the commit of its other files
    assert hub == [("ptb-text-only/ptb_text_only", expected)]
    hub.clear()
    assert run(capsys, "fetch", tmp_path, "c4", "--documents", "train=2")[0] == 0
    assert [options["split"] for _, options in hub] == ["train"]
    assert run(capsys, "verify", tmp_path)[0] == 0


def test_another_commit_is_fetched_anew(tmp_path, capsys, hub):
    assert run(capsys, "fetch", tmp_path, "wikitext2")[0] == 0
    manifest = tmp_path / "wikitext-2-raw" / "manifest.json"
    manifest.write_text(manifest.read_text().replace("b08601e", "0000000"))
    hub.clear()
    assert run(capsys, "fetch", tmp_path, "wikitext2")[0] == 0
    assert len(hub) == 3
    assert "b08601e" in manifest.read_text()


def test_verify_says_which_file_is_missing_truncated_or_changed(tmp_path, capsys, hub):
    assert run(capsys, "fetch", tmp_path, "wikitext2", "openbookqa")[0] == 0
    folder = tmp_path / "wikitext-2-raw"
    size = (folder / "train.jsonl").stat().st_size
    (folder / "test.jsonl").unlink()
    (folder / "train.jsonl").write_bytes((folder / "train.jsonl").read_bytes()[:-5])
    (folder / "validation.jsonl").write_bytes((folder / "validation.jsonl").read_bytes().replace(b"lines", b"limes"))
    code, out, _ = run(capsys, "verify", tmp_path)
    assert code == 1
    assert out.splitlines() == [
        f"{folder / 'test.jsonl'}: missing",
        f"{folder / 'train.jsonl'}: truncated, {size - 5} of {size} bytes",
        f"{folder / 'validation.jsonl'}: changed: another sha256",
        f"{tmp_path}: 6 files checked, 3 of them bad",
    ]
    assert run(capsys, "verify", tmp_path, "openbookqa")[0] == 0
    code, out, _ = run(capsys, "verify", tmp_path, "wikitext-2-raw", "piqa")
    assert code == 1
    assert f"{tmp_path / 'piqa'}: missing, or nothing tells what it should hold" in out


def test_a_download_that_breaks_off_leaves_nothing(tmp_path, capsys, hub, monkeypatch):
    class Breaks:
        column_names = None

        def __iter__(self):
            yield {"text": "a"}
            raise ConnectionError("reset by peer")

    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: Breaks())
    code, _, err = run(capsys, "fetch", tmp_path, "c4")
    assert code == 3
    assert "the hub cannot be reached (ConnectionError)" in err
    assert list((tmp_path / "c4").iterdir()) == []


def test_one_that_is_refused_does_not_keep_the_others_back(tmp_path, capsys, hub):
    code, _, err = run(capsys, "fetch", tmp_path, "hellaswag", "openbookqa")
    assert code == 1
    assert err.startswith("error: hellaswag: ")
    assert "Rowan/hellaswag" in err
    assert (tmp_path / "openbookqa" / "test.jsonl").is_file()


def test_without_a_network(tmp_path, capsys):
    for name in ("c4", "ptb"):  # a commit that is known, and one that the hub would have to tell
        code, _, err = run(capsys, "fetch", tmp_path, name)
        assert code == 3
        assert err.count("\n") == 1
        assert "cannot be reached" in err


def test_files_of_somebody_else_are_not_overwritten(tmp_path, capsys, hub):
    file = tmp_path / "ptb" / "test.jsonl"
    file.parent.mkdir()
    file.write_text('{"text": "mine"}\n')
    code, _, err = run(capsys, "fetch", tmp_path, "ptb")
    assert (code, file.read_text()) == (1, '{"text": "mine"}\n')
    assert "neither manifest.json nor SHA256SUMS vouches for it" in err
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    (tmp_path / "SHA256SUMS").write_text(f"{digest}  ./ptb/test.jsonl\n")
    for _ in range(2):  # with a checksum it is as good as fetched, now and when its folder has a manifest
        assert run(capsys, "fetch", tmp_path, "ptb")[0] == 0
        assert file.read_text() == '{"text": "mine"}\n'
    assert run(capsys, "verify", tmp_path)[0] == 0


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["fetch", "DIR", "c5"], "unknown data set 'c5'; did you mean 'c4'"),
        (["fetch", "DIR", "c4", "--documents", "test=5"], "--documents 'test=5': write SPLIT=N or SPLIT=all"),
        (["fetch", "DIR", "c4", "--documents", "train=0"], "--documents 'train=0'"),
        (["verify", "DIR"], "has no SHA256SUMS and no folder with a manifest.json"),
    ],
)
def test_bad_usage(tmp_path, capsys, hub, args, expected):
    code, _, err = run(capsys, *[str(tmp_path) if a == "DIR" else a for a in args])
    assert (code, hub) == (2, [])
    assert expected in err


def test_a_damaged_manifest_or_list_of_checksums(tmp_path, capsys, hub):
    assert run(capsys, "fetch", tmp_path, "openbookqa")[0] == 0
    manifest = tmp_path / "openbookqa" / "manifest.json"
    whole = manifest.read_text()
    manifest.write_text(whole[:-10])
    assert f"{manifest} is damaged" in run(capsys, "verify", tmp_path)[2]
    assert run(capsys, "fetch", tmp_path, "openbookqa")[0] == 1
    manifest.write_text(whole)
    (tmp_path / "SHA256SUMS").write_text(f"{'0' * 64}  ../elsewhere\n")
    code, _, err = run(capsys, "verify", tmp_path)
    assert code == 1
    assert "SHA256SUMS, line 1: no checksum and path below" in err


@needs(DATA)
def test_real_copies_verify_and_a_changed_byte_is_told(tmp_path, capsys):
    code, out, _ = run(capsys, "verify", DATA)
    assert (code, out) == (0, f"{DATA}: 20 files checked, all as they should be\n")
    for folder in ("ptb", "piqa"):
        shutil.copytree(DATA / folder, tmp_path / folder)
    shutil.copy(DATA / "SHA256SUMS", tmp_path)
    assert run(capsys, "verify", tmp_path, "ptb", "piqa")[0] == 0
    file = tmp_path / "ptb" / "train.jsonl"
    file.chmod(0o644)
    content = file.read_bytes()
    file.write_bytes(content[:-3] + b"." + content[-2:])
    code, out, _ = run(capsys, "verify", tmp_path, "ptb")
    assert code == 1
    assert f"{file}: changed: another sha256" in out
