"""The exit codes of every command line."""

import sys
from enum import IntEnum

from ctp.common.messages import one_line
from ctp.common.redact import scrub


class Exit(IntEnum):
    OK = 0
    FAILED = 1
    USAGE = 2
    UNREACHABLE = 3
    RAY_LOST = 4
    INTERRUPTED = 130
    BROKEN_PIPE = 141
    TERMINATED = 143


MEANING = {
    Exit.OK: "everything is done",
    Exit.FAILED: "something failed, or is missing, damaged or worse than the paper",
    Exit.USAGE: "bad usage, or a mistake in a grid file: nothing was started",
    Exit.UNREACHABLE: "the store, MLflow or the hub cannot be reached",
    Exit.RAY_LOST: "a process that Ray needs died: the same command goes on from there",
    Exit.INTERRUPTED: "interrupted (Ctrl-C): the same command goes on from there",
    Exit.BROKEN_PIPE: "the output pipe was closed",
    Exit.TERMINATED: "terminated (SIGTERM): the same command goes on from there",
}
AT_ONCE = (Exit.RAY_LOST, Exit.INTERRUPTED, Exit.TERMINATED)  # else Ray's exit handlers would wait for its workers


def epilog(*codes: Exit) -> str:
    """The exit codes of a command in one sentence, for its --help."""
    return f"Exit codes: {'; '.join(f'{code} {MEANING[code]}' for code in codes)}."


def fail(code: Exit, *lines: str) -> Exit:
    """Print the lines as errors; returns the code."""
    for line in lines:
        print(f"error: {one_line(scrub(line))}", file=sys.stderr)
    return code


def stopped(code: Exit) -> Exit:
    """Print that a signal ended the run; returns the code."""
    print(f"{code.name.lower()}; running the same command again goes on from here", file=sys.stderr)
    return code
