"""`python -m ctp.store`: what lies in a store, and how to get it out.

ls                        every artifact, with its size and, for models, its true ratio against float16
export KEY DIR --format   a folder that Hugging Face, vLLM, GPTQModel or PEFT opens
verify, gc, rm            see ctp.store
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ctp.cells.cell import KINDS
from ctp.common.exit_codes import Exit, epilog
from ctp.common.messages import plain
from ctp.common.redact import scrub
from ctp.common.terminal import aligned, program, reader_gone, size, unread
from ctp.execution.open import export_key
from ctp.formats import FORMATS
from ctp.planning.gridtext import GridError
from ctp.storage import verify as storage_verify
from ctp.storage.catalog import Artifact, artifacts, entries, select
from ctp.storage.garbage import Litter, dependants, litter
from ctp.storage.remote import StoreError
from ctp.storage.store import Store, default_store


@unread
def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code: FAILED where something is damaged or was not removed, UNREACHABLE
    where the store is, or the artifact to export is damaged."""
    args = parser().parse_args(argv)
    try:
        store = Store(args.store)
        if args.command == "ls":
            return _list(store, args.kind, args.json)
        if args.command in COMMANDS:
            return COMMANDS[args.command](store, args)
        for note in export_key(args.key, store, args.folder, args.format):
            print(note)
        print(f"Written to {args.folder}")
        return Exit.OK
    except ValueError as e:
        print(f"ctp.store: {e}", file=sys.stderr)
        return Exit.USAGE
    except (StoreError, OSError, SafetensorError) as e:
        if reader_gone():
            raise
        print(f"ctp.store: {e}", file=sys.stderr)
        return Exit.UNREACHABLE


def _list(store: Store, kind: str | None, as_json: bool) -> int:
    damaged: list[str] = []
    found = entries(store, (kind,) if kind else tuple(KINDS), damaged)
    if as_json:
        print(json.dumps([_plain_data(e) for e in found], indent=1))
    else:
        print(plain(table(found)) if found else f"No {kind or 'artifact'} is done in {scrub(store.uri)}")
    for line in damaged:
        print(f"ctp.store: {line}", file=sys.stderr)
    return Exit.FAILED if damaged else Exit.OK


def _plain_data(e: Artifact) -> dict[str, Any]:
    """One artifact: whole key, kind, name, bytes, and its manifest's numbers (`created`: seconds since 1970)."""
    names: tuple[str, ...] = ("metrics", "created", "seconds", "device")
    said = {n: e.manifest[n] for n in names if n in e.manifest}
    return {"key": e.key, "kind": e.kind, "name": e.name, "bytes": e.payload_size, **said}


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog=program("ctp.store"),
        description="What is in a store, and how to get it out.",
        epilog=epilog(Exit.OK, Exit.FAILED, Exit.USAGE, Exit.UNREACHABLE),
    )
    store: Any = {"metavar": "URI", "help": f"CTP_STORE; default {default_store()}"}
    p.add_argument("--store", default=default_store(), **store)
    commands = p.add_subparsers(dest="command", required=True)
    ls = commands.add_parser("ls", help="every artifact, its size and what it saves against float16")
    ex = commands.add_parser("export", help="a folder that other tools open")
    for command in (ls, ex, *parsers(commands)):  # on either side of the command
        command.add_argument("--store", default=argparse.SUPPRESS, **store)
    ls.add_argument("--kind", choices=tuple(KINDS))
    ls.add_argument("--json", action="store_true", help="a list: key, kind, name, bytes, metrics")
    ex.add_argument("key", metavar="KEY", help="6 or more digits of an artifact's key, as ls prints it")
    ex.add_argument("folder", metavar="DIR", type=Path, help="new or empty")
    ex.add_argument("--format", required=True, choices=(*FORMATS, "peft"), help="hf: an ordinary model; "
                    "compressed-tensors: its pack-quantized; gptq: AutoGPTQ's; peft: a prompt or adapter")  # fmt: skip
    return p


def table(found: list[Artifact]) -> str:
    """A line per artifact. Ratios are float16 bytes over stored bytes, scales, zero points and masks included."""
    head = ("key", "kind", "size", "model", "linears", "bits/weight", "artifact")
    lines = [head, *(_line(e) for e in found)]
    return "\n".join([*aligned(lines, left=(0, 1, 6)), "", "model, linears: float16 bytes / stored bytes"])


