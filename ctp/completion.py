"""`ctp completion SHELL`: a script that completes commands, options, grids, keys and files by Tab.

bash:  ctp completion bash > ~/.local/share/bash-completion/completions/ctp
zsh:   ctp completion zsh > a file _ctp in a folder of $fpath
fish:  ctp completion fish > ~/.config/fish/completions/ctp.fish
"""

import argparse
from collections.abc import Iterator
from typing import Any

import shtab

from ctp import cli
from ctp.common.terminal import program, unread
from ctp.planning.gridtext import grid_folders

SHELLS = ("bash", "zsh", "fish")


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog=program("ctp.completion"), description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    p.add_argument("shell", choices=SHELLS)
    return p


@unread
def main(argv: list[str] | None = None) -> int:
    """Print the script; returns 0."""
    print(script(parser().parse_args(argv).shell))
    return 0


def script(shell: str) -> str:
    """What completes `ctp` in a shell of SHELLS, without starting Python when Tab is pressed."""
    whole = argparse.ArgumentParser(prog="ctp")
    made: Any = lambda prog, **_: _parser(prog.removeprefix("ctp "))  # noqa: E731
    below = whole.add_subparsers(dest="command", parser_class=made)
    for name, command in cli.ALL.items():
        below.add_parser(name, help=command.help)
    for action in _actions(whole):
        if completed := _values(action):
            action.complete = completed  # type: ignore[attr-defined]  # where shtab looks
    return str(shtab.complete(whole, shell))


def _parser(name: str) -> argparse.ArgumentParser:
    """A command's parser; one without arguments where a package that it needs is not installed."""
    with cli.named(name, []):
        try:
            found: argparse.ArgumentParser = cli.load(cli.ALL[name]).parser()
        except SystemExit:
            return argparse.ArgumentParser(prog=f"ctp {name}")
    return found


def _actions(p: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Every argument of a parser and of those below it."""
    for action in p._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                yield from _actions(inner)


def _values(action: argparse.Action) -> Any:
    """How shtab completes an argument's values; None where its choices, or nothing, say it."""
    if action.dest == "grid":
        known = sorted({path.stem for folder in grid_folders()[1:] for path in folder.glob("*.yaml")})
        return shtab.cmd(f"printf '%s\\n' {' '.join(known)}; ls *.yaml grid/*.yaml 2>/dev/null")
    files = {"DIR": shtab.DIRECTORY, "FILE": shtab.FILE}
    return files.get(action.metavar) if isinstance(action.metavar, str) else None


if __name__ == "__main__":
    raise SystemExit(main())
