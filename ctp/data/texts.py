"""The texts that windows are cut from: c4, wikitext2, ptb, packaged texts, and those that a grid file defines."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ctp.common.files import expanded
from ctp.common.messages import shown, unknown

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Corpus:
    """A text and where it comes from: the hub, a package (`packaged`), or `path` on this machine.

    join: what stands between two documents. folder: below a local data folder. hub, config, data_files (by split),
    revision: arguments of `datasets.load_dataset`. column: the field that holds the text.
    """

    name: str
    join: str
    splits: tuple[str, ...] = SPLITS
    packaged: bool = False
    folder: str = ""
    path: str = ""
    hub: str = ""
    config: str | None = None
    data_files: Mapping[str, Any] | None = field(default=None, hash=False)
    revision: str | None = None
    column: str = "text"


CORPORA: dict[str, Corpus] = {
    corpus.name: corpus
    for corpus in (
        Corpus(
            "c4",
            " ",
            splits=("train", "validation"),  # C4 has no test split: everyone evaluates on validation
            folder="c4",
            hub="allenai/c4",
            revision="1588ec454efa1a09f29cd18ddd04fe05fc8653a2",
            data_files={
                "train": "en/c4-train.00000-of-01024.json.gz",
                "validation": "en/c4-validation.00000-of-00008.json.gz",
            },
        ),
        Corpus(
            "wikitext2",
            "\n\n",
            folder="wikitext-2-raw",
            hub="Salesforce/wikitext",
            config="wikitext-2-raw-v1",
            revision="b08601e04326c79dfdd32d625aee71d232d685c3",
        ),
        Corpus(
            "ptb",
            " ",
            folder="ptb",
            hub="ptb-text-only/ptb_text_only",
            revision="refs/convert/parquet",  # its main branch is a loading script, which datasets no longer runs
            column="sentence",
        ),
        Corpus("wikipedia", "\n\n", packaged=True),
        Corpus("newswire", "\n\n", packaged=True),
        Corpus("pydoc", "\n\n", packaged=True),
    )
}

_FROM_PATH = {"path", "join", "field"}
_FROM_HUB = {"hub", "config", "data_files", "field", "join", "revision"}


def parse_corpus(name: str, mapping: Mapping[str, Any]) -> Corpus:
    """A text that a grid file defines: `{path: FOLDER_OR_FILE}` or `{hub: ID}`, and options.

    path: a folder with `{split}.jsonl` (documents in the field `field`) or `{split}.txt` (one document), or one such
    file, of which one document (or section of a .txt) in ten is validation, one is test. hub: with `config`,
    `data_files` ({split: files}), `revision`. `field` defaults to "text", `join` to a blank line.

    Raises ValueError: a built-in's name, unknown keys, neither or both of path and hub, a value that is no string.
    """
    if name in CORPORA:
        raise ValueError(f"data set {name!r} is built in: give your text another name")
    if not re.fullmatch(r"\w[\w.-]{0,99}", name):
        raise ValueError(f"the data set's name {shown(name)}: letters, digits and . - _ only, 100 at most")
    if not isinstance(mapping, Mapping) or ("path" in mapping) == ("hub" in mapping):
        raise ValueError(f"data set {name!r} needs either 'path' (a folder or file) or 'hub' (a data set's id)")
    allowed = _FROM_PATH if "path" in mapping else _FROM_HUB
    for key, value in mapping.items():
        if key not in allowed:
            raise ValueError(f"data set {name!r}: {unknown('key', key, allowed)}")
        if key == "data_files":
            _check_data_files(name, value)
        elif not isinstance(value, str) or (not value and key != "join"):
            raise ValueError(f"data set {name!r}: {key} = {shown(value)} must be a non-empty string")
    options = {key: mapping[key] for key in ("path", "hub", "config", "data_files", "revision") if key in mapping}
    splits = tuple(s for s in SPLITS if s in mapping.get("data_files", SPLITS))
    return Corpus(name, mapping.get("join", "\n\n"), splits, column=mapping.get("field", "text"), **options)


def _check_data_files(name: str, value: Any) -> None:
    if not isinstance(value, Mapping) or not value:
        raise ValueError(f"data set {name!r}: data_files = {shown(value)} must map a split to its files")
    for split in value:
        if split not in SPLITS:
            raise ValueError(f"data set {name!r}: data_files: {unknown('split', split, SPLITS)}")
    for split, files in value.items():
        listed = files if isinstance(files, list) and files else [files]
        if not all(isinstance(f, str) and f for f in listed):
            where = f"data set {name!r}: data_files.{split}"
            raise ValueError(f"{where} = {shown(files)} must be a file or a list of files")


def find(name: str, custom: Mapping[str, Corpus] | None = None, data_dir: str | Path | None = None) -> Corpus:
    """The text called `name`: one of `custom`, a built-in, or a folder of that name in the local data folder.

    Raises ValueError with the names there are.
    """
    known = {**CORPORA, **(custom or {})}
    if name in known:
        return known[name]
    root = local_root(data_dir)
    if root is not None and re.fullmatch(r"\w[\w.-]*", name) and (root / name).is_dir():
        return Corpus(name, "\n\n", path=str(root / name))
    raise ValueError(unknown("data set", name, known))


def local_root(data_dir: str | Path | None) -> Path | None:
    """The local data folder: `data_dir`, else $CTP_DATA_DIR, else None."""
    given = data_dir or os.environ.get("CTP_DATA_DIR")
    return expanded(given).absolute() if given else None
