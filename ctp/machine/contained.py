"""Methods that end the process they run in: by os._exit, or by a crash of native code."""

import faulthandler
import hashlib
import os
import re
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path


class MethodEnded(BaseException):
    """A method called os._exit, or its last try crashed the process."""


@contextmanager
def contained(run: str = "", k: str = "") -> Iterator[None]:
    """In here os._exit raises MethodEnded in this thread, and a fatal signal leaves a note on this machine.

    run: a word of the run, empty for no note. Raises MethodEnded where the note of an earlier try in this run says that
    the cell crashed its process.
    """
    here, leave = (os.getpid(), threading.get_ident()), os._exit

    def refuse(code: int) -> None:
        if (os.getpid(), threading.get_ident()) != here:  # a fork's, or another thread's
            leave(code)
        raise MethodEnded(f"os._exit({code})")

    os._exit = refuse  # type: ignore[assignment]
    try:
        with _noted(_note(run, k)) if run else nullcontext():
            yield
    finally:
        os._exit = leave


def _note(run: str, k: str) -> Path:
    return Path(tempfile.gettempdir(), f"ctp-crash-{hashlib.sha256(f'{run} {k}'.encode()).hexdigest()[:24]}")


@contextmanager
def _noted(note: Path) -> Iterator[None]:
    """Python writes a fatal signal into the note; a clean exit removes it. A process that was killed from outside, for
    memory, leaves it empty."""
    text = ""
    with suppress(FileNotFoundError):
        text = note.read_text(errors="replace")
    note.unlink(missing_ok=True)
    if text.strip():
        raise MethodEnded(crash(text))
    with os.fdopen(os.open(note, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        faulthandler.enable(file, all_threads=False)
        try:
            yield
        finally:
            faulthandler.disable()
            with suppress(Exception):  # as Ray has it; standard error may be no file
                faulthandler.enable(sys.__stderr__ or sys.stderr, all_threads=False)
            note.unlink(missing_ok=True)


def crash(text: str) -> str:
    """One line of what Python wrote of a fatal signal: which, and where in Python's code."""
    what = re.search(r"Fatal Python error: ([^\n]+)", text)
    where = re.search(r'File "([^"]+)", line (\d+) in (\S+)', text)
    at = f" in {where[3]} ({where[1]}, line {where[2]})" if where else ""
    return f"{what[1] if what else 'a fatal signal'}{at}"
