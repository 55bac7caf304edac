import inspect
import json
import os
import random
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.shared import DATA, needs
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from ctp.cells.inputs import Windows
from ctp.data import packaged
from ctp.data import texts as data_texts
from ctp.data import windows as data_windows
from ctp.data.documents import locate_text, read_documents
from ctp.data.texts import CORPORA, find, parse_corpus
from ctp.data.windows import cut_windows, text_stats

needs_data = needs(DATA / "wikitext-2-raw")


@pytest.fixture(autouse=True)
def _no_data_dir(monkeypatch):
    monkeypatch.delenv("CTP_DATA_DIR", raising=False)


@pytest.fixture(scope="module")
def by_bytes():
    """One token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=4)


def by_words(words, bos=False):
    """One token a word, and [U] for those that are not in `words`; optionally [B] before everything."""
    vocab = {w: i for i, w in enumerate(["[U]", "[B]", *words.split()])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="[U]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="[B] $A", special_tokens=[("[B]", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[U]", bos_token="[B]")


def spec(dataset="c4", split="train", **more):
    return Windows(**{"dataset": dataset, "split": split, "seq_len": 4, **more})


def ids(tokenizer, text):
    return tokenizer(text)["input_ids"]


# ------------------------------------------------------------------- windows


def test_documents_are_joined_tokenised_in_one_go_and_the_tail_dropped(by_bytes):
    cut = cut_windows(spec("wikitext2"), ["ab", "", "cdef", "g"], by_bytes)
    assert cut.dtype == torch.int64
    assert [by_bytes.decode(w) for w in cut] == ["ab\n\n", "\n\ncd", "ef\n\n"]  # and "g" is the tail
    assert [by_bytes.decode(w) for w in cut_windows(spec("c4"), ["ab", "cdef", "g"], by_bytes)] == ["ab c", "def "]
    joined = cut_windows(spec("c4", join="-", documents=2, count=1), ["ab", "cdef", "g"], by_bytes)
    assert [by_bytes.decode(w) for w in joined] == ["ab-c"]


def test_default_special_tokens_stand_once_before_everything():
    tokenizer = by_words("a b c d e f", bos=True)
    assert cut_windows(spec(), ["a b", "c d e", "f"], tokenizer).tolist() == [[1, 2, 3, 4]]
    assert cut_windows(spec(seq_len=7), ["a b", "c d e", "f"], tokenizer).tolist() == [[1, 2, 3, 4, 5, 6, 7]]


def test_count_gives_the_first_windows_of_the_whole_without_reading_it_all(by_bytes, monkeypatch):
    texts = [f"document {i} " * (i % 7) for i in range(3000)]
    whole = cut_windows(spec(seq_len=64), texts, by_bytes)
    lengths = []
    plain = data_windows._tokens
    monkeypatch.setattr(data_windows, "_tokens", lambda *a: lengths.append(len(a[-1])) or plain(*a))
    assert torch.equal(cut_windows(spec(seq_len=64, count=9), texts, by_bytes), whole[:9])
    assert sum(lengths) < sum(map(len, texts)) / 5
    tight = by_words(" ".join(f"w{i}" for i in range(10)))  # five characters a token guess too few documents here
    texts = ["w1 " * 30 + "x" * 3000] * 500
    assert torch.equal(cut_windows(spec(count=999), texts, tight), cut_windows(spec(), texts, tight)[:999])


def test_too_few_windows(by_bytes):
    with pytest.raises(ValueError, match=r"c4/train has 9 tokens, 2 windows of 4; 3 are asked for"):
        cut_windows(spec(count=3), ["abcd", "efgh"], by_bytes)
    with pytest.raises(ValueError, match=r"3 tokens, 0 windows of 4$"):
        cut_windows(spec(), ["abc"], by_bytes)
    with pytest.raises(ValueError, match="0 tokens"):
        cut_windows(spec(), [], by_bytes)


def test_fewer_documents_than_specified_are_said(by_bytes, caplog):
    cut_windows(spec(documents=5), ["abcd", "efgh"], by_bytes)
    assert "c4/train has 2 documents after 0, not 5" in caplog.text


def test_long_texts_raise_no_warning(by_bytes, caplog):
    with caplog.at_level("WARNING"):
        cut_windows(spec(), ["abcdefgh" * 100], by_bytes)
    assert not caplog.records


def test_crops_lie_inside_one_long_document_and_follow_the_seed(by_bytes):
    texts = ["short", "abcdefgh" * 4, "tiny", "01234567" * 5, ""]
    crops = spec(seq_len=8, count=40, sampling="crops", seed=3)
    torch.manual_seed(0)
    random.seed(0)
    first = cut_windows(crops, texts, by_bytes)
    torch.manual_seed(1)
    random.seed(1)
    state = random.getstate()
    assert torch.equal(first, cut_windows(crops, texts, by_bytes))
    assert random.getstate() == state
    assert not torch.equal(first, cut_windows(crops.model_copy(update={"seed": 4}), texts, by_bytes))
    found = [by_bytes.decode(w) for w in first]
    assert first.shape == (40, 8)
    assert all(any(crop in text for text in texts) for crop in found)
    assert {crop[0].isdigit() for crop in found} == {True, False}  # both long documents are drawn
    assert len(set(found)) > 8


def test_crops_reach_both_ends_and_documents_must_be_longer(by_bytes):
    crops = spec(count=60, sampling="crops")
    assert {by_bytes.decode(w) for w in cut_windows(crops, ["abcd", "12345"], by_bytes)} == {"1234", "2345"}
    with pytest.raises(ValueError, match="no document of more than 4 tokens"):
        cut_windows(crops, ["abcd", "123", ""], by_bytes)


def test_text_stats_count_unknowns_and_know_the_tokenizer(by_bytes):
    tokenizer = by_words("a b", bos=True)
    cut = cut_windows(spec(), ["a x b y b a"], tokenizer)
    stats = text_stats(cut, tokenizer)
    assert (stats["tokens"], stats["unk"]) == (4, 1)
    tokenizer(["a", "a b"], padding=False, truncation=True, max_length=1)  # leaves its truncation behind
    assert text_stats(cut, tokenizer) == stats
    assert text_stats(cut, by_words("a b c", bos=True))["tokenizer_sha256"] != stats["tokenizer_sha256"]
    tokenizer.add_tokens(["x"])  # the same object, another tokenizer
    assert text_stats(cut, tokenizer)["tokenizer_sha256"] != stats["tokenizer_sha256"]
    assert text_stats(cut_windows(spec(), ["abcd"], by_bytes), by_bytes)["unk"] == 0
    shared = by_words("a b", bos=True)
    shared.unk_token = "[B]"  # as OPT, whose </s> is all of these
    assert text_stats(cut, shared)["unk"] == 0


# ------------------------------------------------------------- packaged texts


@pytest.mark.parametrize(("name", "least"), [("wikipedia", 1_900_000), ("newswire", 340_000), ("pydoc", 300_000)])
def test_packaged_texts_have_disjoint_splits_of_useful_size(name, least):
    splits = {}
    for split in data_texts.SPLITS:
        location, revision = locate_text(CORPORA[name], split, "/nowhere")
        assert location == f"package:{name}@{revision}"
        assert revision.startswith("sha256:")
        splits[split] = read_documents(location, CORPORA[name], split)
    assert sum(len(d) for texts in splits.values() for d in texts) > least
    assert min(sum(map(len, splits[s])) for s in ("validation", "test")) > 60_000
    paragraphs = {s: {p for d in texts for p in d.split("\n\n") if len(p) > 60} for s, texts in splits.items()}
    assert not paragraphs["train"] & (paragraphs["validation"] | paragraphs["test"])
    assert not paragraphs["validation"] & paragraphs["test"]


def test_wikipedia_reads_like_prose():
    texts = read_documents("package:wikipedia", CORPORA["wikipedia"], "train")
    assert texts[0].startswith("Anarchism is a political philosophy that advocates self-governed societies based on")
    text = "\n\n".join(texts)
    for markup in ("''", "[[", "{{", "|", "==", "<ref", "&nbsp;", "()", "( ", " ,", "\ue000", "#REDIRECT"):
        assert markup not in text, markup
    assert all(p[-1] in ".!?\"'”’)" for p in text.split("\n\n"))


def test_packaged_revision_follows_the_split_rule(monkeypatch):
    before = locate_text(CORPORA["pydoc"], "test")
    monkeypatch.setattr(packaged, "VERSION", 10**6)
    assert locate_text(CORPORA["pydoc"], "test") != before


def test_missing_gensim_is_said(monkeypatch):
    monkeypatch.setattr(packaged.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install gensim"):
        locate_text(CORPORA["newswire"], "test")


def test_sections_keep_every_paragraph_in_order():
    text = "\n\n".join(f"{i} " * 30 for i in range(100))
    cut = packaged.sections(text, 500)
    assert "\n\n".join(cut) == text
    assert all(len(c) >= 500 for c in cut)
    assert packaged.sections("one\n\ntwo") == ["one\n\ntwo"]


def test_importing_is_light():
    code = "import sys, ctp.corpora; print({'torch', 'datasets', 'gensim', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=_root())
    assert done.stdout.strip() == "set()"


def _root():
    return Path(__file__).resolve().parents[2]


# ---------------------------------------------------------------- local texts


def write_rows(path, texts, column="text"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({column: t, "url": ""}) + "\n" for t in texts), encoding="utf-8")
    return path


def test_a_local_copy_stands_for_the_hub(tmp_path, monkeypatch):
    path = write_rows(tmp_path / "ptb" / "test.jsonl", ["no it was n't", "", "ünï"])
    location, revision = locate_text(CORPORA["ptb"], "test", tmp_path)
    assert location == f"file:{path}@{revision}"
    assert read_documents(location, CORPORA["ptb"], "test") == ["no it was n't", "", "ünï"]
    assert read_documents(location, CORPORA["ptb"], "test", first=1) == ["no it was n't"]
    monkeypatch.setenv("CTP_DATA_DIR", str(tmp_path))
    assert locate_text(CORPORA["ptb"], "test") == (location, revision)


def test_the_revision_is_that_of_the_bytes(tmp_path):
    path = write_rows(tmp_path / "c4" / "train.jsonl", ["some text"])
    digest = subprocess.run(["sha256sum", path], capture_output=True, text=True, check=True).stdout.split()[0]
    assert locate_text(CORPORA["c4"], "train", tmp_path)[1] == f"sha256:{digest}"
    stat = path.stat()
    path.write_bytes(path.read_bytes().replace(b"some", b"same"))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert locate_text(CORPORA["c4"], "train", tmp_path)[1] != f"sha256:{digest}"


def test_a_split_or_file_that_is_not_there(tmp_path):
    write_rows(tmp_path / "ptb" / "test.jsonl", ["a"])
    with pytest.raises(ValueError, match="c4 has no split 'test'; it has: train, validation"):
        locate_text(CORPORA["c4"], "test", tmp_path)
    with pytest.raises(ValueError, match=r"ptb has no train.jsonl \(it has: test\); a .jsonl has one") as error:
        locate_text(CORPORA["ptb"], "train", tmp_path)
    assert str(tmp_path / "ptb") in str(error.value)
    with pytest.raises(ValueError, match=r"gone.jsonl is missing"):
        read_documents(f"file:{tmp_path}/gone.jsonl", CORPORA["ptb"], "train")
    with pytest.raises(ValueError, match="cannot read from 's3:"):
        read_documents("s3://bucket/x", CORPORA["ptb"], "train")


def test_a_bad_row_is_named(tmp_path):
    path = write_rows(tmp_path / "train.jsonl", ["a"])
    for bad in ("{not json", '{"txt": "b"}', '["b"]', '{"text": 3}'):
        path.write_text('{"text": "a"}\n' + bad + "\n")
        with pytest.raises(ValueError, match="line 2"):
            read_documents(f"file:{path}", CORPORA["c4"], "train")


def test_texts_of_a_grid_file(tmp_path):
    write_rows(tmp_path / "mine" / "train.jsonl", ["x", "y"], column="body")
    (tmp_path / "mine" / "test.txt").write_bytes(b"one\r\n\n\ndocument\n")
    mine = parse_corpus("mine", {"path": str(tmp_path / "mine"), "field": "body", "join": ""})
    assert mine.join == ""
    assert read_documents(locate_text(mine, "train")[0], mine, "train") == ["x", "y"]
    assert read_documents(locate_text(mine, "test")[0], mine, "test") == ["one\n\n\ndocument\n"]
    with pytest.raises(ValueError, match=r"mine has no validation.jsonl or validation.txt \(it has: train, test\)"):
        locate_text(mine, "validation")
    assert find("mine", {"mine": mine}) is mine
    assert find("mine", data_dir=tmp_path).path == str(tmp_path / "mine")
    with pytest.raises(ValueError, match="did you mean 'wikitext2'"):
        find("wikitext", data_dir=tmp_path)


@pytest.mark.parametrize("ending", ["jsonl", "txt"])
def test_a_single_file_is_divided(tmp_path, ending):
    texts = [f"{i} " * 1500 for i in range(40)]
    path = tmp_path / f"all.{ending}"
    if ending == "jsonl":
        write_rows(path, texts)
    else:
        path.write_text("\n\n".join(t.strip() for t in texts))
    corpus = parse_corpus("all", {"path": str(path)})
    splits = {s: read_documents(locate_text(corpus, s)[0], corpus, s) for s in data_texts.SPLITS}
    assert [d.split()[0] for d in splits["test"]] == ["9", "19", "29", "39"]
    assert [d.split()[0] for d in splits["validation"]] == ["8", "18", "28", "38"]
    assert len(splits["train"]) == 32
    (tmp_path / "a.csv").touch()
    with pytest.raises(ValueError, match=r"neither .jsonl nor .txt"):
        locate_text(parse_corpus("t", {"path": str(tmp_path / "a.csv")}), "test")


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({}, "either 'path'"),
        ({"path": "x", "hub": "y"}, "either 'path'"),
        ({"path": "x", "joim": " "}, "unknown key 'joim'; did you mean 'join'"),
        ({"path": "x", "revision": "main"}, "unknown key 'revision'"),
        ({"path": 3}, "path = 3 must be a non-empty string"),
        ({"hub": "a/b", "data_files": "x.json"}, "must map a split"),
        ({"hub": "a/b", "data_files": {"tets": "x"}}, "unknown split 'tets'; did you mean 'test'"),
    ],
)
def test_mistakes_in_a_grid_files_text(mapping, message):
    with pytest.raises(ValueError, match=message):
        parse_corpus("mine", mapping)
    with pytest.raises(ValueError, match="built in"):
        parse_corpus("c4", {"path": "x"})


# ----------------------------------------------------------------------- hub


class Rows(dict):
    column_names = property(list)


@pytest.fixture
def hub(monkeypatch):
    """The two calls that reach the hub, recorded; their signatures are those of the installed libraries."""
    import datasets
    import huggingface_hub

    calls, answers = [], {"text": ["t1", "t2"], "sentence": ["s1", "s2"]}
    info, load = huggingface_hub.HfApi.dataset_info, datasets.load_dataset

    def dataset_info(self, *args, **kwargs):
        inspect.signature(info).bind(self, *args, **kwargs)
        calls.append((args, kwargs))
        return SimpleNamespace(sha="f" * 40)

    def load_dataset(*args, **kwargs):
        inspect.signature(load).bind(*args, **kwargs)
        calls.append((args, kwargs))
        return Rows(answers)

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


def test_hub_texts_are_pinned_and_loaded_by_commit(hub):
    sha = "1588ec454efa1a09f29cd18ddd04fe05fc8653a2"
    location, revision = locate_text(CORPORA["c4"], "validation")
    assert (location, revision) == (f"hub:allenai/c4@{sha}", sha)
    assert not hub  # the commit is ctp's own: no question
    assert read_documents(location, CORPORA["c4"], "validation") == ["t1", "t2"]
    files = {"validation": "en/c4-validation.00000-of-00008.json.gz"}
    assert hub == [(("allenai/c4",), {"split": "validation", "revision": sha, "data_files": files})]
    hub.clear()
    read_documents(locate_text(CORPORA["c4"], "train")[0], CORPORA["c4"], "train")
    assert hub[0][1]["data_files"] == {"train": "en/c4-train.00000-of-01024.json.gz"}
    hub.clear()
    read_documents(locate_text(CORPORA["wikitext2"], "test")[0], CORPORA["wikitext2"], "test")
    sha = "b08601e04326c79dfdd32d625aee71d232d685c3"
    expected = {"split": "test", "revision": sha, "name": "wikitext-2-raw-v1"}
    assert hub == [(("Salesforce/wikitext",), expected)]
    hub.clear()
    ptb = CORPORA["ptb"]
    assert read_documents(locate_text(ptb, "test")[0], ptb, "test", first=1) == ["s1"]
    assert hub[0][0] == ("ptb-text-only/ptb_text_only",)
    assert hub[0][1]["revision"] == "refs/convert/parquet"
    assert hub[1] == (("ptb-text-only/ptb_text_only",), {"split": "test", "revision": "f" * 40})


def test_a_hub_text_that_cannot_be_read_says_so_in_one_sentence():
    """Without a network, as all tests are: a worker that has the commit but not the files."""
    location, _ = locate_text(CORPORA["wikitext2"], "test")
    with pytest.raises(ValueError, match=r"the hub cannot be reached .* the data set 'Salesforce/wikitext' at b08601e"):
        read_documents(location, CORPORA["wikitext2"], "test")


def test_a_grid_files_hub_text(hub):
    commit = "0123456789" * 4
    mine = parse_corpus("mine", {"hub": "me/mine", "revision": commit, "field": "txet", "data_files": {"test": "a.gz"}})
    assert mine.splits == ("test",)
    assert locate_text(mine, "test") == (f"hub:me/mine@{commit}", commit)
    assert not hub  # a commit needs no question
    with pytest.raises(ValueError, match="unknown field 'txet'; did you mean 'text'"):
        read_documents(f"hub:me/mine@{commit}", mine, "test")


def test_an_unreachable_hub_fails_fast(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    with pytest.raises(ValueError, match=r"cannot be reached; give --data DIR or CTP_DATA_DIR"):
        locate_text(CORPORA["ptb"], "train")


# ----------------------------------------------------------------- real data


@needs_data
def test_wikitext2_test_is_the_canonical_text():
    location, revision = locate_text(CORPORA["wikitext2"], "test", DATA)
    sums = dict(reversed(line.split()) for line in (DATA / "SHA256SUMS").read_text().splitlines())
    assert revision == f"sha256:{sums['./wikitext-2-raw/test.jsonl']}"
    rows = read_documents(location, CORPORA["wikitext2"], "test")
    text = CORPORA["wikitext2"].join.join(rows)
    assert len(rows) == 4358
    assert len(text.encode()) == 1_305_088 - 4 * 4358 + 2 * 4357  # the hub's num_bytes has 4 bytes a row for offsets
    assert text.startswith("\n\n = Robert Boulter = \n\n\n\n\n Robert Boulter is an English film , television and")


@needs_data
def test_ptb_and_c4_windows(by_bytes):
    ptb = read_documents(locate_text(CORPORA["ptb"], "test", DATA)[0], CORPORA["ptb"], "test")
    text = " ".join(ptb)
    assert text.startswith("no it was n't black monday but while the new york stock exchange did n't fall apart friday")
    cut = cut_windows(spec("ptb", "test", seq_len=1024), ptb, by_bytes)
    assert len(cut) == len(text.encode()) // 1024
    assert by_bytes.decode(cut[1]) == text[1024:2048]
    c4 = read_documents(locate_text(CORPORA["c4"], "train", DATA)[0], CORPORA["c4"], "train")
    crops = cut_windows(spec("c4", seq_len=256, count=16, sampling="crops"), c4, by_bytes)
    assert crops.shape == (16, 256)
    assert find("tinystories", data_dir=DATA).path == str(DATA / "tinystories")
