"""Names, values and errors of other libraries in one short line of a message."""

import difflib
from collections.abc import Iterable, Sequence

LONGEST = 120  # characters of a value that an error shows
LINE = 1500  # characters of an error


def shown(value: object) -> str:
    """`repr` of a value, of a long one both ends."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an int of thousands of digits; a list within itself
        text = f"<{type(value).__name__}, too large to show>"
    if len(text) <= LONGEST:
        return text
    return f"{text[: LONGEST // 2]} … {text[-LONGEST // 4 :]} ({len(text):,} characters)"


def one_line(text: str) -> str:
    """A message in one line, of a long one both ends: line breaks are spaces, control characters are written out."""
    text = " ".join(plain(text).split())
    return text if len(text) <= LINE else f"{text[: 2 * LINE // 3]} … {text[-LINE // 3 :]}"


def plain(text: str) -> str:
    """A text that does nothing to the terminal it is printed on: control characters but line breaks are written out."""
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)


def brief(error: BaseException) -> str:
    """What an error of another library says, in one line of some hundred characters."""
    text = " ".join(str(error).split())
    text = text if len(text) <= 300 else f"{text[:300]} …"
    kind = type(error).__name__
    return text if text and kind == "ValueError" else f"{kind}: {text}" if text else kind


def brief_list(names: Sequence[str]) -> str:
    """The first of the names, and how many there are besides."""
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def unknown(what: str, name: object, allowed: Iterable[str]) -> str:
    """One sentence: the wrong name, the nearest right one, all that are allowed."""
    names = sorted(map(str, allowed))
    near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    return f"unknown {what} {shown(name)}{hint} Allowed: {', '.join(names)}"
