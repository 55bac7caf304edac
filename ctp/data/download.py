"""Local copies of hub texts and tasks: fetched, and verified against manifests and checksums."""

import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError

from ctp.common import hub
from ctp.common.exit_codes import Exit
from ctp.common.files import new_file, sha256_file, write_json
from ctp.common.terminal import size
from ctp.data.documents import check_column, commit_of, hub_rows
from ctp.data.tasks import COMMITS
from ctp.data.texts import CORPORA, Corpus

MANIFEST, SUMS = "manifest.json", "SHA256SUMS"
DOCUMENTS = {"train": 20_000, "validation": 2_100}  # of C4: what full_paper asks for; a file of it has some 356,000


@dataclass(frozen=True)
class Source:
    """A data set to copy: a text's documents, or with `whole_rows` a task's rows with all their columns."""

    corpus: Corpus
    whole_rows: bool = False


def _task(name: str, hub_id: str, splits: str, config: str | None = None) -> Source:
    commit, parts = COMMITS[hub_id], tuple(splits.split())
    corpus = Corpus(name, "", splits=parts, folder=name, hub=hub_id, config=config, revision=commit)
    return Source(corpus, whole_rows=True)


_EUROPE = "high_school_european_history"
SOURCES: dict[str, Source] = {name: Source(corpus) for name, corpus in CORPORA.items() if corpus.hub} | {
    task.corpus.name: task
    for task in (
        _task("openbookqa", "allenai/openbookqa", "train validation test", "main"),
        _task("hellaswag", "Rowan/hellaswag", "train validation test"),
        _task("piqa", "baber/piqa", "train validation"),
        _task(f"mmlu_{_EUROPE}", "cais/mmlu", "dev validation test", _EUROPE),
    )
}


class UsageError(Exception):
    """The command line cannot be followed."""


class Entry(BaseModel):
    """What a file should be. documents: the first so many of the hub's, None for all."""

    sha256: str
    bytes: int
    documents: int | None
    rows: int = 0


class Manifest(BaseModel):
    """A folder's manifest.json: what its files are, and where they come from."""

    hub: str
    commit: str
    config: str | None = None
    files: dict[Annotated[str, Field(pattern="^[^/]+$")], Entry]


def fetch(root: Path, source: Source, first: dict[str, int | None]) -> None:
    """Bring a data set's splits into `root`, without those that are there and verify. first: documents of a split.

    Raises ValueError (Unreachable without a network), also for a file that no checksum vouches for.
    """
    corpus = source.corpus
    folder = root / corpus.folder
    manifest = _manifest(folder)
    if manifest and not _is_of(manifest, corpus):
        for name in manifest.files:
            (folder / name).unlink(missing_ok=True)
        manifest = None
    files = manifest.files if manifest else {}
    needed = [s for s in corpus.splits if not _there(root, folder / f"{s}.jsonl", files, first.get(s))]
    if not needed:
        return
    if manifest is None:
        manifest = Manifest(hub=corpus.hub, commit=commit_of(corpus), config=corpus.config, files={})
    folder.mkdir(parents=True, exist_ok=True)
    for split in needed:
        _fetch_split(folder / f"{split}.jsonl", source, manifest, split, first.get(split))


def _fetch_split(path: Path, source: Source, manifest: Manifest, split: str, documents: int | None) -> None:
    """Write a split's rows as JSON lines; after an error no file is left. Raises ValueError without rows."""
    count = 0
    with new_file(path) as work:
        with work.open("w", encoding="ascii") as f:
            for row in _rows(source, split, manifest.commit, documents):
                f.write(json.dumps(row) + "\n")
                count += 1
        if not count:
            raise ValueError(f"{path.parent}: the hub gave no rows")
        written = work.stat().st_size
        manifest.files[path.name] = Entry(sha256=sha256_file(work), bytes=written, documents=documents, rows=count)
        # Before the file: one that a manifest names and is not there is fetched again, one that none names is not ours.
        write_json(path.parent / MANIFEST, manifest.model_dump())
    print(f"{path.parent.name}/{path.name}: {count:,} rows, {size(written)}", flush=True)


