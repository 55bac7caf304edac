"""Models and exports by the key of a stored artifact."""

from pathlib import Path
from typing import TYPE_CHECKING

from ctp.cells import Dense
from ctp.cells.cell import Compress, Learn
from ctp.cells.labels import slug
from ctp.cells.runtime import Runtime
from ctp.common.files import new_folder
from ctp.formats import FORMATS
from ctp.models.adapters import copy_adapter
from ctp.models.hf import quiet
from ctp.models.sources import locate
from ctp.storage.catalog import find
from ctp.storage.ref import ref
from ctp.storage.store import Store, default_store

if TYPE_CHECKING:  # torch
    from ctp.execution.loading import Loaded


def load_key(text: str, uri: str | None, device: str) -> "Loaded":
    """(model, tokenizer) of the Compress or Learn cell with that key, a learned prompt or adapter attached.

    Raises ValueError if it is no model, or the base model is not where it was; StoreError from the store.
    """
    from ctp.execution.loading import open_model  # torch: not for `ls`
    from ctp.prompts.adapter import attach_adapter

    store = Store(uri or default_store())
    cell, _ = find(store, text)
    if not isinstance(cell, Compress | Learn):
        raise ValueError(f"{text} is an evaluation ({slug(cell)}): there is no model in it")
    model, tokenizer = open_model(cell.base, store, _runtime(cell.base, store), device)
    if isinstance(cell, Learn):
        model = attach_adapter(model, store.fetch(ref(cell)))
    return model, tokenizer


def export_key(text: str, store: Store, folder: Path, format: str) -> list[str]:
    """Write the artifact with that key into `folder`; returns what a reader must know. Raises as `load_key`."""
    from transformers import PreTrainedModel

    from ctp.execution.loading import open_model
    from ctp.formats.artifact import Compressed, save_model
    from ctp.formats.export import export

    cell, _ = find(store, text)
    dense = isinstance(cell, Compress) and isinstance(cell.compression, Dense)
    allowed: tuple[str, ...] = ("hf",) if dense else FORMATS
    if not isinstance(cell, Compress):
        allowed = ("peft",) if isinstance(cell, Learn) else ()
    if format not in allowed:
        why = ", ".join(allowed) if allowed else "none, it is an evaluation"
        raise ValueError(f"--format {format}: for {slug(cell)} allowed: {why}")
    if isinstance(cell, Compress) and not dense:
        return export(Compressed.open(store.fetch(ref(cell))), folder, format)
    with quiet(), new_folder(folder) as work:
        if isinstance(cell, Compress):
            for part in open_model(cell, store, _runtime(cell, store), "cpu"):
                save_model(part, work) if isinstance(part, PreTrainedModel) else part.save_pretrained(work)
            return []
        assert isinstance(cell, Learn)
        copy_adapter(store.fetch(ref(cell)), work)
    made = f"Learned through {slug(cell.source)}" if cell.recovery.learned else "Imported, not learned here"
    return [f"{made}: PeftModel.from_pretrained(model, {str(folder)!r})."]


def _runtime(cell: Compress, store: Store) -> Runtime:
    """With the location of a dense artifact's model: where it was when the artifact was made, if it is the same."""
    if not isinstance(cell.compression, Dense):
        return Runtime()
    where = store.manifest(ref(cell))["location"]
    revision = locate(where.removeprefix("hub:"), cell.model.revision if where.startswith("hub:") else "")[1]
    if revision != cell.model.revision:
        raise ValueError(f"the model at {where} is no longer the one of {slug(cell)}: its revision is {revision}")
    return Runtime(locations={f"{cell.model.name}@{cell.model.revision}": where})
