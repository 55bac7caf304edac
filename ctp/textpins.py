"""What pins a text: a hash of the file or package that it lies in, which is a part of its location."""

import hashlib
import re
import time
from pathlib import Path

from ctp import packaged_text
from ctp.cache import Stamp, changed, settled, stamps
from ctp.textfiles import text_sha256

PARTS_OF_FILE = 10
_PINNED = re.compile(r"(.*)@(sha256:[0-9a-f]{64})", re.DOTALL)
_hashes: dict[tuple[Stamp, ...], str] = {}  # a grid names one file in many cells


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
        return packaged_text.fingerprint(path)
    digest = sha256(Path(path))
    if scheme == "divide":
        digest = hashlib.sha256(f"{digest} {packaged_text.VERSION} {PARTS_OF_FILE}".encode()).hexdigest()
    return f"sha256:{digest}"


def sha256(path: Path) -> str:
    """`textfiles.text_sha256`, remembered in this process while the file stays as it is."""
    seen, now = stamps([path]), time.time_ns()
    if seen in _hashes:
        return _hashes[seen]
    found = text_sha256(path)
    if settled(seen, now):
        _hashes[seen] = found
    return found


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
