"""Files of text are read as Python reads them, wherever they were written, or refused with their line."""

import hashlib
import json

import pytest
from support.tiny import tiny_llama
from support.tinygrid import byte_tokenizer

from ctp import api
from ctp.data.documents import locate_text, read_documents
from ctp.data.texts import parse_corpus

LINES = [f"Line {i}, é ü 😀 and so on." for i in range(40)]
PLAIN = "\n\n".join(LINES).encode()
ROWS = [json.dumps({"text": f"{line}\nand more"}).encode() for line in LINES]
BOM = b"\xef\xbb\xbf"


def read(file, split="train"):
    """(revision, documents) of a file, or of a folder with it."""
    corpus = parse_corpus("own", {"path": str(file)})
    location, revision = locate_text(corpus, split)
    return revision, read_documents(location, corpus, split)


def written(path, content):
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("end", [b"\r\n", b"\r"], ids=["crlf", "cr"])
@pytest.mark.parametrize("mark", [BOM, b""], ids=["bom", "plain"])
def test_a_txt_is_its_text_whatever_its_line_ends(tmp_path, end, mark):
    plain = written(tmp_path / "plain.txt", PLAIN)
    other = written(tmp_path / "other.txt", mark + PLAIN.replace(b"\n", end))
    assert read(other) == read(plain)  # same text, same revision
    folders = [written(tmp_path / p.stem / "train.txt", p.read_bytes()).parent for p in (plain, other)]
    assert read(folders[1]) == read(folders[0])
    assert read(folders[0]) == (f"sha256:{hashlib.sha256(PLAIN).hexdigest()}", [PLAIN.decode()])


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"], ids=["lf", "crlf", "cr"])
@pytest.mark.parametrize("mark", [BOM, b""], ids=["bom", "plain"])
def test_a_jsonl_has_its_rows_whatever_its_line_ends(tmp_path, end, mark):
    content = mark + end.join(ROWS) + end
    revision, documents = read(written(tmp_path / "own" / "train.jsonl", content).parent)
    assert documents == [f"{line}\nand more" for line in LINES]
    assert revision == f"sha256:{hashlib.sha256(content).hexdigest()}"


def test_other_separators_end_no_line(tmp_path):
    text = "a\u2028b\x0bc\x0cd\x85e\ufefff"
    rows = json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n"
    assert read(written(tmp_path / "own" / "train.jsonl", rows).parent)[1] == [text]
    assert read(written(tmp_path / "txt" / "train.txt", text.encode()).parent)[1] == [text]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("own.jsonl", b"\n".join([*ROWS, rb'{"text": "lone \ud83d half"}']),
         r"own\.jsonl, line 41: 'text' has half a character, the lone surrogate \\ud83d"),
        ("own.jsonl", rb'{"text": "\udc00\ud800"}', r"own\.jsonl, line 1: .*surrogate \\udc00"),
        ("own.jsonl", b'{"text": "\xed\xa0\xbd"}', r"own\.jsonl, line 1: not UTF-8 text"),
        ("own.jsonl", "\n".join(["{}", "{}"]).encode("utf-16"), r"own\.jsonl, line 1: not UTF-8 text"),
        ("own.jsonl", b'{"text": "a"}'.decode().encode("utf-16-le"), r"own\.jsonl, line 1: a NUL character"),
        ("own.jsonl", BOM, r"own\.jsonl is empty"),
        ("own.txt", BOM + b"\r\n", r"own\.txt is empty"),
        ("own.txt", b"ab\ncd\r\ne\0f", r"own\.txt, line 3: a NUL character"),
        ("own.txt", "text".encode("utf-16-be"), r"own\.txt, line 1: a NUL character"),
        ("own.txt", b"text \xed\xa0\xbd", r"own\.txt: byte 5 is 0xed: not UTF-8 text"),
    ],
)  # fmt: skip
def test_what_is_no_text_is_refused_while_planning(tmp_path, name, content, said):
    for _ in range(2):  # what was refused once is looked at again
        with pytest.raises(ValueError, match=said):
            read(written(tmp_path / name, content))


def test_a_pair_of_escapes_is_one_character_and_an_escaped_nul_is_text(tmp_path):
    rows = b"\n".join([rb'{"text": "\ud83d\ude00"}', rb'{"text": "a\u0000b"}'])
    assert read(written(tmp_path / "own" / "train.jsonl", rows).parent)[1] == ["😀", "a\0b"]


def test_half_a_character_from_python():
    with pytest.raises(ValueError, match=r"texts\[1\] has half a character"):
        api.compress(tiny_llama(vocab=257), byte_tokenizer(), {"method": "gptq", "bits": 4}, ["a" * 99, "\ud83d"])
