"""Whether a cell's settings fit its model, known from the model's configuration before any work starts."""

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ctp.architectures.families import Use
from ctp.cells import (
    Adapter,
    Bos,
    Checkpoint,
    Learned,
    LoRA,
    Neighbours,
    NoRecovery,
    RandomPrompt,
    Solver,
    SparseGPT,
    Task,
)
from ctp.cells.cell import Cell, Compress, Evaluate, Learn
from ctp.cells.inputs import Pinned, Spec, Windows
from ctp.cells.runtime import location
from ctp.data.specials import Specials
from ctp.models.sources import Facts


def misfits(cell: Cell, facts: Facts) -> list[str]:
    """What cannot work on this model: windows beyond the context, sizes that do not fit its layers."""
    name = model_of(cell).name
    if isinstance(cell, Compress):
        return _compress_misfits(cell, facts, name)
    if isinstance(cell, Learn):
        return _learn_misfits(cell, facts, name)
    assert isinstance(cell, Evaluate)
    measure, k = cell.measure, getattr(cell.recovery.recovery, "k", 0) if cell.recovery else 0
    fields = [n for n in ("seq_len", "new_tokens") if hasattr(measure, n)]
    fed = "text.seq_len" if hasattr(measure, "text") else " + ".join(fields) or "tokens"
    out = _beyond(f"measures.{fed}", measure.needed_tokens, k, facts, name)
    if measure.generates and cell.recovery and cell.recovery.recovery.in_front:
        out += _refused("generate", facts, name)
    if isinstance(measure, Neighbours) and measure.top > facts.vocab:
        out.append(f"measures.top = {measure.top}: the vocabulary of {name} has {facts.vocab} entries")
    return out


def unspoken(cell: Cell, specials: Callable[[], Specials | None]) -> list[str]:
    """What cannot work because the model's tokenizer lacks a special token. specials: called only where it matters."""
    model, asked = model_of(cell).name, [place for place, w in windows_of(cell) if w.bos == "each"]
    places = [f"{place}.bos = 'each'" for place in asked]
    if isinstance(cell, Learn) and isinstance(cell.recovery, Bos):
        places.append("recovery.method = 'bos'")
    task = cell.measure if isinstance(cell, Evaluate) and isinstance(cell.measure, Task) else None
    if not places and task is None:
        return []
    try:
        found = specials()
    except ValueError as e:
        return [str(e)]
    if found is None:
        return []
    out = [f"{p}: the tokenizer of {model} has no beginning-of-text token" for p in places if found.bos is None]
    if task is not None and found.bos is None and found.eos is None:
        out.append(f"measures.name = {task.name!r}: the tokenizer of {model} has neither a beginning-of-text nor an "
                   "end-of-text token, and a task needs one of them")  # fmt: skip
    return out


def namesakes(cells: Iterable[Cell], locations: Mapping[str, str]) -> list[str]:
    """Models, checkpoints, adapters and tasks from several places that have one short name.

    Tables, MLflow and --where go by these names, and could not tell them apart. locations: as `Runtime` has them.
    """
    places: dict[tuple[str, str], set[str]] = {}
    for cell in cells:
        for field in type(cell).model_fields:
            thing = getattr(cell, field)
            if isinstance(thing, Pinned) and not isinstance(thing, Windows):  # texts are called as the grid calls them
                called = getattr(thing, "method", "model"), getattr(thing, thing.NAMED_BY)
                places.setdefault(called, set()).add(location(locations, thing))
    return [
        f"{len(found)} {what}s are called {name!r} ({', '.join(sorted(map(_place, found)))}), and tables and "
        "MLflow could not tell them apart: rename one, or make a grid of each"
        for (what, name), found in places.items()
        if len(found) > 1
    ]


def _place(where: str) -> str:
    """A location as a person gave it; that of a task is JSON."""
    return str(json.loads(where)["task"]) if where.startswith("{") else where


