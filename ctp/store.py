"""`python -m ctp.store`: what a store holds, and how to get it out.

ls                        every artifact, with its size and, for models, its true ratio against float16
export KEY DIR --format   a folder that Hugging Face, vLLM, GPTQModel or PEFT opens
verify                    check every file, key and input
gc, rm                    remove what no run needs; remove artifacts
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
from ctp.storage.catalog import Artifact, artifacts, entries, select
from ctp.storage.garbage import Litter, dependants, litter
from ctp.storage.remote import StoreError
from ctp.storage.store import Store, default_store
from ctp.storage.verify import check


@unread
def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code: FAILED where something is damaged or was not removed, UNREACHABLE
    where the store is, or the artifact to export is damaged."""
    args = parser().parse_args(argv)
    try:
        return COMMANDS[args.command](Store(args.store), args)
    except ValueError as e:
        print(f"ctp.store: {e}", file=sys.stderr)
        return Exit.USAGE
    except (StoreError, OSError, SafetensorError) as e:
        if reader_gone():
            raise
        print(f"ctp.store: {e}", file=sys.stderr)
        return Exit.UNREACHABLE


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog=program("ctp.store"),
        description="What a store holds, and how to get it out.",
        epilog=epilog(Exit.OK, Exit.FAILED, Exit.USAGE, Exit.UNREACHABLE),
    )
    store: Any = {"metavar": "URI", "help": f"CTP_STORE; default {default_store()}"}
    p.add_argument("--store", default=default_store(), **store)
    commands = p.add_subparsers(dest="command", required=True)

    def command(name: str, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text)
        added.add_argument("--store", default=argparse.SUPPRESS, **store)  # on either side of the command
        return added

    ls = command("ls", "every artifact, its size and what it saves against float16")
    ls.add_argument("--kind", choices=tuple(KINDS))
    ls.add_argument("--json", action="store_true", help="a list: key, kind, name, bytes, metrics")
    export = command("export", "a folder that other tools open")
    export.add_argument("key", metavar="KEY", help="6 or more digits of an artifact's key, as ls prints it")
    export.add_argument("folder", metavar="DIR", type=Path, help="new or empty")
    export.add_argument("--format", required=True, choices=(*FORMATS, "peft"), help="hf: an ordinary model; "
                        "compressed-tensors: pack-quantized; gptq: AutoGPTQ's; peft: a prompt or adapter")  # fmt: skip
    verify = command("verify", "is every artifact whole, what its key says, with its inputs there?")
    verify.add_argument("cells", nargs="*", metavar="KEY|NAME", help="only these; default: the whole store")
    verify.add_argument("--json", action="store_true", help="one object instead of lines")
    gc = command("gc", "remove what no run needs any more")
    gc.add_argument("--grid", nargs="+", default=[], metavar="NAME",
                    help="also artifacts, states and failures of cells that none of these grids has")  # fmt: skip
    gc.add_argument("--data", metavar="DIR", help="as in ctp.grid")
    rm = command("rm", "remove artifacts; a run that needs them computes them again")
    rm.add_argument("cells", nargs="+", metavar="KEY|NAME",
                    help="6 or more digits of a key, or a name, as ls prints it")  # fmt: skip
    how = rm.add_mutually_exclusive_group()
    how.add_argument("--with-dependants", action="store_true", help="and all that was made from them")
    how.add_argument("--force", action="store_true", help="though others were made from them, which stay")
    for removing in (gc, rm):
        removing.add_argument("--dry-run", action="store_true", help="say what would go, and remove nothing")
    return p


def _ls(store: Store, args: argparse.Namespace) -> int:
    """List the finished artifacts; 1 where some are damaged. Raises StoreError."""
    damaged: list[str] = []
    found = entries(store, (args.kind,) if args.kind else tuple(KINDS), damaged)
    if args.json:
        print(json.dumps([_plain_data(a) for a in found], indent=1))
    else:
        print(plain(table(found)) if found else f"No {args.kind or 'artifact'} is done in {scrub(store.uri)}")
    for line in damaged:
        print(f"ctp.store: {line}", file=sys.stderr)
    return Exit.FAILED if damaged else Exit.OK


