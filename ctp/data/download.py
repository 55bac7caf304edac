"""Local copies of hub texts and tasks: fetched, and verified against manifests and checksums."""

import itertools
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ctp.common import hub
from ctp.common.files import new_file, sha256_file, write_json
from ctp.common.terminal import size
from ctp.data.documents import check_column, commit_of, hub_rows
from ctp.data.tasks import COMMITS
from ctp.data.texts import CORPORA, Corpus

OK, FAILED, USAGE, UNREACHABLE = 0, 1, 2, 3
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


class _UsageError(Exception):
    pass


def fetch(root: Path, source: Source, first: dict[str, int | None]) -> None:
    """Bring a data set's splits into `root`, those left out that are there and verify. first: documents of a split.

    Raises ValueError (Unreachable without a network), or where a file is there that no checksum vouches for.
    """
    corpus = source.corpus
    folder = root / corpus.folder
    told = _manifest(folder)
    if told and not _is_of(told, corpus):
        for name in told["files"]:
            (folder / name).unlink(missing_ok=True)
        told = {}
    files: dict[str, Any] = told.get("files", {})
    needed = [s for s in corpus.splits if not _there(root, folder / f"{s}.jsonl", files, first.get(s))]
    if not needed:
        return
    commit = str(told["commit"]) if told else commit_of(corpus)
    for split in needed:
        path, documents = folder / f"{split}.jsonl", first.get(split)
        with new_file(path) as work:
            rows = _write(work, _rows(source, split, commit, documents))
            said = {"rows": rows, "bytes": work.stat().st_size, "sha256": sha256_file(work), "documents": documents}
            files = {**files, path.name: said}
            # Before the file: what a manifest names and is not there is fetched again, what none names is not ours.
            about = {"hub": corpus.hub, "commit": commit, "config": corpus.config}
            write_json(folder / MANIFEST, {**about, "files": files})
        print(f"{corpus.folder}/{path.name}: {rows:,} rows, {size(path.stat().st_size)}", flush=True)


def _is_of(told: dict[str, Any], corpus: Corpus) -> bool:
    """Does a manifest tell of this data set, at the commit asked for if one is?"""
    pinned = corpus.revision if hub.COMMIT.fullmatch(corpus.revision or "") else told["commit"]
    return (told["hub"], told["commit"], told.get("config")) == (corpus.hub, pinned, corpus.config)


def _there(root: Path, path: Path, files: dict[str, Any], documents: int | None) -> bool:
    """Need this file not be fetched? Raises ValueError where it is somebody else's and no checksum vouches for it."""
    said = files.get(path.name)
    if said is not None:
        there = said["documents"] == documents and not _damage(path, said)
    else:
        there = path.exists()
        if there and ((known := _expected(root).get(path)) is None or _damage(path, known)):
            raise ValueError(f"{path}: neither {MANIFEST} nor {SUMS} vouches for it, and nothing is overwritten")
    if there:
        print(f"{path.parent.name}/{path.name}: there")
    return there


def _rows(source: Source, split: str, commit: str, first: int | None) -> Iterator[dict[str, Any]]:
    """Rows as they are written; with `first`, no more of the hub's file is read than they take."""
    corpus = source.corpus
    place = f"{corpus.hub}@{commit}"
    rows = hub_rows(place, corpus, split, streaming=first is not None)
    if not source.whole_rows:
        check_column(corpus, rows.column_names)
    try:
        for row in itertools.islice(rows, first):
            yield dict(row) if source.whole_rows else {"text": row[corpus.column]}
    except Exception as e:  # the network, in the middle of a stream
        raise hub.explain(e, corpus.hub, "data set", commit) from e


def _write(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    """Write JSON lines; returns how many. Raises ValueError if there are none."""
    count = 0
    with path.open("w", encoding="ascii") as f:
        for row in rows:
            f.write(json.dumps(row) + "\n")
            count += 1
    if not count:
        raise ValueError(f"{path.parent}: the hub gave no rows")
    return count


def verify(root: Path, names: list[str]) -> int:
    """Check every file of these data sets (all, without names) that a manifest or SHA256SUMS tells of; 0 or 1.

    Prints a line for each file that is missing, truncated or changed. Raises _UsageError with nothing to check.
    """
    folders = {SOURCES[n].corpus.folder for n in names}
    listed = {p: said for p, said in _expected(root).items() if not folders or p.relative_to(root).parts[0] in folders}
    if not listed and not names:
        raise _UsageError(f"{root} has no {SUMS} and no folder with a {MANIFEST}")
    bad = [f"{p}: {why}" for p, said in sorted(listed.items()) if (why := _damage(p, said))]
    told = {p.relative_to(root).parts[0] for p in listed}
    bad += [f"{root / folder}: missing, or nothing tells what it should hold" for folder in sorted(folders - told)]
    for line in bad:
        print(line)
    print(f"{root}: {len(listed)} files checked, {len(bad)} of them bad" if bad else
          f"{root}: {len(listed)} files checked, all as they should be")  # fmt: skip
    return FAILED if bad else OK


def _expected(root: Path) -> dict[Path, dict[str, Any]]:
    """File -> what it should be: sha256, and bytes where a manifest says them."""
    out: dict[Path, dict[str, Any]] = {}
    if (root / SUMS).is_file():
        for number, line in enumerate((root / SUMS).read_text().splitlines(), 1):
            match = re.fullmatch(r"([0-9a-f]{64}) [ *](.+)", line)
            if not match or ".." in Path(match[2]).parts or Path(match[2]).is_absolute():
                raise ValueError(f"{root / SUMS}, line {number}: no checksum and path below {root}")
            out[root / match[2]] = {"sha256": match[1]}
    for manifest in sorted(root.glob(f"*/{MANIFEST}")):
        out |= {manifest.parent / name: said for name, said in _manifest(manifest.parent)["files"].items()}
    return out


def _manifest(folder: Path) -> dict[str, Any]:
    """A folder's manifest, {} where it has none. Raises ValueError where it is damaged."""
    path = folder / MANIFEST
    if not path.is_file():
        return {}
    try:
        said: dict[str, Any] = json.loads(path.read_text())
        whole = all({"bytes", "sha256", "documents"} <= f.keys() and "/" not in n for n, f in said["files"].items())
        if not whole or not {"hub", "commit"} <= said.keys():
            raise KeyError("hub, commit, or bytes, sha256 and documents of a file")
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"{path} is damaged ({e}): remove {folder} to fetch it again") from e
    return said


def _damage(file: Path, said: dict[str, Any]) -> str:
    """What is wrong with a file, "" if nothing."""
    if not file.is_file():
        return "missing"
    held, should = file.stat().st_size, said.get("bytes")
    if should is not None and held < should:
        return f"truncated, {held} of {should} bytes"
    return "" if sha256_file(file) == said["sha256"] else "changed: another sha256"
