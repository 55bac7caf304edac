"""Text for the terminal: columns, sizes, durations; and what a command line does once its output pipe is closed."""

import functools
import os
import select
import sys
from collections.abc import Callable, Collection, Sequence

from ctp.common.exit_codes import Exit


def aligned(rows: Sequence[Sequence[str]], left: Collection[int]) -> list[str]:
    """One line a row; the columns in `left` begin together, the others end together."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            v.ljust(w) if i in left else v.rjust(w) for i, (v, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def size(n: float) -> str:
    """157.2 MB: bytes in powers of 1000."""
    for unit in ("B", "KB", "MB", "GB"):
        if n < 1000:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    return f"{n:.1f} TB"


def program(module: str) -> str:
    """What a module's command line is called: `ctp NAME` where ctp.cli runs it, else `python -m MODULE`."""
    return sys.argv[0] if sys.argv[0].startswith("ctp ") else f"python -m {module}"


def unread(main: Callable[[list[str] | None], int]) -> Callable[..., int]:
    """A `main(argv) -> exit code` that returns BROKEN_PIPE, in silence, where the pipe it prints to was closed.

    Any other pipe or connection that breaks still raises BrokenPipeError.
    """

    @functools.wraps(main)
    def wrapped(argv: list[str] | None = None) -> int:
        try:
            try:
                return main(argv)
            finally:
                sys.stdout.flush()
        except BrokenPipeError:
            if not reader_gone():
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at the end
            return Exit.BROKEN_PIPE

    return wrapped


def reader_gone() -> bool:
    """Whether standard output is a pipe that nobody reads."""
    closed = select.poll()
    try:
        closed.register(sys.stdout.fileno(), 0)  # errors are reported whatever events are requested
    except (OSError, ValueError):  # a text in memory, or closed
        return False
    return bool(closed.poll(0))


def duration(seconds: float) -> str:
    """3.2 s, 4 min 05 s, 2 h 07 min, 3 d 04 h."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    days, rest = divmod(minutes, 24 * 60)
    return f"{days:,} d {rest // 60:02d} h"
