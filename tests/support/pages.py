"""Markdown pages read as programs: their marked blocks are run in one folder, in the order in which they stand.

```yaml file=NAME      written to NAME; python and others likewise
```python              executed; a page is one program, and shares its names
```python elsewhere    not executed: it needs what is not here
```sh run              commands, one a line: those of ctp in this process, others by bash
```text shows          lines that the command before printed, but for numbers and keys; "…" stands for any lines
```filter              an MLflow filter that finds runs of the grid `demo`
"""

import contextlib
import io
import re
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path

import mlflow

from ctp import cli

FENCE = re.compile(r"^```(\w*)[ ]?([^\n]*)\n(.*?)^```$", re.S | re.M)
LONGER = re.compile(r"\d+ min \d+ s|\d+ h \d+ min")  # on a machine that is busy
NUMBER = re.compile(r"\b[0-9a-f]{12}\b|[-+]?\d[\d,.]*(e[-+]?\d+)?")  # keys too: texts differ by Python


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, what follows it on its first line, its text, its line in the page."""

    language: str
    info: str
    text: str
    line: int


def blocks(page: Path) -> list[Block]:
    """Every fenced block of a page, in order."""
    whole = page.read_text()
    return [Block(m[1], m[2].strip(), m[3], whole[: m.start()].count("\n") + 1) for m in FENCE.finditer(whole)]


class Reader:
    """Runs blocks. names: what Python blocks see at first; changes: text -> what stands for it in every block."""

    def __init__(self, names=None, changes=None):
        self.names = {"__name__": "page", **(names or {})}
        self.changes = changes or {}
        self.printed = ""

    def read(self, block: Block) -> bool:
        """Do what the block's mark says; False where it has none. Raises AssertionError where it is not so."""
        text = block.text
        for old, new in self.changes.items():
            text = text.replace(old, new)
        if block.info.startswith("file="):
            path = Path(block.info.removeprefix("file="))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        elif block.info == "shows":
            compare(text, self.printed)
        elif block.info == "run":
            self.printed = "".join(shell(line) for line in text.replace("\\\n", " ").splitlines() if line.strip())
        elif block.language == "python" and block.info != "elsewhere":
            self.python(text, block.line)
        elif block.language == "filter":
            found = mlflow.search_runs(experiment_names=["demo"], filter_string=" ".join(text.split()))
            assert len(found), f"no run: {text}"
        else:
            return False
        return True

    def python(self, text: str, line: int) -> None:
        """Execute with the page's names, lines counted as in the page."""
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile("\n" * line + text, "page", "exec"), self.names)
        self.printed = out.getvalue()


def compare(shown: str, printed: str) -> None:
    """Every line that is shown was printed, numbers aside, in that order; "…" skips some."""
    lines = iter([plain(line) for line in printed.splitlines()])
    for line in shown.splitlines():
        if line.strip() not in ("", "…"):
            assert plain(line) in lines, f"{line!r} was not printed, or not in this place:\n{printed}"


def plain(line: str) -> str:
    """Numbers and keys are 0, and any space is one space."""
    return " ".join(NUMBER.sub("0", LONGER.sub("0 s", line)).split())


def shell(line: str) -> str:
    """What one command prints; the exit code must be 0."""
    words = shlex.split(line, comments=True)
    if words[:1] != ["ctp"] or "|" in words or ">" in words:
        done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = cli.main(words[1:])
    assert code == 0, f"{line}: exit code {code}\n{out.getvalue()}"
    return out.getvalue()
