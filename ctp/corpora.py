"""`python -m ctp.corpora fetch DIR [NAME …]` and `verify DIR [NAME …]`: local copies of hub texts, for `--data DIR`.

DIR/c4/train.jsonl …              one {"text": …} a line, as the texts of grids are read
DIR/hellaswag/validation.jsonl …  a task's rows with all columns the hub has
DIR/*/manifest.json               hub id, commit, config and, for each file, rows, bytes and sha256
"""

import argparse
import re
import sys
from pathlib import Path

from ctp.common import hub
from ctp.common.exit_codes import Exit, epilog, fail
from ctp.common.messages import unknown
from ctp.common.terminal import program, reader_gone, unread
from ctp.data.download import DOCUMENTS, SOURCES, UsageError, fetch, verify


@unread
def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = parser().parse_args(argv)
    try:
        names = [_name(n) for n in args.names]
        if args.command == "verify":
            return verify(args.dir, names)
        return _fetch_all(args.dir, names or list(SOURCES), _documents(args.documents))
    except UsageError as e:
        return fail(Exit.USAGE, str(e))
    except hub.Unreachable as e:
        return fail(Exit.UNREACHABLE, str(e))
    except (ValueError, OSError) as e:
        if reader_gone():
            raise
        return fail(Exit.FAILED, str(e))


def _fetch_all(root: Path, names: list[str], documents: dict[str, int | None]) -> int:
    """Fetch each; one that is refused does not keep the others back, a dead network does."""
    code: int = Exit.OK
    for name in names:
        try:
            fetch(root, SOURCES[name], documents if name == "c4" else {})
        except hub.Unreachable:
            raise
        except (ValueError, OSError) as e:
            code = fail(Exit.FAILED, f"{name}: {e}")
    return code


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog=program("ctp.corpora"),
        description=f"Local copies of hub texts, for --data DIR. NAME: {', '.join(SOURCES)}; default: all.",
        epilog=epilog(Exit.OK, Exit.FAILED, Exit.USAGE, Exit.UNREACHABLE),
    )
    sub = p.add_subparsers(dest="command", required=True)
    for command, text in (("fetch", "download what does not verify"), ("verify", "check every file's bytes")):
        c = sub.add_parser(command, help=text, description=text)
        c.add_argument("dir", metavar="DIR", type=Path)
        c.add_argument("names", metavar="NAME", nargs="*")
    sub.choices["fetch"].add_argument("--documents", metavar="SPLIT=N,…", default="",
                                      help="the first documents of c4, or all: train=5000,validation=all (default "
                                      + ",".join(f"{s}={n}" for s, n in DOCUMENTS.items()) + ")")  # fmt: skip
    return p


def _name(name: str) -> str:
    """A name of SOURCES, from it or from its folder's name."""
    found = next((n for n, s in SOURCES.items() if name in (n, s.corpus.folder)), None)
    if found is None:
        raise UsageError(unknown("data set", name, SOURCES))
    return found


def _documents(text: str) -> dict[str, int | None]:
    """ "train=5000,validation=all" -> {"train": 5000, "validation": None}, over the defaults."""
    out: dict[str, int | None] = dict(DOCUMENTS)
    for part in filter(None, text.split(",")):
        split, _, n = part.partition("=")
        if split not in DOCUMENTS or not re.fullmatch(r"all|[1-9]\d*", n):
            raise UsageError(f"--documents {part!r}: write SPLIT=N or SPLIT=all; splits: {', '.join(DOCUMENTS)}")
        out[split] = None if n == "all" else int(n)
    return out


if __name__ == "__main__":
    sys.exit(main())
