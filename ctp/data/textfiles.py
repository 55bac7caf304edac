"""Texts in files: .jsonl with one document a line, and .txt. What is wrong with one is told with its place.

Both are UTF-8, read as Python's text mode reads them with the encoding `utf-8-sig`: a byte order mark at the beginning
is no text, and every line ends in "\\n", whether the file has LF, CRLF or CR.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

from ctp.common.files import cache_dir, changed, hashed_once, sha256_file, write_json
from ctp.data import packaged

BOM = "\ufeff"


def text_sha256(path: Path) -> str:
    """Hex digest of what is read from a file: of a .txt its text, so that line ends and a byte order mark do not count;
    of a .jsonl its bytes. It is the digest of the bytes where neither is there.
    """
    if path.suffix == ".txt" and _marked(path):
        return hashlib.sha256(decoded(path, path.read_bytes()).encode()).hexdigest()
    return sha256_file(path)


def check_text(path: Path, column: str, sha256: str) -> None:
    """Raise ValueError, naming the line, unless a file is text and each of its lines a row (.jsonl) with text.

    sha256: of the file, by which this machine remembers that it was looked at.
    """
    named = hashlib.sha256(f"{path.suffix} {column} {sha256}".encode()).hexdigest()
    memo = cache_dir() / "texts" / f"{named}.json"
    if memo.exists():
        return
    if path.suffix == ".jsonl":
        documents = sum(1 for _ in _rows(path, column))
    else:
        documents = int(bool(decoded(path, path.read_bytes()).strip()))
    if not documents:
        raise ValueError(f"{path} is empty: there is no text in it")
    write_json(memo, {"sha256": sha256})


def decoded(path: Path, data: bytes) -> str:
    """The bytes of a file as text. Raises ValueError where they are not UTF-8, or binary."""
    try:
        text = data.decode()
    except UnicodeDecodeError as e:
        raise ValueError(f"{path}: byte {e.start:,} is {data[e.start]:#04x}: not UTF-8 text") from e
    text = text.removeprefix(BOM).replace("\r\n", "\n").replace("\r", "\n")
    if (at := text.find("\0")) >= 0:
        raise ValueError(_binary(path, text.count("\n", 0, at) + 1))
    return text


def rows(path: Path, column: str) -> list[str]:
    """The documents of a .jsonl, which are in the field `column`. Raises ValueError naming the line that has none."""
    return list(_rows(path, column))


def _rows(path: Path, column: str) -> Iterator[str]:
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as lines:  # bad bytes come as lone surrogates
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield _row(f"{path}, line {number}", line, column)


def _row(place: str, line: str, column: str) -> str:
    if not encodable(line):
        raise ValueError(f"{place}: not UTF-8 text")
    if "\0" in line:
        raise ValueError(_binary(*place.rsplit(", line ", 1)))
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
    """Is it without lone surrogates, which are no characters?"""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _binary(path: Path | str, line: int | str) -> str:
    return f"{path}, line {line}: a NUL character: not UTF-8 text, but UTF-16 or no text at all"


def _marked(path: Path) -> bool:
    """Has a file a byte order mark, or line ends with CR?"""
    with path.open("rb") as file:
        start = file.read(3)
        return (
            start == BOM.encode()
            or b"\r" in start
            or any(b"\r" in part for part in iter(lambda: file.read(2**20), b""))
        )


PARTS_OF_FILE = 10
_PINNED = re.compile(r"(.*)@(sha256:[0-9a-f]{64})", re.DOTALL)


def pinned(place: str) -> tuple[str, str]:
    """(location, revision) of `file:PATH`, `divide:PATH` (one file for all splits) or `package:NAME`, as it is now.

    Raises ValueError where the package is not installed, OSError where there is no such file.
    """
    revision = _revision(place)
    return f"{place}@{revision}", revision


def place(location: str) -> str:
    """A location without its revision."""
    found = _PINNED.fullmatch(location)
    return found[1] if found else location


def _revision(place: str) -> str:
    """What pins the text of a file or package as it is now."""
    scheme, _, path = place.partition(":")
    if scheme == "package":
        return packaged.fingerprint(path)
    digest = sha256(Path(path))
    if scheme == "divide":
        digest = hashlib.sha256(f"{digest} {packaged.VERSION} {PARTS_OF_FILE}".encode()).hexdigest()
    return f"sha256:{digest}"


def sha256(path: Path) -> str:
    """`text_sha256`, remembered in this process while the file stays as it is: a grid names one file in many cells."""
    return hashed_once("text", [path], lambda: text_sha256(path))


def pinned_files(location: str) -> list[Path]:
    """The file that a location names; none where it is on the hub or in a package."""
    scheme, _, path = place(location).partition(":")
    return [Path(path)] if scheme in ("file", "divide") else []


def check_pinned(location: str) -> None:
    """Raises Changed, in one sentence, where the text at a location that `locate` gave is no more what was pinned."""
    if (found := _PINNED.fullmatch(location)) is None:
        return  # the hub's commits are exact
    what = f"the text {found[1].partition(':')[2]}"
    try:
        now = _revision(found[1])
    except FileNotFoundError:
        return  # its reader says so
    except OSError as e:
        raise changed(what, e.strerror or str(e)) from e
    if now != found[2]:
        raise changed(what, f"it was {found[2][:19]}, it is {now[:19]}")