def _plain_data(a: Artifact) -> dict[str, Any]:
    """One artifact: whole key, kind, name, bytes, and its manifest's numbers (`created`: seconds since 1970)."""
    names = ("metrics", "created", "seconds", "device")
    numbers = {n: value for n, value in a.manifest.items() if n in names}
    return {"key": a.key, "kind": a.kind, "name": a.name, "bytes": a.payload_size, **numbers}


def table(found: list[Artifact]) -> str:
    """A line per artifact. Ratios are float16 bytes over stored bytes, scales, zero points and masks included."""
    lines = [("key", "kind", "size", "model", "linears", "bits/weight", "artifact")]
    for a in found:
        columns = (("model_ratio", "{:.2f}x"), ("linear_ratio", "{:.2f}x"), ("bits_per_weight", "{:.2f}"))
        metrics = a.manifest.get("metrics", {})
        model, linears, bits = (form.format(metrics[name]) if name in metrics else "-" for name, form in columns)
        lines.append((a.digits, a.kind, size(a.payload_size), model, linears, bits, a.name))
    return "\n".join([*aligned(lines, left=(0, 1, 6)), "", "model, linears: float16 bytes / stored bytes"])


def _export(store: Store, args: argparse.Namespace) -> int:
    for note in export_key(args.key, store, args.folder, args.format):
        print(note)
    print(f"Written to {args.folder}")
    return Exit.OK


def _verify(store: Store, args: argparse.Namespace) -> int:
    """One line for each thing that is wrong; 1 where there is one. Raises ValueError, StoreError."""
    found = artifacts(store)
    chosen = select(found, args.cells) if args.cells else found
    wrong = list(check(store, found, chosen))
    total = sum(a.size for a in chosen)
    if args.json:
        problems = [asdict(w) for w in wrong]
        print(
            json.dumps({"store": store.uri, "artifacts": len(chosen), "bytes": total, "problems": problems}, indent=1)
        )
        return Exit.FAILED if wrong else Exit.OK
    for w in wrong:
        print(f"{w.path}: {w.problem}. To do: {w.remedy}")
    end = f"{len(wrong)} problem{'s' * (len(wrong) > 1)}" if wrong else "every one is whole"
    print(f"{store.uri}: {len(chosen)} artifacts, {size(total)}: {end}")
    return Exit.FAILED if wrong else Exit.OK


def _gc(store: Store, args: argparse.Namespace) -> int:
    """Remove what no run needs, printing what and why. Raises ValueError on a bad grid, StoreError."""
    _remove(store, litter(store, _planned(args.grid, args.data) if args.grid else None), args.dry_run)
    return Exit.OK


def _rm(store: Store, args: argparse.Namespace) -> int:
    """Remove artifacts; 1 where others were made from them and no option says what becomes of those. Raises ValueError,
    StoreError."""
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


COMMANDS: dict[str, Callable[[Store, argparse.Namespace], int]] = {
    "ls": _ls, "export": _export, "verify": _verify, "gc": _gc, "rm": _rm
}  # fmt: skip


def _remove(store: Store, going: Sequence[Litter], dry_run: bool) -> None:
    if not going:
        print(f"{store.uri}: nothing to remove")
        return
    print("\n".join(aligned([(size(x.size), x.path, x.why) for x in going], left=(1, 2))), flush=True)
    for x in () if dry_run else going:
        store.folders.remove(f"{store.folders.root}/{x.path}")
    what = f"{len(going)} {'thing' if len(going) == 1 else 'things'}, {size(sum(x.size for x in going))}"
    print(f"{store.uri}: {what} {'would be removed' if dry_run else 'removed'}")


def _listing(found: Sequence[Artifact]) -> str:
    return ", ".join(a.path for a in found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")


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
