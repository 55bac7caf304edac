"""Texts and the token windows cut from them.

`locate` pins a text when a grid is planned, `documents` reads it on a worker, `windows` cuts it. Importing this module
loads neither torch nor datasets nor gensim: planning stays fast.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ctp.common import hub
from ctp.common.files import expanded, there
from ctp.common.messages import shown, unknown
from ctp.data import packaged, textfiles
from ctp.data.textfiles import check_text, decoded, rows
from ctp.data.texts import SPLITS, Corpus, local_root


def locate_text(corpus: Corpus, split: str, data_dir: str | Path | None = None) -> tuple[str, str]:
    """Where a worker will read this split, and what pins its text: (location, revision).

    location: `file:/abs/path@revision`, `divide:/abs/path@revision` (a file that holds all splits),
    `package:name@revision` or `hub:id@commit`.
    revision: `sha256:<hex>` of the file (see `textfiles`), for divided and packaged text also of the rule, or the hub's
    commit.
    data_dir (default: $CTP_DATA_DIR) holds local copies of hub texts; with one given, the hub is not asked.

    Raises ValueError: a split that does not exist, a missing file or package, a file that is no text, a hub that does
    not answer in seconds.
    """
    if split not in corpus.splits:
        raise ValueError(f"{corpus.name} has no split {split!r}; it has: {', '.join(corpus.splits)}")
    if corpus.packaged:
        return textfiles.pinned(f"package:{corpus.name}")
    if corpus.path:
        path = expanded(corpus.path).absolute()
        if not there(path):
            raise ValueError(f"{corpus.name}: there is no file or folder {shown(str(path))}")
        if path.is_file():
            return _locate_divided(corpus, path)
        return _locate_file(corpus, split, path)
    root = local_root(data_dir)
    if root is not None and corpus.folder:
        return _locate_file(corpus, split, root / corpus.folder)
    commit = commit_of(corpus)
    return f"hub:{corpus.hub}@{commit}", commit


def commit_of(corpus: Corpus) -> str:
    """The commit of a hub text: its revision if that is one, else as the hub says.

    Raises ValueError where there is none; Unreachable where the hub cannot be reached.
    """
    try:
        return hub.commit(corpus.hub, corpus.revision or "", "data set")
    except hub.Unreachable as e:
        raise hub.Unreachable(f"{corpus.name}: the hub ({corpus.hub}) cannot be reached; "
                              "give --data DIR or CTP_DATA_DIR with a local copy") from e  # fmt: skip
    except ValueError as e:
        raise ValueError(f"{corpus.name}: {e}") from e


def _locate_file(corpus: Corpus, split: str, folder: Path) -> tuple[str, str]:
    endings = (".jsonl", ".txt") if corpus.path else (".jsonl",)
    for ending in endings:
        if (path := folder / f"{split}{ending}").is_file():
            check_text(path, _local_column(corpus), textfiles.sha256(path))
            return textfiles.pinned(f"file:{path}")
    there = [s for s in SPLITS for ending in endings if (folder / f"{s}{ending}").is_file()]
    layout = " or ".join(f"{split}{ending}" for ending in endings)
    rows = f'; a .jsonl has one {{"{_local_column(corpus)}": …}} a line'
    raise ValueError(
        f"{corpus.name}: {folder} has no {layout}" + (f" (it has: {', '.join(there)})" if there else "") + rows
    )


def _locate_divided(corpus: Corpus, path: Path) -> tuple[str, str]:
    if path.suffix not in (".jsonl", ".txt"):
        raise ValueError(f"{corpus.name}: {path} is neither .jsonl nor .txt")
    check_text(path, _local_column(corpus), textfiles.sha256(path))
    return textfiles.pinned(f"divide:{path}")


def read_documents(location: str, corpus: Corpus, split: str, first: int | None = None) -> list[str]:
    """The documents of a split, in their order, from the place that `locate` gave; `first`: only so many.

    Raises ValueError: a file that is gone or has a row without text, an unknown kind of location; Changed where it
    is not what was pinned.
    """
    textfiles.check_pinned(location)
    texts = _documents(location, corpus, split)
    textfiles.check_pinned(location)
    return texts[:first]


def _documents(location: str, corpus: Corpus, split: str) -> list[str]:
    scheme, _, place = textfiles.place(location).partition(":")
    if scheme == "package":
        return packaged.documents(place, split)
    if scheme == "hub":
        return _hub_documents(place, corpus, split)
    if scheme not in ("file", "divide"):
        raise ValueError(f"{corpus.name}: cannot read from {location!r}")
    path = Path(place)
    if not path.is_file():
        raise ValueError(f"{corpus.name}: {path} is missing on this machine")
    texts = rows(path, _local_column(corpus)) if path.suffix == ".jsonl" else [decoded(path, path.read_bytes())]
    if scheme == "divide":
        whole = texts if path.suffix == ".jsonl" else packaged.sections(texts[0])
        texts = packaged.part(whole, split, textfiles.PARTS_OF_FILE)
    return texts


def _local_column(corpus: Corpus) -> str:
    return corpus.column if corpus.path else "text"  # local copies of hub texts have one layout, whatever the hub's


def _hub_documents(place: str, corpus: Corpus, split: str) -> list[str]:
    rows = hub_rows(place, corpus, split)
    check_column(corpus, rows.column_names)
    return list(rows[corpus.column])


def hub_rows(place: str, corpus: Corpus, split: str, streaming: bool = False) -> Any:
    """A split of `id@commit` as `datasets` gives it; streaming: rows one after the other, fetched as they are read.

    Raises ValueError, in one sentence, where it is not to be had.
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
    """Raises ValueError, naming those there are, where a hub text has no such field. None: not known beforehand."""
    if columns is not None and corpus.column not in columns:
        raise ValueError(f"{corpus.name}: {unknown('field', corpus.column, columns)}")
