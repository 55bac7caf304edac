"""`ctp completion SHELL`: a script that completes commands, options, grids, keys and files by Tab.

bash:  ctp completion bash > ~/.local/share/bash-completion/completions/ctp
zsh:   ctp completion zsh > a file _ctp in a folder of $fpath
fish:  ctp completion fish > ~/.config/fish/completions/ctp.fish
"""

import argparse
from collections.abc import Iterator
from typing import Any

from ctp.common.terminal import unread
from ctp.planning.gridtext import grid_folders

SHELLS = ("bash", "zsh", "fish")
FILES = ("FILE", "DIR")  # metavars
GRIDS = ("grid",)  # names of arguments


@unread
def main(argv: list[str] | None = None) -> int:
    """Print the script; returns 0."""
    p = argparse.ArgumentParser(
        prog="python -m ctp.completion", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("shell", choices=SHELLS)
    shell = p.parse_args(argv).shell
    print(script(shell))
    return 0


def script(shell: str) -> str:
    """What completes `ctp` in a shell of SHELLS. It starts no Python when Tab is pressed."""
    import shtab

    from ctp.cli import parser

    whole = parser(whole=True)
    for action in actions(whole):
        if completed := _values(action):
            action.complete = completed  # type: ignore[attr-defined]  # where shtab looks
    return str(shtab.complete(whole, shell))


def actions(p: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Every argument of a parser and of those below it."""
    for action in p._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                yield from actions(inner)


def _values(action: argparse.Action) -> Any:
    """How shtab is to complete an argument's values; None where its choices, or nothing, say it."""
    import shtab

    if action.dest in GRIDS:
        known = sorted({path.stem for folder in grid_folders()[1:] for path in folder.glob("*.yaml")})
        here = "ls *.yaml grid/*.yaml 2>/dev/null"
        return shtab.cmd(f"printf '%s\\n' {' '.join(known)}; {here}")
    if action.metavar == "DIR":
        return shtab.DIRECTORY
    return shtab.FILE if action.metavar in FILES else None


if __name__ == "__main__":
    raise SystemExit(main())
