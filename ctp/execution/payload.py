"""Checks, before anything is stored, that a method wrote what the cells that need its result are going to open."""

from pathlib import Path

from safetensors.torch import load_file

from ctp.cells import Dense
from ctp.cells.cell import Cell, Compress, Learn
from ctp.formats.artifact import PACKED, REST
from ctp.models.adapters import ADAPTER, CONFIG, adapter_facts
from ctp.models.files import shapes
from ctp.prompts.adapter import prompt_rows

MODEL = (PACKED, REST, "config.json")  # what `Compressed.save` writes
PROMPT = (CONFIG, ADAPTER)


def check(cell: Cell, folder: Path, width: int) -> None:
    """Raises ValueError if `folder` lacks the compressed model or adapter that the cell makes, or it cannot be used.

    Reads the headers of a model, the numbers of an adapter. width: of the model's embedding, for an adapter.
    """
    if isinstance(cell, Compress) and not isinstance(cell.compression, Dense):
        _there(folder, MODEL, f"the compression {cell.compression.method!r} wrote no model",
               "Compressed.save(job.folder) writes one")  # fmt: skip
        for name in (PACKED, REST):
            shapes(folder / name)
    elif isinstance(cell, Learn):
        who = f"the recovery {cell.recovery.method!r}"
        _there(folder, PROMPT, f"{who} wrote no adapter",
               "ctp.plugin.save_prompt(job.folder, …) writes one, or PEFT's save_pretrained")  # fmt: skip
        try:
            _adapter(folder, width)
        except (ValueError, KeyError) as e:
            raise ValueError(f"{who} wrote an adapter that cannot be used: {e}") from e


def _there(folder: Path, names: tuple[str, ...], problem: str, remedy: str) -> None:
    if lacking := [name for name in names if not (folder / name).is_file()]:
        raise ValueError(f"{problem}: {' and '.join(lacking)} missing from job.folder; {remedy}")


def _adapter(folder: Path, width: int) -> None:
    facts = adapter_facts(folder)
    if facts.kind == "prompt":
        prompt_rows(folder, facts)
        if facts.width != width:
            raise ValueError(f"its rows have {facts.width} numbers, but the model's embedding has {width}")
    for name, tensor in load_file(folder / ADAPTER).items():
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"{name} in {ADAPTER} holds numbers that are not finite")
