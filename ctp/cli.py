"""`ctp COMMAND …`: every command line of ctp and of its analysis under one name.

A command is a module with `main(argv) -> exit code` and `parser()`. It is imported when the command is named, so that
`ctp --help` is fast. `python -m MODULE` is the same command.
"""

import argparse
import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from types import ModuleType

from ctp.common.exit_codes import AT_ONCE, MEANING, Exit
from ctp.common.terminal import unread


@dataclass(frozen=True)
class Command:
    """module: whose `main` it is; `python -m` takes the name `called`."""

    module: str
    called: str
    help: str


def _analysis() -> str:
    """The package that reads what has run: within ctp where that is installed, beside it in a checkout."""
    return "ctp.analysis" if find_spec("ctp.analysis") else "analysis"


ANALYSIS = _analysis()
COMMANDS: dict[str, dict[str, Command]] = {
    "run": {
        "grid": Command("ctp.grid", "ctp.grid", "plan a grid and run what is missing of it"),
        "store": Command("ctp.store", "ctp.store", "what a store holds, and how to get it out"),
        "track": Command("ctp.track", "ctp.track", "write into MLflow what it lacks of the store"),
        "corpora": Command("ctp.corpora", "ctp.corpora", "local copies of texts and tasks, for machines off the net"),
    },
    "read what has run, from MLflow": {
        "matrix": Command(f"{ANALYSIS}.transfer_matrix", f"{ANALYSIS}.transfer_matrix", "perplexity, source x target"),
        "tables": Command(f"{ANALYSIS}.tables", f"{ANALYSIS}.tables", "the paper's tables, ours beside theirs"),
        "figures": Command(f"{ANALYSIS}.figures", f"{ANALYSIS}.figures", "the paper's figures, PNG and PDF"),
        "compare": Command(f"{ANALYSIS}.compare", f"{ANALYSIS}.compare", "a verdict on every number of the paper"),
        "report": Command(f"{ANALYSIS}.report.page", f"{ANALYSIS}.report", "all of it as one HTML file"),
    },
    "set up": {
        "completion": Command("ctp.completion", "ctp.completion", "what a shell needs to complete these by Tab"),
    },
}
ALL = {name: command for group in COMMANDS.values() for name, command in group.items()}

ABOUT = f"""\
exit codes:
{"".join(f"  {code:<5}{meaning}{chr(10)}" for code, meaning in MEANING.items())}
environment:
  CTP_STORE            where artifacts go (--store)       CTP_DATA_DIR    local texts and tasks (--data)
  CTP_CACHE            what can be made again; else       HF_HOME         models and texts from the hub
                       XDG_CACHE_HOME/ctp, ~/.cache/ctp   HF_TOKEN        for gated models
  MLFLOW_TRACKING_URI  else mlflow.db beside the store    RAY_ADDRESS     a cluster to join (--address)

In a pipe, output is plain text. On a terminal a running grid is a live view; NO_COLOR removes its colours.
`ctp COMMAND --help` lists its options."""


def entry() -> int:
    """What the script `ctp` calls."""
    code = main()
    sys.stdout.flush()
    if code in AT_ONCE:
        os._exit(code)
    return code


@unread
def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code. Raises SystemExit where argparse does."""
    given = sys.argv[1:] if argv is None else argv
    root = parser()
    if not given:
        root.print_help(sys.stderr)
        return Exit.USAGE
    name = root.parse_args(given[:1]).command
    try:
        with named(name, given[1:]):
            return int(load(ALL[name]).main(given[1:]))
    except KeyboardInterrupt:
        return Exit.INTERRUPTED


def parser() -> argparse.ArgumentParser:
    """The parser of `ctp COMMAND`, without what follows the command."""
    p = argparse.ArgumentParser(
        prog="ctp", formatter_class=argparse.RawDescriptionHelpFormatter, epilog=ABOUT, description=_description(),
        usage="ctp [-h] [--version] COMMAND …",
    )  # fmt: skip
    p.add_argument("--version", action="version", version=f"ctp {version('ctp')}")
    p.add_argument("command", metavar="COMMAND", choices=ALL, help=argparse.SUPPRESS)
    return p


def _description() -> str:
    lines = ["Compress, Then Prompt: compress language models, win the quality back with soft prompts, measure how it "
             "transfers."]  # fmt: skip
    for title, commands in COMMANDS.items():
        lines += ["", f"{title}:", *(f"  {name:<11} {command.help}" for name, command in commands.items())]
    return "\n".join(lines)


@contextmanager
def named(name: str, argv: list[str]) -> Iterator[None]:
    """Inside, the program is called `ctp NAME`: in help and errors, and in the command that MLflow gets."""
    before, sys.argv = sys.argv, [f"ctp {name}", *argv]
    try:
        yield
    finally:
        sys.argv = before


def load(command: Command) -> ModuleType:
    """Its module. Raises SystemExit in one sentence where a package that it needs is not installed."""
    try:
        return importlib.import_module(command.module)
    except ModuleNotFoundError as e:
        raise SystemExit(f"error: {command.called} needs {e.name}, which is not installed") from e
