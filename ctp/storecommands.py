"""What `python -m ctp.store` does to keep a store in order:

verify [KEY|NAME ...]   is every artifact whole, what its key says, with its inputs? --json
gc                      removes what no run needs any more; --grid NAME ... keeps nothing but the cells of these grids
rm KEY|NAME ...         removes artifacts; not what others were made from, unless told to
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from ctp import housekeeping, soundness
from ctp.columns import aligned, size
from ctp.gridtext import GridError
from ctp.housekeeping import Artifact, Litter
from ctp.store import Store

OK, WRONG, USAGE = 0, 1, 2


def parsers(commands: Any) -> list[argparse.ArgumentParser]:
    """Add the commands; returns their parsers."""
    verify = commands.add_parser("verify", help="is every artifact whole, what its key says, with its inputs there?")
    verify.add_argument("cells", nargs="*", metavar="KEY|NAME", help="only these; default: the whole store")
    verify.add_argument("--json", action="store_true", help="one object instead of lines")
    gc = commands.add_parser("gc", help="remove what no run needs any more")
    gc.add_argument("--grid", nargs="+", default=[], metavar="NAME",
                    help="also artifacts, states and failures of cells that none of these grids has")  # fmt: skip
    gc.add_argument("--data", metavar="DIR", help="as in ctp.grid")
    rm = commands.add_parser("rm", help="remove artifacts; a run that needs them computes them again")
    rm.add_argument(
        "cells", nargs="+", metavar="KEY|NAME", help="6 or more digits of a key, or a name, as ls prints it"
    )
    how = rm.add_mutually_exclusive_group()
    how.add_argument("--with-dependants", action="store_true", help="and all that was made from them")
    how.add_argument("--force", action="store_true", help="though others were made from them, which stay")
    for command in (gc, rm):
        command.add_argument("--dry-run", action="store_true", help="say what would go, and remove nothing")
    return [verify, gc, rm]


def verify(store: Store, args: argparse.Namespace) -> int:
    """One line for each thing that is wrong; returns 1 where there is one. Raises ValueError, StoreError."""
    found = housekeeping.artifacts(store)
    chosen = housekeeping.select(found, args.cells) if args.cells else found
    wrong = list(soundness.check(store, found, chosen))
    total = sum(a.size for a in chosen)
    if args.json:
        said = {"store": store.uri, "artifacts": len(chosen), "bytes": total, "problems": [asdict(w) for w in wrong]}
        print(json.dumps(said, indent=1))
        return WRONG if wrong else OK
    for w in wrong:
        print(f"{w.path}: {w.problem}. To do: {w.remedy}")
    end = f"{len(wrong)} problem{'s' * (len(wrong) > 1)}" if wrong else "every one is whole"
    print(f"{store.uri}: {len(chosen)} artifacts, {size(total)}: {end}")
    return WRONG if wrong else OK


def gc(store: Store, args: argparse.Namespace) -> int:
    """Remove what no run needs, telling what and why. Raises ValueError on a bad grid, StoreError."""
    planned = _planned(args.grid, args.data) if args.grid else None
    _remove(store, housekeeping.litter(store, planned), args.dry_run)
    return OK


def rm(store: Store, args: argparse.Namespace) -> int:
    """Remove artifacts; returns 1 where others were made from them and nobody said what of those. Raises ValueError."""
    found = housekeeping.artifacts(store)
    chosen = housekeeping.select(found, args.cells)
    behind = housekeeping.dependants(found, chosen)
    if behind and not (args.force or args.with_dependants):
        made = f"{len(behind)} artifacts were made from {_listing(chosen)}: {_listing(behind)}."
        print(f"Nothing removed: {made}\n--with-dependants removes them too; --force leaves them: their numbers stand, "
              "and a run that needs the input computes it again.", file=sys.stderr)  # fmt: skip
        return WRONG
    # Last what others were made from: should this be cut off, no artifact is without its inputs.
    going = {a.path for a in (*chosen, *(behind if args.with_dependants else ()))}
    _remove(store, [Litter(a.path, a.size, "") for a in reversed(found) if a.path in going], args.dry_run)
    return OK


COMMANDS: dict[str, Callable[[Store, argparse.Namespace], int]] = {"verify": verify, "gc": gc, "rm": rm}


def _remove(store: Store, going: Sequence[Litter], dry_run: bool) -> None:
    if going:
        print("\n".join(aligned([(size(x.size), x.path, x.why) for x in going], left=(1, 2))), flush=True)
    if not dry_run:
        housekeeping.remove(store, (x.path for x in going))
    what = f"{len(going)} {'thing' if len(going) == 1 else 'things'}, {size(sum(x.size for x in going))}"
    print(f"{store.uri}: {what} {'would be removed' if dry_run else 'removed'}" if going else
          f"{store.uri}: nothing to remove")  # fmt: skip


def _listing(found: Sequence[Artifact]) -> str:
    names = ", ".join(a.path for a in found[:3])
    return names + (f" and {len(found) - 3} more" if len(found) > 3 else "")


def _planned(names: Sequence[str], data: str | None) -> set[str]:
    """The keys of all cells of these grids. Raises ValueError on a mistake in one, or where a model cannot be pinned:
    its keys would be others, and all that was made from it would go."""
    from ctp import gridfile
    from ctp.pins import Pins
    from ctp.plan import make

    out: set[str] = set()
    for name in names:
        try:
            pins = Pins(data)
            out |= make(gridfile.load(name, [], pins), pins).nodes.keys()
        except GridError as e:
            raise ValueError("; ".join(e.problems)) from e
    return out
