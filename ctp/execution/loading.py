"""What cells read: models, prompts and token windows, kept while the next cell needs the same."""

from functools import lru_cache
from typing import TYPE_CHECKING

from torch import Tensor

from ctp.cells import Dense
from ctp.cells.cell import Compress, Evaluate, key
from ctp.cells.inputs import Windows
from ctp.cells.runtime import Runtime, location
from ctp.data.documents import read_documents
from ctp.data.texts import find, parse_corpus
from ctp.data.windows import cut_windows, tokenizer_sha256
from ctp.machine.arithmetic import widen
from ctp.models.load import load_model
from ctp.storage.ref import ref
from ctp.storage.store import Store

if TYPE_CHECKING:  # transformers takes seconds
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ctp.prompts.prefix import Prefix

Loaded = tuple["PreTrainedModel", "PreTrainedTokenizerBase"]
_held: tuple[tuple[str, bool], Loaded] | None = None  # the last model, by its key
_in_front: "tuple[tuple[str, ...], Prefix] | None" = None  # the last prompt, by the keys of its cell's inputs
_windows: dict[tuple[Windows, str], Tensor] = {}


def forget(texts: bool = False) -> None:
    """Free the model that stayed loaded, and its prompt; texts: and all token windows."""
    global _held, _in_front
    _held = _in_front = None
    tokenizer_digest.cache_clear()
    if texts:
        _windows.clear()


def load_compressed(cell: Compress, store: Store, runtime: Runtime, device: str, packed: bool = False) -> Loaded:
    """(model, tokenizer) of a finished Compress cell, in the dtype its device computes in.

    The last one stays loaded: cells of one target come together.
    """
    global _held
    wanted = key(cell), packed
    if _held is None or _held[0] != wanted:
        forget()  # the old weights, before the new ones come
        model, tokenizer = open_model(cell, store, runtime, device, packed)
        widen(model)
        _held = wanted, (model, tokenizer)
    return _held[1]


def prompt_prefix(cell: Evaluate, model: "PreTrainedModel", prompt: Tensor) -> "Prefix":
    """The keys and values of the cell's prompt in its target. The last ones stay: cells of one prompt come together."""
    global _in_front
    inputs = tuple(key(i) for i in cell.inputs)
    if _in_front is None or _in_front[0] != inputs:
        import torch

        from ctp.prompts.attach import frozen
        from ctp.prompts.prefix import prefix

        _in_front = None  # the old ones, before the new ones come
        with frozen(model), torch.no_grad():
            _in_front = inputs, prefix(model, prompt)
    return _in_front[1]


def open_model(cell: Compress, store: Store, runtime: Runtime, device: str, packed: bool = False) -> Loaded:
    """(model in eval mode, tokenizer) of a finished Compress cell, unpacked to ordinary weights bit for bit.

    packed: weights stay packed, and are unpacked at every use.
    """
    if isinstance(cell.compression, Dense):
        return load_base(cell, runtime, device)
    from ctp.formats.artifact import Compressed

    small = Compressed.open(store.fetch(ref(cell)))
    return small.model(device, packed), small.tokenizer


def load_base(cell: Compress, runtime: Runtime, device: str) -> Loaded:
    """(model in eval mode, tokenizer) before compression."""
    where = location(runtime.locations, cell.model)
    return load_model(where, cell.model.revision, cell.model.dtype, device)


def token_windows(spec: Windows, tokenizer: "PreTrainedTokenizerBase", runtime: Runtime) -> Tensor:
    """The token ids (n, seq_len) of `spec`, kept for the next cell that reads the same."""
    memo = (spec, tokenizer_digest(tokenizer))
    if memo not in _windows:
        custom = {n: parse_corpus(n, d) for n, d in runtime.datasets.items()}
        corpus = find(spec.dataset, custom)
        last = None if spec.documents is None else spec.skip + spec.documents
        documents = read_documents(location(runtime.locations, spec), corpus, spec.split, last)
        _windows[memo] = cut_windows(spec, documents, tokenizer)
    return _windows[memo]


@lru_cache(maxsize=1)
def tokenizer_digest(tokenizer: "PreTrainedTokenizerBase") -> str:
    """`tokenizer_sha256`, kept by object: every cell needs it, and it hashes megabytes."""
    return tokenizer_sha256(tokenizer)