def _is_of(manifest: Manifest, corpus: Corpus) -> bool:
    """Is it the manifest of this data set, at the requested commit, if one is pinned?"""
    pinned = corpus.revision if hub.COMMIT.fullmatch(corpus.revision or "") else manifest.commit
    return (manifest.hub, manifest.commit, manifest.config) == (corpus.hub, pinned, corpus.config)


def _there(root: Path, path: Path, files: dict[str, Entry], documents: int | None) -> bool:
    """Is this file there already? Raises ValueError if it is somebody else's and no checksum vouches for it."""
    entry = files.get(path.name)
    if entry is not None:
        there = entry.documents == documents and not _damage(path, entry.sha256, entry.bytes)
    else:
        there = path.exists()
        if there and _damage(path, *_expected(root).get(path, ("", None))):
            raise ValueError(f"{path}: neither {MANIFEST} nor {SUMS} vouches for it, and nothing is overwritten")
    if there:
        print(f"{path.parent.name}/{path.name}: there")
    return there


def _rows(source: Source, split: str, commit: str, first: int | None) -> Iterator[dict[str, Any]]:
    """Rows as they are written; with `first`, no more of the hub's file is read than they take."""
    corpus = source.corpus
    rows = hub_rows(f"{corpus.hub}@{commit}", corpus, split, streaming=first is not None)
    if not source.whole_rows:
        check_column(corpus, rows.column_names)
    try:
        for row in itertools.islice(rows, first):
            yield dict(row) if source.whole_rows else {"text": row[corpus.column]}
    except Exception as e:  # the network, in the middle of a stream
        raise hub.explain(e, corpus.hub, "data set", commit) from e


def verify(root: Path, names: list[str]) -> int:
    """Check every file of these data sets (without names, all) that a manifest or SHA256SUMS lists; 0 or 1.

    Prints a line for each file that is missing, truncated or changed. Raises UsageError if there is nothing to check.
    """
    folders = {SOURCES[n].corpus.folder for n in names}
    listed = {p: sums for p, sums in _expected(root).items() if not folders or p.relative_to(root).parts[0] in folders}
    if not listed and not names:
        raise UsageError(f"{root} has no {SUMS} and no folder with a {MANIFEST}")
    bad = [f"{p}: {why}" for p, sums in sorted(listed.items()) if (why := _damage(p, *sums))]
    missing = folders - {p.relative_to(root).parts[0] for p in listed}
    bad += [f"{root / folder}: missing, or nothing tells what it should hold" for folder in sorted(missing)]
    for line in bad:
        print(line)
    print(f"{root}: {len(listed)} files checked, {f'{len(bad)} of them bad' if bad else 'all as they should be'}")
    return Exit.FAILED if bad else Exit.OK


def _expected(root: Path) -> dict[Path, tuple[str, int | None]]:
    """File -> (sha256, bytes; None if only SHA256SUMS lists it)."""
    out: dict[Path, tuple[str, int | None]] = {}
    if (root / SUMS).is_file():
        for number, line in enumerate((root / SUMS).read_text().splitlines(), 1):
            match = re.fullmatch(r"([0-9a-f]{64}) [ *](.+)", line)
            if not match or ".." in Path(match[2]).parts or Path(match[2]).is_absolute():
                raise ValueError(f"{root / SUMS}, line {number}: no checksum and path below {root}")
            out[root / match[2]] = match[1], None
    for folder in sorted(root.glob("*/")):
        if manifest := _manifest(folder):
            out |= {folder / name: (entry.sha256, entry.bytes) for name, entry in manifest.files.items()}
    return out


def _manifest(folder: Path) -> Manifest | None:
    """A folder's manifest, if it has one. Raises ValueError if it is damaged."""
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except ValidationError as e:
        error = e.errors()[0]
        where = ".".join(map(str, error["loc"]))
        raise ValueError(f"{path} is damaged ({where} {error['msg']}): remove {folder} to fetch it again") from e


def _damage(file: Path, sha256: str, bytes: int | None) -> str:
    """What is wrong with a file, "" if nothing. bytes: its size, if known."""
    if not file.is_file():
        return "missing"
    found = file.stat().st_size
    if bytes is not None and found < bytes:
        return f"truncated, {found} of {bytes} bytes"
    return "" if sha256_file(file) == sha256 else "changed: another sha256"