def _line(e: Artifact) -> tuple[str, ...]:
    metrics = e.manifest.get("metrics", {})

    def shown(name: str, form: str) -> str:
        return form.format(metrics[name]) if name in metrics else "-"

    ratios = (shown("model_ratio", "{:.2f}x"), shown("linear_ratio", "{:.2f}x"), shown("bits_per_weight", "{:.2f}"))
    return e.key[:12], e.kind, size(e.payload_size), *ratios, e.name


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
    found = artifacts(store)
    chosen = select(found, args.cells) if args.cells else found
    wrong = list(storage_verify.check(store, found, chosen))
    total = sum(a.size for a in chosen)
    if args.json:
        said = {"store": store.uri, "artifacts": len(chosen), "bytes": total, "problems": [asdict(w) for w in wrong]}
        print(json.dumps(said, indent=1))
        return Exit.FAILED if wrong else Exit.OK
    for w in wrong:
        print(f"{w.path}: {w.problem}. To do: {w.remedy}")
    end = f"{len(wrong)} problem{'s' * (len(wrong) > 1)}" if wrong else "every one is whole"
    print(f"{store.uri}: {len(chosen)} artifacts, {size(total)}: {end}")
    return Exit.FAILED if wrong else Exit.OK


def gc(store: Store, args: argparse.Namespace) -> int:
    """Remove what no run needs, telling what and why. Raises ValueError on a bad grid, StoreError."""
    planned = _planned(args.grid, args.data) if args.grid else None
    _remove(store, litter(store, planned), args.dry_run)
    return Exit.OK


def rm(store: Store, args: argparse.Namespace) -> int:
    """Remove artifacts; returns 1 where others were made from them and nobody said what of those. Raises ValueError."""
    found = artifacts(store)
    chosen = select(found, args.cells)
    behind = dependants(found, chosen)
    if behind and not (args.force or args.with_dependants):
        made = f"{len(behind)} artifacts were made from {_listing(chosen)}: {_listing(behind)}."
        print(f"Nothing removed: {made}\n--with-dependants removes them too; --force leaves them: their numbers stand, "
              "and a run that needs the input computes it again.", file=sys.stderr)  # fmt: skip
        return Exit.FAILED
    # Last what others were made from: should this be cut off, no artifact is without its inputs.
    going = {a.path for a in (*chosen, *(behind if args.with_dependants else ()))}
    _remove(store, [Litter(a.path, a.size, "") for a in reversed(found) if a.path in going], args.dry_run)
    return Exit.OK


COMMANDS: dict[str, Callable[[Store, argparse.Namespace], int]] = {"verify": verify, "gc": gc, "rm": rm}


def _remove(store: Store, going: Sequence[Litter], dry_run: bool) -> None:
    if going:
        print("\n".join(aligned([(size(x.size), x.path, x.why) for x in going], left=(1, 2))), flush=True)
    if not dry_run:
        for x in going:
            store.folders.remove(f"{store.folders.root}/{x.path}")
    what = f"{len(going)} {'thing' if len(going) == 1 else 'things'}, {size(sum(x.size for x in going))}"
    print(f"{store.uri}: {what} {'would be removed' if dry_run else 'removed'}" if going else
          f"{store.uri}: nothing to remove")  # fmt: skip


def _listing(found: Sequence[Artifact]) -> str:
    names = ", ".join(a.path for a in found[:3])
    return names + (f" and {len(found) - 3} more" if len(found) > 3 else "")


def _planned(names: Sequence[str], data: str | None) -> set[str]:
    """The keys of all cells of these grids. Raises ValueError on a mistake in one, or where a model cannot be pinned:
    its keys would be others, and all that was made from it would go."""
    from ctp.planning import gridfile
    from ctp.planning.pins import Pins
    from ctp.planning.plan import make

    out: set[str] = set()
    for name in names:
        try:
            pins = Pins(data)
            out |= make(gridfile.load(name, [], pins), pins).nodes.keys()
        except GridError as e:
            raise ValueError("; ".join(e.problems)) from e
    return out


if __name__ == "__main__":
    sys.exit(main())
