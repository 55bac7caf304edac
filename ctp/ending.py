"""How a command line ends whose reader goes away, as in `… | head`."""

import functools
import os
import select
import sys
from collections.abc import Callable

BROKEN_PIPE = 141  # what shells call SIGPIPE


def unread(main: Callable[[list[str] | None], int]) -> Callable[..., int]:
    """A `main(argv) -> exit code` that returns BROKEN_PIPE, in silence, once nobody reads its standard output on.

    A pipe or connection of its own that breaks still raises BrokenPipeError.
    """

    @functools.wraps(main)
    def heeding(argv: list[str] | None = None) -> int:
        try:
            try:
                return main(argv)
            finally:
                sys.stdout.flush()
        except BrokenPipeError:
            if not reader_gone():
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at the end
            return BROKEN_PIPE

    return heeding


def reader_gone() -> bool:
    """Whether standard output is a pipe that nobody reads."""
    try:
        place = sys.stdout.fileno()
    except (OSError, ValueError):  # a text in memory, or closed
        return False
    asked = select.poll()
    asked.register(place, 0)  # errors are told whatever is asked
    return bool(asked.poll(0))
