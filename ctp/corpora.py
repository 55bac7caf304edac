"""Texts and the token windows cut from them.

`locate` pins a text when a grid is planned, `documents` reads it on a worker, `windows` cuts it. Importing this module
loads neither torch nor datasets nor gensim: planning stays fast.
"""

import hashlib
import json
import logging
import random
import sys
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ctp import hub, packaged_text, textpins
from ctp.inputs import Windows
from ctp.names import shown, unknown
from ctp.paths import expanded, there
from ctp.textfiles import check_text, decoded, rows
from ctp.texts import CORPORA, SPLITS, Corpus, find, local_root, parse_corpus

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

__all__ = ["CORPORA", "SPLITS", "Corpus", "documents", "find", "locate", "parse_corpus", "text_stats", "windows"]

log = logging.getLogger(__name__)


# ------------------------------------------------------------------- pinning


def locate(corpus: Corpus, split: str, data_dir: str | Path | None = None) -> tuple[str, str]:
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
        return textpins.pinned(f"package:{corpus.name}")
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
            check_text(path, _local_column(corpus), textpins.sha256(path))
            return textpins.pinned(f"file:{path}")
    there = [s for s in SPLITS for ending in endings if (folder / f"{s}{ending}").is_file()]
    layout = " or ".join(f"{split}{ending}" for ending in endings)
    rows = f'; a .jsonl has one {{"{_local_column(corpus)}": …}} a line'
    raise ValueError(
        f"{corpus.name}: {folder} has no {layout}" + (f" (it has: {', '.join(there)})" if there else "") + rows
    )


def _locate_divided(corpus: Corpus, path: Path) -> tuple[str, str]:
    if path.suffix not in (".jsonl", ".txt"):
        raise ValueError(f"{corpus.name}: {path} is neither .jsonl nor .txt")
    check_text(path, _local_column(corpus), textpins.sha256(path))
    return textpins.pinned(f"divide:{path}")


# ------------------------------------------------------------------- reading


def documents(location: str, corpus: Corpus, split: str, first: int | None = None) -> list[str]:
    """The documents of a split, in their order, from the place that `locate` gave; `first`: only so many.

    Raises ValueError: a file that is gone or has a row without text, an unknown kind of location; Changed where it
    is not what was pinned.
    """
    textpins.check_pinned(location)
    texts = _documents(location, corpus, split)
    textpins.check_pinned(location)
    return texts[:first]


def _documents(location: str, corpus: Corpus, split: str) -> list[str]:
    scheme, _, place = textpins.place(location).partition(":")
    if scheme == "package":
        return packaged_text.documents(place, split)
    if scheme == "hub":
        return _hub_documents(place, corpus, split)
    if scheme not in ("file", "divide"):
        raise ValueError(f"{corpus.name}: cannot read from {location!r}")
    path = Path(place)
    if not path.is_file():
        raise ValueError(f"{corpus.name}: {path} is missing on this machine")
    texts = rows(path, _local_column(corpus)) if path.suffix == ".jsonl" else [decoded(path, path.read_bytes())]
    if scheme == "divide":
        whole = texts if path.suffix == ".jsonl" else packaged_text.sections(texts[0])
        texts = packaged_text.part(whole, split, textpins.PARTS_OF_FILE)
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


# ------------------------------------------------------------------- windows

# Tokens read beyond the windows asked for when documents are left over: what follows them cannot change them, because
# tokenizers decide word by word.
_MARGIN = 1024


def windows(spec: Windows, documents: Sequence[str], tokenizer: "PreTrainedTokenizerBase") -> "torch.LongTensor":
    """The token ids of `spec`: int64 (n, seq_len), with special tokens as `Windows.bos` says.

    Sequential windows are those of all documents joined and tokenised in one go. With `count`, only as many documents
    are tokenised as it takes. Crops: a document is drawn, with replacement, from those longer than seq_len, then one
    of its windows, all alike likely; global random state is neither used nor changed.

    Raises ValueError when there are fewer windows than `count`, none at all, no document longer than a crop, or no BOS
    to put in front of each.
    """
    import torch

    if spec.bos == "each" and tokenizer.bos_token_id is None:
        raise ValueError(f"{_title(spec)}: bos = 'each': the tokenizer has no beginning-of-text token")
    front = [tokenizer.bos_token_id] if spec.bos == "each" else []

    documents = documents[spec.skip :]
    if spec.documents is not None:
        if len(documents) < spec.documents:
            log.warning("%s has %d documents after %d, not %d", _title(spec), len(documents), spec.skip, spec.documents)
        documents = documents[: spec.documents]
    cut = _crops if spec.sampling == "crops" else _sequential
    return torch.LongTensor([front + ids for ids in cut(spec, documents, tokenizer, spec.seq_len - len(front))])


