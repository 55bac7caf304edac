"""`python -m ctp.store`: what lies in a store, and how to get it out.

ls                        every artifact, with its size and, for models, its true ratio against float16
export KEY DIR --format   a folder that Hugging Face, vLLM, GPTQModel or PEFT opens
verify, gc, rm            see ctp.storecommands
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ctp import storecommands
from ctp.cache import new_folder
from ctp.columns import aligned, size
from ctp.ending import reader_gone, unread
from ctp.formats import FORMATS
from ctp.housekeeping import KEY
from ctp.labels import slug
from ctp.manifest import MANIFEST, Damaged, lacking, parse
from ctp.methods import Dense
from ctp.models import locate, quiet
from ctp.names import plain
from ctp.recover.adapter import copy_adapter
from ctp.redact import scrub
from ctp.spec import KINDS, Cell, Compress, Learn, Runtime, from_json, key
from ctp.store import Store, StoreError, default_store

OK, WRONG, USAGE, UNREACHABLE = 0, 1, 2, 3


@dataclass(frozen=True)
class Entry:
    """One artifact: its key, its cell's kind, its readable name, its size in bytes and its manifest."""

    key: str
    kind: str
    name: str
    size: int
    manifest: dict[str, Any]


def entries(store: Store, kinds: tuple[str, ...] = tuple(KINDS), damaged: list[str] | None = None) -> list[Entry]:
    """Every finished artifact, by kind and name. Raises StoreError where a manifest cannot be read.

    damaged: a list for what is wrong with manifests that cannot be believed; without it they raise too.
    """
    out = []
    for path in sorted(path for kind in kinds for path in store.glob(kind, f"*/{MANIFEST}")):
        try:
            said = _read(store, path)
        except Damaged as e:
            if damaged is None:
                raise
            damaged.append(str(e))
            continue
        total = sum(f["size"] for f in said["files"].values())
        name = path.split("/")[-2].removesuffix(f"-{said['key'][:12]}")
        out.append(Entry(said["key"], said["kind"], name, total, said))
    return sorted(out, key=lambda e: (kinds.index(e.kind), e.name))


def _read(store: Store, path: str) -> dict[str, Any]:
    if (text := store.read(path)) is None:
        raise StoreError(f"{path} is gone: somebody removed it meanwhile")
    try:
        manifest = parse(text, path)
        folder = path.removesuffix(f"/{MANIFEST}")
        if store.local and (lack := lacking(manifest, lambda name: store.size(f"{folder}/{name}"))):
            raise Damaged(f"{folder}/{lack}")
        return manifest
    except Damaged as e:
        raise Damaged(f"{e}: `python -m ctp.store verify` says what to do") from e


def find(store: Store, text: str) -> tuple[Cell, dict[str, Any]]:
    """The cell and manifest of the one artifact whose key begins with `text` (6 hex digits or more).

    Raises ValueError where there is none, several, or one of another version of ctp.
    """
    if not KEY.fullmatch(text):
        raise ValueError(f"{text!r} is no key: 6 to 64 hex digits, as `python -m ctp.store ls` prints them")
    text = text.lower()
    found = [p for kind in KINDS for p in store.glob(kind, f"*-{text[:12]}*/{MANIFEST}")]
    manifests = [m for m in (_read(store, p) for p in found) if m["key"].startswith(text)]
    if len(manifests) != 1:
        what = "no artifact" if not manifests else f"{len(manifests)} artifacts"
        raise ValueError(f"{what} in {scrub(store.uri)} with a key that begins with {text!r}")
    (manifest,) = manifests
    try:
        cell = from_json(manifest)
        same = key(cell) == manifest["key"]
    except (ValueError, KeyError):
        same = False
    if not same:
        raise ValueError(f"{text} was made by another version of ctp, which meant something else by it, or by a "
                         "plugin's method, which only its grid knows")  # fmt: skip
    return cell, manifest


def load_key(text: str, uri: str | None, device: str) -> tuple[Any, Any]:
    """(model, tokenizer) of the Compress or Learn cell with that key, a learned prompt or adapter attached.

    Raises ValueError where it is no model, or the base model is not where it was; StoreError from the store.
    """
    from ctp.job import open_model
    from ctp.recover.adapter import attach_adapter  # torch and transformers: not for `ls`

    store = Store(uri or default_store())
    cell, _ = find(store, text)
    if not isinstance(cell, Compress | Learn):
        raise ValueError(f"{text} is an evaluation ({slug(cell)}): there is no model in it")
    base = cell.source if isinstance(cell, Learn) else cell
    model, tokenizer = open_model(base, store, _runtime(base, store), device)
    if isinstance(cell, Learn):
        model = attach_adapter(model, store.fetch(cell))
    return model, tokenizer


