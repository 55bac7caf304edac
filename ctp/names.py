"""Saying what name is wrong, and which one was probably meant."""

import difflib
from collections.abc import Iterable


def unknown(what: str, name: object, allowed: Iterable[str]) -> str:
    """One sentence: the wrong name, the nearest right one, all that are allowed."""
    names = sorted(map(str, allowed))
    near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    return f"unknown {what} {name!r}{hint} Allowed: {', '.join(names)}"
