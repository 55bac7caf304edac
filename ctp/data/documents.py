"""A text's location, revision and documents.

`locate_text` pins a text when a grid is planned, `read_documents` reads it on a worker. Locations are
`file:/abs/path@revision`, `divide:/abs/path@revision` (one file for all splits), `package:name@revision` and
`hub:id@commit`. Importing this module loads neither torch nor datasets nor gensim: planning stays fast.
"""

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ctp.common import hub
from ctp.common.files import changed, expanded, there
from ctp.common.messages import shown, unknown
from ctp.data import packaged
from ctp.data.textfiles import check_text, decoded, rows, sha256
from ctp.data.texts import SPLITS, Corpus, local_root

PARTS_OF_FILE = 10  # of a divided file, one part is validation and one is test
_PINNED = re.compile(r"(.*)@(sha256:[0-9a-f]{64})", re.DOTALL)


def locate_text(corpus: Corpus, split: str, data_dir: str | Path | None = None) -> tuple[str, str]:
    """(location, revision) of a split.

    The revision is `sha256:<hex>` of the file (for divided and packaged text also of the rule), or the hub's commit.
    data_dir (default: $CTP_DATA_DIR) holds local copies of hub texts; with one given, the hub is not asked.

    Raises ValueError: a split that does not exist, a missing file or package, a file that is no text, a hub that does
    not answer in seconds.
    """
    if split not in corpus.splits:
        raise ValueError(f"{corpus.name} has no split {split!r}; it has: {', '.join(corpus.splits)}")
    if corpus.packaged:
        return _pin(f"package:{corpus.name}")
    if corpus.path:
        path = expanded(corpus.path).absolute()
        if not there(path):
            raise ValueError(f"{corpus.name}: there is no file or folder {shown(str(path))}")
        if not path.is_file():
            return _locate_file(corpus, split, path)
        if path.suffix not in (".jsonl", ".txt"):
            raise ValueError(f"{corpus.name}: {path} is neither .jsonl nor .txt")
        check_text(path, _local_column(corpus))
        return _pin(f"divide:{path}")
    root = local_root(data_dir)
    if root is not None and corpus.folder:
        return _locate_file(corpus, split, root / corpus.folder)
    commit = commit_of(corpus)
    return f"hub:{corpus.hub}@{commit}", commit


def commit_of(corpus: Corpus) -> str:
    """The commit of a hub text: its revision if that is one, else what the hub says. Raises as `hub_commit`."""
    return hub_commit(corpus.name, corpus.hub, corpus.revision or "", "a local copy")


def hub_commit(title: str, data: str, revision: str, copy: str) -> str:
    """The commit of a data set. Raises ValueError if there is none; Unreachable if the hub cannot be reached.

    title, copy: what the errors call it, and its local copy.
    """
    try:
        return hub.commit(data, revision, "data set")
    except hub.Unreachable as e:
        remedy = f"give --data DIR or CTP_DATA_DIR with {copy}"
        raise hub.Unreachable(f"{title}: the hub ({data}) cannot be reached; {remedy}") from e
    except ValueError as e:
        raise ValueError(f"{title}: {e}") from e


def _locate_file(corpus: Corpus, split: str, folder: Path) -> tuple[str, str]:
    endings = (".jsonl", ".txt") if corpus.path else (".jsonl",)
    for ending in endings:
        if (path := folder / f"{split}{ending}").is_file():
            check_text(path, _local_column(corpus))
            return _pin(f"file:{path}")
    found = [s for s in SPLITS for ending in endings if (folder / f"{s}{ending}").is_file()]
    layout = " or ".join(f"{split}{ending}" for ending in endings)
    has = f" (it has: {', '.join(found)})" if found else ""
    row = f'{{"{_local_column(corpus)}": …}}'
    raise ValueError(f"{corpus.name}: {folder} has no {layout}{has}; a .jsonl has one {row} a line")


def _pin(place: str) -> tuple[str, str]:
    revision = _revision(place)
    return f"{place}@{revision}", revision


