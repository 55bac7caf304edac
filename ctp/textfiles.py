"""Texts in files: .jsonl with one document a line, and .txt. What is wrong with one is told with its place."""

import codecs
import json
from pathlib import Path


def check_text(path: Path, column: str, most: int = 2**20) -> None:
    """Raise ValueError where a file's first `most` bytes are no text, or its first line is no row."""
    with path.open("rb") as file:
        data = file.read(most)
    start = decoded(path, data, whole=len(data) < most)
    if not start.strip():
        raise ValueError(f"{path} is empty: there is no text in it")
    if path.suffix == ".jsonl" and (len(data) < most or "\n" in start):
        number, line = next((i, x) for i, x in enumerate(start.split("\n"), 1) if x.strip())
        _row(path, number, line, column)


def decoded(path: Path, data: bytes, whole: bool = True) -> str:
    """The bytes of a file as text. whole: nothing follows them. Raises ValueError where they are not UTF-8."""
    try:
        return codecs.getincrementaldecoder("utf-8")().decode(data, final=whole)
    except UnicodeDecodeError as e:
        raise ValueError(f"{path}: byte {e.start:,} is {data[e.start]:#04x}: not UTF-8 text") from e


def rows(path: Path, column: str) -> list[str]:
    """The documents of a .jsonl, which are in the field `column`. Raises ValueError naming the line that has none."""
    texts = []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                texts.append(_row(path, number, line, column))
    return texts


def _row(path: Path, number: int, line: str | bytes, column: str) -> str:
    try:
        text = json.loads(line)[column]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}, line {number}: not UTF-8 text") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f'{path}, line {number}: no row {{"{column}": …}}') from error
    if not isinstance(text, str):
        raise ValueError(f"{path}, line {number}: {column!r} is no text")
    return text