def windows_of(cell: Cell) -> list[tuple[str, Windows]]:
    """(its place in the grid file, the windows) of every text that a cell itself reads."""
    fields: dict[str, Spec] = {"calibration": cell} if isinstance(cell, Compress) else {}
    if isinstance(cell, Learn):
        fields = {"recovery.text": cell.recovery, "recovery.validation": cell.recovery}
    elif isinstance(cell, Evaluate):
        fields = {"measures.text": cell.measure}
    found = [(place, getattr(holder, place.rpartition(".")[2], None)) for place, holder in fields.items()]
    return [(place, text) for place, text in found if isinstance(text, Windows)]


def _refused(use: Use, facts: Facts, name: str) -> list[str]:
    """What `ctp.architectures.families` says against this use of the model."""
    return [f"models: {name}: {facts.refused[use]}"] if use in facts.refused else []


def _beyond(setting: str, seq_len: int, k: int, facts: Facts, name: str) -> list[str]:
    if facts.context is None or seq_len + k <= facts.context:
        return []
    with_prompt = f" and a prompt of {k}" if k and seq_len <= facts.context else ""
    return [f"{setting} = {seq_len}{with_prompt}: beyond the context of {name}, {facts.context} tokens"]


def _compress_misfits(cell: Compress, facts: Facts, name: str) -> list[str]:
    spec, out = cell.compression, []
    if cell.calibration is not None:
        out += _beyond("calibration.seq_len", cell.calibration.seq_len, 0, facts, name)
    sizes = {"group_size": getattr(spec, "group_size", None)}
    if isinstance(spec, SparseGPT) and spec.pattern:
        sizes["pattern"] = spec.n_of_m[1]
    for setting, size in sizes.items():
        bad = [n for n in facts.in_features if size and n % size]
        if bad:
            out.append(f"compression.{setting} = {size} ({spec.label}): must divide the input sizes of "
                       f"{name}, not so for {bad[0]}")  # fmt: skip
    if isinstance(spec, Checkpoint) and (spec.parameters, spec.width) != (facts.parameters, facts.width):
        out.append(f"compression.path = {spec.path}: {spec.parameters:,} parameters, width {spec.width}; not a "
                   f"compressed {name}, which has {facts.parameters:,} and {facts.width}")  # fmt: skip
    if isinstance(spec, Solver) and not facts.in_features:
        out.append(f"models: {name} has no linear layers in its decoder blocks that could be compressed")
    elif isinstance(spec, Solver):
        out += _refused("compress", facts, name)
    return out


def _learn_misfits(cell: Learn, facts: Facts, name: str) -> list[str]:
    spec, out = cell.recovery, []
    if isinstance(spec, LoRA) or (spec.in_front and not isinstance(spec, NoRecovery)):
        out += _refused("prompt" if spec.in_front else "lora", facts, name)
    if isinstance(spec, Learned):
        blocks = getattr(spec, "layers", None) or 0
        if blocks > facts.layers:
            out.append(f"recovery.layers = {blocks}: {name} has {facts.layers} decoder blocks")
        out += _beyond("recovery.text.seq_len", spec.text.seq_len, spec.prompt_rows, facts, name)
        out = out or _beyond("recovery.validation.seq_len", spec.validation.seq_len, spec.prompt_rows, facts, name)
        if spec.precision == "fp32" and cell.source.model.dtype == "float16":
            out.append(f"recovery.precision = 'fp32': {name} is float16, whose gradients underflow: use bf16 or fp16")
    elif isinstance(spec, Adapter) and spec.width not in (0, facts.width):
        out.append(f"recovery.path = {spec.path}: a prompt of width {spec.width} does not fit "
                   f"{name}, whose embedding has {facts.width}")  # fmt: skip
    elif isinstance(spec, RandomPrompt) and spec.k > facts.vocab:
        out.append(f"recovery.k = {spec.k}: the vocabulary of {name} has {facts.vocab} entries")
    return out


def model_of(cell: Cell) -> Any:
    while not isinstance(cell, Compress):
        cell = cell.inputs[0]
    return cell.model