def _revision(place: str) -> str:
    """What pins the text of a file or package as it is now."""
    scheme, _, path = place.partition(":")
    if scheme == "package":
        return packaged.fingerprint(path)
    digest = sha256(Path(path))
    if scheme == "divide":
        digest = hashlib.sha256(f"{digest} {packaged.VERSION} {PARTS_OF_FILE}".encode()).hexdigest()
    return f"sha256:{digest}"


def pinned_files(location: str) -> list[Path]:
    """The file that a location names; none if it is on the hub or in a package."""
    scheme, _, path = _place(location).partition(":")
    return [Path(path)] if scheme in ("file", "divide") else []


def check_pinned(location: str, revision: str = "") -> None:
    """Raises Changed, in one sentence, if the text at a location is no longer what was pinned there.

    revision: not needed, as the location has it.
    """
    if (found := _PINNED.fullmatch(location)) is None:
        return  # the hub's commits are exact
    what = f"the text {found[1].partition(':')[2]}"
    try:
        now = _revision(found[1])
    except FileNotFoundError:
        return  # its reader reports it
    except OSError as e:
        raise changed(what, e.strerror or str(e)) from e
    if now != found[2]:
        raise changed(what, f"it was {found[2][:19]}, it is {now[:19]}")


def _place(location: str) -> str:
    """A location without its revision."""
    found = _PINNED.fullmatch(location)
    return found[1] if found else location


def read_documents(location: str, corpus: Corpus, split: str, first: int | None = None) -> list[str]:
    """The documents of a split, in their order, from a location of `locate_text`; `first`: only so many.

    Raises ValueError: a file that is gone or has a row without text, an unknown kind of location; Changed where it
    is not what was pinned.
    """
    check_pinned(location)
    texts = _documents(location, corpus, split)
    check_pinned(location)
    return texts[:first]


def _documents(location: str, corpus: Corpus, split: str) -> list[str]:
    scheme, _, place = _place(location).partition(":")
    if scheme == "package":
        return packaged.documents(place, split)
    if scheme == "hub":
        table = hub_rows(place, corpus, split)
        check_column(corpus, table.column_names)
        return list(table[corpus.column])
    if scheme not in ("file", "divide"):
        raise ValueError(f"{corpus.name}: cannot read from {location!r}")
    path = Path(place)
    if not path.is_file():
        raise ValueError(f"{corpus.name}: {path} is missing on this machine")
    lines = path.suffix == ".jsonl"
    texts = list(rows(path, _local_column(corpus))) if lines else [decoded(path, path.read_bytes())]
    if scheme == "file":
        return texts
    return packaged.part(texts if lines else packaged.sections(texts[0]), split, PARTS_OF_FILE)


def _local_column(corpus: Corpus) -> str:
    return corpus.column if corpus.path else "text"  # local copies of hub texts have one layout, whatever the hub's


def hub_rows(place: str, corpus: Corpus, split: str, streaming: bool = False) -> Any:
    """A split of `id@commit` as `datasets` gives it; streaming: rows one by one, fetched as they are read.

    Raises ValueError, in one sentence, if it cannot be read.
    """
    import datasets

    name, _, commit = place.rpartition("@")
    options: dict[str, Any] = {"split": split, "revision": commit}
    if corpus.config is not None:
        options["name"] = corpus.config
    if corpus.data_files is not None:
        options["data_files"] = {split: corpus.data_files[split]}  # the other splits' files are not fetched
    if streaming:
        options["streaming"] = True
    try:
        return datasets.load_dataset(name, **options)
    except Exception as e:  # its own errors, the hub's client's, their HTTP library's
        raise hub.explain(e, name, "data set", commit) from e


def check_column(corpus: Corpus, columns: Sequence[str] | None) -> None:
    """Raises ValueError, naming those there are, if a hub text has no such field. None: not known beforehand."""
    if columns is not None and corpus.column not in columns:
        raise ValueError(f"{corpus.name}: {unknown('field', corpus.column, columns)}")
