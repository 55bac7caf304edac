"""What cells read: models, prompts and token windows, kept while the next cell needs the same."""

from functools import lru_cache
from typing import TYPE_CHECKING, Any

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
    from ctp.prompts.prefix import Prefix


_held: tuple[tuple[str, bool], Any, Any] | None = None
_in_front: "tuple[tuple[str, ...], Prefix] | None" = None


def forget(texts: bool = False) -> None:
    """Free the model that stayed loaded, and what came of it; texts: and the windows of all texts."""
    global _held, _in_front
    _held = _in_front = None
    _sha256.cache_clear()
    if texts:
        _windows.clear()


def load_compressed(
    cell: Compress, store: Store, runtime: Runtime, device: str, packed: bool = False
) -> tuple[Any, Any]:
    """(model, tokenizer) of a finished Compress cell, held as its device computes it. The last one stays loaded: cells
    of one target come together.
    """
    global _held
    wanted = key(cell), packed
    if _held is None or _held[0] != wanted:
        forget()  # the old weights before the new ones come
        model, tokenizer = open_model(cell, store, runtime, device, packed)
        widen(model)
        _held = wanted, model, tokenizer
    return _held[1], _held[2]


def _prefix(cell: Evaluate, model: Any, prompt: Tensor) -> "Prefix":
    """The keys and values of the cell's prompt in its target. The last ones stay: cells of one prompt come together."""
    global _in_front
    inputs = tuple(key(i) for i in cell.inputs)
    if _in_front is None or _in_front[0] != inputs:
        import torch

        from ctp.prompts.attach import frozen
        from ctp.prompts.prefix import prefix

        _in_front = None  # the old ones before the new ones come
        with frozen(model), torch.no_grad():
            _in_front = inputs, prefix(model, prompt)
    return _in_front[1]


def open_model(cell: Compress, store: Store, runtime: Runtime, device: str, packed: bool = False) -> tuple[Any, Any]:
    """(model in eval mode, tokenizer) of a finished Compress cell, unpacked to ordinary weights bit for bit.

    packed: they are unpacked at every use only.
    """
    if isinstance(cell.compression, Dense):
        return _load_base(cell, runtime, device)
    from ctp.formats.artifact import Compressed

    small = Compressed.open(store.fetch(ref(cell)))
    return small.model(device, packed), small.tokenizer


def _load_base(cell: Compress, runtime: Runtime, device: str) -> tuple[Any, Any]:
    where = location(runtime.locations, cell.model)
    return load_model(where, cell.model.revision, cell.model.dtype, device)


_windows: dict[tuple[Windows, str], Tensor] = {}


def token_windows(spec: Windows, tokenizer: Any, runtime: Runtime) -> Tensor:
    """The token ids (n, seq_len) that the spec names, kept for the next cell that asks."""
    memo = (spec, _sha256(tokenizer))
    if memo not in _windows:
        custom = {n: parse_corpus(n, d) for n, d in runtime.datasets.items()}
        corpus = find(spec.dataset, custom)
        last = None if spec.documents is None else spec.skip + spec.documents
        documents = read_documents(location(runtime.locations, spec), corpus, spec.split, last)
        _windows[memo] = cut_windows(spec, documents, tokenizer)
    return _windows[memo]


@lru_cache(maxsize=1)
def _sha256(tokenizer: Any) -> str:
    """Asked by every cell, and megabytes to digest: kept by object, since nothing changes a loaded tokenizer."""
    return tokenizer_sha256(tokenizer)