def export_key(text: str, store: Store, folder: Path, format: str) -> list[str]:
    """Write the artifact with that key into `folder`; returns what a reader must know. Raises as `load_key`."""
    from transformers import PreTrainedModel

    from ctp.compression.artifact import Compressed, save_model
    from ctp.formats.export import export
    from ctp.job import open_model

    cell, _ = find(store, text)
    allowed = _formats(cell)
    if format not in allowed:
        why = ", ".join(allowed) if allowed else "none, it is an evaluation"
        raise ValueError(f"--format {format}: for {slug(cell)} allowed: {why}")
    if isinstance(cell, Compress) and not isinstance(cell.compression, Dense):
        return export(Compressed.open(store.fetch(cell)), folder, format)
    with quiet(), new_folder(folder) as work:
        if isinstance(cell, Compress):
            for part in open_model(cell, store, _runtime(cell, store), "cpu"):
                save_model(part, work) if isinstance(part, PreTrainedModel) else part.save_pretrained(work)
            return []
        assert isinstance(cell, Learn)
        copy_adapter(store.fetch(cell), work)
    made = f"Learned through {slug(cell.source)}" if cell.recovery.learned else "Imported, not learned here"
    return [f"{made}: PeftModel.from_pretrained(model, {str(folder)!r})."]


def _formats(cell: Cell) -> tuple[str, ...]:
    if isinstance(cell, Learn):
        return ("peft",)
    if not isinstance(cell, Compress):
        return ()
    return ("hf",) if isinstance(cell.compression, Dense) else FORMATS


def _runtime(cell: Compress, store: Store) -> Runtime:
    """Where a dense artifact's model lies: where it lay when the artifact was made, if it is still the same."""
    if not isinstance(cell.compression, Dense):
        return Runtime()
    where = store.manifest(cell)["location"]
    revision = locate(where.removeprefix("hub:"), cell.model.revision if where.startswith("hub:") else "")[1]
    if revision != cell.model.revision:
        raise ValueError(f"the model at {where} is no longer the one of {slug(cell)}: its revision is {revision}")
    return Runtime(locations={f"{cell.model.name}@{cell.model.revision}": where})


# ------------------------------------------------------------------ command line


@unread
def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0 done, 1 something is damaged or was not removed, 2 bad usage,
    3 store unreachable or an artifact that was asked for damaged."""
    args = parser().parse_args(argv)
    try:
        store = Store(args.store)
        if args.command == "ls":
            return _list(store, args.kind, args.json)
        if args.command in storecommands.COMMANDS:
            return storecommands.COMMANDS[args.command](store, args)
        for note in export_key(args.key, store, args.folder, args.format):
            print(note)
        print(f"Written to {args.folder}")
        return OK
    except ValueError as e:
        print(f"ctp.store: {e}", file=sys.stderr)
        return USAGE
    except (StoreError, OSError, SafetensorError) as e:
        if reader_gone():
            raise
        print(f"ctp.store: {e}", file=sys.stderr)
        return UNREACHABLE


def _list(store: Store, kind: str | None, as_json: bool) -> int:
    damaged: list[str] = []
    found = entries(store, (kind,) if kind else tuple(KINDS), damaged)
    if as_json:
        print(json.dumps([_plain_data(e) for e in found], indent=1))
    else:
        print(plain(table(found)) if found else f"No {kind or 'artifact'} is done in {scrub(store.uri)}")
    for line in damaged:
        print(f"ctp.store: {line}", file=sys.stderr)
    return WRONG if damaged else OK


def _plain_data(e: Entry) -> dict[str, Any]:
    """One artifact: whole key, kind, name, bytes, and its manifest's numbers (`created`: seconds since 1970)."""
    names: tuple[str, ...] = ("metrics", "created", "seconds", "device")
    said = {n: e.manifest[n] for n in names if n in e.manifest}
    return {"key": e.key, "kind": e.kind, "name": e.name, "bytes": e.size, **said}


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m ctp.store", description="What lies in a store, and how to get it out.")
    store: Any = {"metavar": "URI", "help": f"CTP_STORE; default {default_store()}"}
    p.add_argument("--store", default=default_store(), **store)
    commands = p.add_subparsers(dest="command", required=True)
    ls = commands.add_parser("ls", help="every artifact, its size and what it saves against float16")
    ex = commands.add_parser("export", help="a folder that other tools open")
    for command in (ls, ex, *storecommands.parsers(commands)):  # on either side of the command
        command.add_argument("--store", default=argparse.SUPPRESS, **store)
    ls.add_argument("--kind", choices=tuple(KINDS))
    ls.add_argument("--json", action="store_true", help="a list: key, kind, name, bytes, metrics")
    ex.add_argument("key", metavar="KEY", help="6 or more digits of an artifact's key, as ls prints it")
    ex.add_argument("folder", metavar="DIR", type=Path, help="new or empty")
    ex.add_argument("--format", required=True, choices=(*FORMATS, "peft"), help="hf: an ordinary model; "
                    "compressed-tensors: its pack-quantized; gptq: AutoGPTQ's; peft: a prompt or adapter")  # fmt: skip
    return p


def table(found: list[Entry]) -> str:
    """A line per artifact. Ratios are float16 bytes over stored bytes, scales, zero points and masks included."""
    head = ("key", "kind", "size", "model", "linears", "bits/weight", "artifact")
    lines = [head, *(_line(e) for e in found)]
    return "\n".join([*aligned(lines, left=(0, 1, 6)), "", "model, linears: float16 bytes / stored bytes"])


def _line(e: Entry) -> tuple[str, ...]:
    metrics = e.manifest.get("metrics", {})

    def shown(name: str, form: str) -> str:
        return form.format(metrics[name]) if name in metrics else "-"

    ratios = (shown("model_ratio", "{:.2f}x"), shown("linear_ratio", "{:.2f}x"), shown("bits_per_weight", "{:.2f}"))
    return e.key[:12], e.kind, size(e.size), *ratios, e.name