def _title(spec: Windows) -> str:
    return f"{spec.dataset}/{spec.split}"


def _tokens(spec: Windows, tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    # verbose=False: a text longer than the model's context is no mistake here
    special = spec.bos == "first"
    return list(tokenizer(text, add_special_tokens=special, return_attention_mask=False, verbose=False)["input_ids"])


def _sequential(
    spec: Windows, documents: Sequence[str], tokenizer: "PreTrainedTokenizerBase", size: int
) -> list[list[int]]:
    """Pieces of `size` tokens, one after the other."""
    join = spec.join if spec.join is not None else find(spec.dataset).join
    wanted = None if spec.count is None else spec.count * size + _MARGIN
    used = len(documents) if wanted is None else _enough(documents, 5 * wanted)
    while True:
        ids = _tokens(spec, tokenizer, join.join(documents[:used]))
        if wanted is None or used >= len(documents) or len(ids) >= wanted:
            break
        used *= 2
    n = len(ids) // size
    if n < (spec.count or 1):
        asked = "" if spec.count is None else f"; {spec.count} are asked for"
        raise ValueError(f"{_title(spec)} has {len(ids)} tokens, {n} windows of {spec.seq_len}{asked}")
    n = n if spec.count is None else spec.count
    return [ids[i * size : (i + 1) * size] for i in range(n)]


def _enough(documents: Sequence[str], characters: int) -> int:
    for used, text in enumerate(documents, 1):
        characters -= len(text)
        if characters <= 0:
            return used
    return len(documents)


def _crops(spec: Windows, documents: Sequence[str], tokenizer: "PreTrainedTokenizerBase", size: int) -> list[list[int]]:
    """Pieces of `size` tokens out of longer documents."""
    assert spec.count is not None
    draw = random.Random(spec.seed)
    candidates = list(range(len(documents)))  # those not yet known to be short
    crops: list[list[int]] = []
    while len(crops) < spec.count:
        if not candidates:
            raise ValueError(f"{_title(spec)} has no document of more than {size} tokens to crop")
        at = draw.randrange(len(candidates))
        ids = _tokens(spec, tokenizer, documents[candidates[at]])
        if len(ids) <= size:
            candidates[at] = candidates[-1]
            candidates.pop()
            continue
        start = draw.randrange(len(ids) - size + 1)
        crops.append(ids[start : start + size])
    return crops


def text_stats(
    windows: "torch.Tensor", tokenizer: "PreTrainedTokenizerBase", sha256: str | None = None
) -> dict[str, Any]:
    """What a perplexity depends on besides the model: tokenizer_sha256, tokens (count), unk (count).

    sha256: the tokenizer's, where it is known. unk is 0 where the tokenizer has no unknown token of its own, as in
    byte-level ones that lend it another's id.
    """
    unk = tokenizer.unk_token_id
    own = unk is not None and unk not in (tokenizer.bos_token_id, tokenizer.eos_token_id)
    return {
        "tokenizer_sha256": sha256 or tokenizer_sha256(tokenizer),
        "tokens": windows.numel(),
        "unk": int((windows == unk).sum()) if own else 0,
    }


def tokenizer_sha256(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Hex digest of how a tokenizer cuts text: its serialised backend, else its vocabulary."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return _state_sha256(json.dumps({"vocab": tokenizer.get_vocab()}) if backend is None else backend.to_str())


@lru_cache(maxsize=1)  # all targets of a model have one tokenizer, whose state is megabytes of JSON
def _state_sha256(serialised: str) -> str:
    state: dict[str, Any] = json.loads(serialised)
    for name in ("truncation", "padding"):  # left there by whoever called the tokenizer last
        state.pop(name, None)
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


if __name__ == "__main__":
    from ctp.prepare import main

    sys.exit(main())
