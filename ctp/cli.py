"""`ctp COMMAND …`: every command line of ctp and of its analysis under one name.

A command is a module with a `main(argv) -> exit code` of its own, which is imported when the command is named: `ctp
--help` waits for nothing. `python -m MODULE` does the same without the name.
"""

import argparse
import contextlib
import importlib
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from ctp.common.terminal import unread

USAGE, LOST, INTERRUPTED, TERMINATED = 2, 4, 130, 143

Main = Callable[[list[str]], int]


@dataclass(frozen=True)
class Command:
    """module: whose `main` it is; `python -m` takes the name `called`."""

    module: str
    called: str
    help: str


COMMANDS: dict[str, dict[str, Command]] = {
    "run": {
        "grid": Command("ctp.grid", "ctp.grid", "plan a grid and run what is missing of it"),
        "store": Command("ctp.store", "ctp.store", "what a store holds, and how to get it out"),
        "track": Command("ctp.track", "ctp.track", "write into MLflow what it lacks of the store"),
        "corpora": Command("ctp.corpora", "ctp.corpora", "local copies of texts and tasks, for machines off the net"),
    },
    "read what has run, from MLflow": {
        "matrix": Command("analysis.transfer_matrix", "analysis.transfer_matrix", "perplexities, source x target"),
        "tables": Command("analysis.tables", "analysis.tables", "the paper's tables, ours beside theirs"),
        "figures": Command("analysis.figures", "analysis.figures", "the paper's figures, PNG and PDF"),
        "compare": Command("analysis.compare", "analysis.compare", "a verdict on every number of the paper"),
        "report": Command("analysis.report.page", "analysis.report", "all of it as one HTML file"),
    },
    "set up": {
        "completion": Command("ctp.completion", "ctp.completion", "what a shell needs to complete these by Tab"),
    },
}
ALL = {name: command for group in COMMANDS.values() for name, command in group.items()}

ABOUT = """\
exit codes:
  0    all is done                      2    bad usage, or a mistake in a grid file: nothing was started
  1    some cells failed, or a number   3    store, MLflow or hub cannot be reached
       is missing, damaged or worse     4    a process of Ray's died: the same command goes on
                                        130, 143  interrupted, terminated: the same command goes on
  (tables, figures, matrix and report: 1 where there is nothing to read; compare: 2)

environment:
  CTP_STORE            where artifacts go (--store)       CTP_DATA_DIR    local texts and tasks (--data)
  CTP_CACHE            what can be made again; else       HF_HOME         models and texts from the hub
                       XDG_CACHE_HOME/ctp, ~/.cache/ctp   HF_TOKEN        for gated models
  MLFLOW_TRACKING_URI  else mlflow.db beside the store    RAY_ADDRESS     a cluster to join (--address)

In a pipe, output is plain text. On a terminal a running grid is a live view; NO_COLOR takes its colours away.
`ctp COMMAND --help` tells the rest."""


def entry() -> int:
    """What the script `ctp` calls. A stopped run ends at once: Ray's exit handlers would wait for its workers."""
    code = main()
    sys.stdout.flush()
    if code in (LOST, INTERRUPTED, TERMINATED):
        os._exit(code)
    return code


@unread
def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code (see ABOUT). Raises SystemExit where argparse does."""
    given = sys.argv[1:] if argv is None else argv
    root = parser()
    if not given:
        root.print_help(sys.stderr)
        return USAGE
    args = root.parse_args(given[:1])
    try:
        return run(args.command, given[1:])
    except KeyboardInterrupt:
        return INTERRUPTED


def parser(whole: bool = False) -> argparse.ArgumentParser:
    """The parser of `ctp` alone; whole: with every command's own below it, whose modules are imported."""
    p = argparse.ArgumentParser(
        prog="ctp", formatter_class=argparse.RawDescriptionHelpFormatter, epilog=ABOUT, description=_described(),
        usage="ctp [-h] [--version] COMMAND …",
    )  # fmt: skip
    p.add_argument("--version", action="version", version=f"ctp {version('ctp')}")
    if not whole:
        p.add_argument("command", metavar="COMMAND", choices=ALL, help=argparse.SUPPRESS)
        return p
    made = {f"ctp {name}": _own(name, command) for name, command in ALL.items()}
    factory: Any = lambda prog, **_: made[prog]  # noqa: E731
    below = p.add_subparsers(dest="command", prog="ctp", parser_class=factory)
    for name, command in ALL.items():
        below.add_parser(name, help=command.help)
    return p


def _own(name: str, command: Command) -> argparse.ArgumentParser:
    """A command's parser; one without arguments where a package that it needs is not installed."""
    try:
        return _renamed(parser_of(load(command)), name, command)
    except SystemExit:
        return argparse.ArgumentParser(prog=f"ctp {name}")


def _described() -> str:
    lines = ["Compress, Then Prompt: compress language models, win the quality back with soft prompts, measure how it "
             "transfers."]  # fmt: skip
    for title, commands in COMMANDS.items():
        lines += ["", f"{title}:", *(f"  {name:<11} {command.help}" for name, command in commands.items())]
    return "\n".join(lines)


def run(name: str, argv: list[str]) -> int:
    """Run one command with its own arguments."""
    command, own = ALL[name], load(ALL[name])
    _renamed(parser_of(own), name, command).parse_args(argv)  # help and errors call it by the name given here
    before, sys.argv = sys.argv, [f"ctp {name}", *argv]  # a grid writes down the command that it was started by
    try:
        return own(argv)
    finally:
        sys.argv = before


def load(command: Command) -> Main:
    """Its `main`. Raises SystemExit in one sentence where a package that it needs is not installed."""
    try:
        found: Main = importlib.import_module(command.module).main
    except ModuleNotFoundError as e:
        raise SystemExit(f"error: {command.called} needs {e.name}, which is not installed") from e
    return found


def parser_of(main: Main) -> argparse.ArgumentParser:
    """The parser that a `main` asks first; nothing else of it is run."""
    with _caught() as parsers, contextlib.suppress(_CaughtError):
        main([])
    return parsers[0]


class _CaughtError(BaseException):
    """Ends a `main` where it would parse."""


@contextlib.contextmanager
def _caught() -> Iterator[list[argparse.ArgumentParser]]:
    found: list[argparse.ArgumentParser] = []

    def catch(self: argparse.ArgumentParser, *_: Any, **__: Any) -> Any:
        found.append(self)
        raise _CaughtError

    original, argparse.ArgumentParser.parse_args = argparse.ArgumentParser.parse_args, catch  # type: ignore
    try:
        yield found
    finally:
        argparse.ArgumentParser.parse_args = original  # type: ignore[method-assign]


def _renamed(p: argparse.ArgumentParser, name: str, command: Command) -> argparse.ArgumentParser:
    """The same parser, called `ctp NAME` in its help."""
    p.prog = p.prog.replace(f"python -m {command.called}", f"ctp {name}")
    for action in p._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in dict.fromkeys(action.choices.values()):
                _renamed(inner, name, command)
    return p
