"""Texts in files: .jsonl with one document a line, and .txt. Errors name the line.

Both are UTF-8, read as Python's text mode reads them with the encoding `utf-8-sig`: a byte order mark at the beginning
is no text, and every line ends in "\\n", whether the file has LF, CRLF or CR.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from ctp.common.files import cache_dir, hashed_once, sha256_file, write_json

BOM = "\ufeff"


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes; of a .txt without its byte order mark and with line ends of LF.

    Remembered in this process while the file stays as it is.
    """

    def compute() -> str:
        data = path.read_bytes() if path.suffix == ".txt" else b""
        marked = data.startswith(BOM.encode()) or b"\r" in data
        return hashlib.sha256(decoded(path, data).encode()).hexdigest() if marked else sha256_file(path)

    return hashed_once("text", [path], compute)  # a grid names one file in many cells


def check_text(path: Path, column: str) -> None:
    """Raise ValueError, naming the line, unless a file is text and each of its lines a row (.jsonl) with text.

    Remembered on this machine by the file's digest.
    """
    digest = sha256(path)
    named = hashlib.sha256(f"{path.suffix} {column} {digest}".encode()).hexdigest()
    memo = cache_dir() / "texts" / f"{named}.json"
    if memo.exists():
        return
    if path.suffix == ".jsonl":
        documents = sum(1 for _ in rows(path, column))
    else:
        documents = int(bool(decoded(path, path.read_bytes()).strip()))
    if not documents:
        raise ValueError(f"{path} is empty: there is no text in it")
    write_json(memo, {"sha256": digest})


def decoded(path: Path, data: bytes) -> str:
    """The bytes of a file as text. Raises ValueError where they are not UTF-8, or binary."""
    try:
        text = data.decode()
    except UnicodeDecodeError as e:
        raise ValueError(f"{path}: byte {e.start:,} is {data[e.start]:#04x}: not UTF-8 text") from e
    text = text.removeprefix(BOM).replace("\r\n", "\n").replace("\r", "\n")
    if (at := text.find("\0")) >= 0:
        raise _binary(f"{path}, line {text.count(chr(10), 0, at) + 1}")
    return text


def rows(path: Path, column: str) -> Iterator[str]:
    """The documents of a .jsonl, in the field `column`. Raises ValueError, naming the line that has none."""
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as lines:  # bad bytes come as lone surrogates
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield _row(f"{path}, line {number}", line, column)


def _row(place: str, line: str, column: str) -> str:
    if not encodable(line):
        raise ValueError(f"{place}: not UTF-8 text")
    if "\0" in line:
        raise _binary(place)
    try:
        text = json.loads(line)[column]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f'{place}: no row {{"{column}": …}}') from error
    if not isinstance(text, str):
        raise ValueError(f"{place}: {column!r} is no text")
    if not encodable(text):
        lone = next(c for c in text if 0xD800 <= ord(c) < 0xE000)
        raise ValueError(f"{place}: {column!r} has half a character, the lone surrogate \\u{ord(lone):04x}")
    return text


def encodable(text: str) -> bool:
    """Has it no lone surrogates, which are half characters?"""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _binary(place: str) -> ValueError:
    return ValueError(f"{place}: a NUL character: not UTF-8 text, but UTF-16 or no text at all")
