"""Whether a cell's settings fit its model, known from the model's configuration before any work starts."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from ctp import cells
from ctp.architectures.families import Use
from ctp.cells.cell import Cell, Compress, Evaluate, Learn
from ctp.cells.inputs import Pinned, Windows
from ctp.cells.runtime import location
from ctp.data.specials import Specials
from ctp.models.sources import Facts


def misfits(cell: Cell, facts: Facts) -> list[str]:
    """What cannot work on this model: windows beyond the context, sizes that do not fit its layers."""
    model = _Model(cell.model.name, facts)
    if isinstance(cell, Compress):
        return list(_compress_misfits(cell, model))
    return list(_learn_misfits(cell, model) if isinstance(cell, Learn) else _evaluate_misfits(cell, model))


@dataclass(frozen=True)
class _Model:
    """A model's short name, and what is known of it."""

    name: str
    facts: Facts

    def refuses(self, use: Use) -> Iterator[str]:
        """Why `ctp.architectures.families` refuses this use of the model."""
        if use in self.facts.refused:
            yield f"models: {self.name}: {self.facts.refused[use]}"

    def too_long(self, setting: str, tokens: int, rows: int = 0) -> Iterator[str]:
        """`tokens` of input behind a prompt of `rows`: do they exceed the context?"""
        context = self.facts.context
        if context is not None and tokens + rows > context:
            prompt = f" and a prompt of {rows}" if rows and tokens <= context else ""
            yield f"{setting} = {tokens}{prompt}: beyond the context of {self.name}, {context} tokens"


def _compress_misfits(cell: Compress, model: _Model) -> Iterator[str]:
    spec, facts, name = cell.compression, model.facts, model.name
    if cell.calibration is not None:
        yield from model.too_long("calibration.seq_len", cell.calibration.seq_len)
    sizes = {"group_size": getattr(spec, "group_size", None)}
    if isinstance(spec, cells.SparseGPT) and spec.pattern:
        sizes["pattern"] = spec.n_of_m[1]
    for setting, size in sizes.items():
        bad = [n for n in facts.in_features if size and n % size]
        if bad:
            yield (f"compression.{setting} = {size} ({spec.label}): must divide the input sizes of {name}, not so for "
                   f"{bad[0]}")  # fmt: skip
    if isinstance(spec, cells.Checkpoint) and (spec.parameters, spec.width) != (facts.parameters, facts.width):
        yield (f"compression.path = {spec.path}: {spec.parameters:,} parameters, width {spec.width}; not a "
               f"compressed {name}, which has {facts.parameters:,} and {facts.width}")  # fmt: skip
    if isinstance(spec, cells.Solver) and not facts.in_features:
        yield f"models: {name} has no linear layers in its decoder blocks that could be compressed"
    elif isinstance(spec, cells.Solver):
        yield from model.refuses("compress")


def _learn_misfits(cell: Learn, model: _Model) -> Iterator[str]:
    spec, facts, name = cell.recovery, model.facts, model.name
    if isinstance(spec, cells.LoRA) or (spec.in_front and not isinstance(spec, cells.NoRecovery)):
        yield from model.refuses("prompt" if spec.in_front else "lora")
    if isinstance(spec, cells.Learned):
        yield from _learned_misfits(spec, cell.model.dtype, model)
    elif isinstance(spec, cells.Adapter) and spec.width not in (0, facts.width):
        yield (f"recovery.path = {spec.path}: a prompt of width {spec.width} does not fit {name}, whose embedding has "
               f"{facts.width}")  # fmt: skip
    elif isinstance(spec, cells.RandomPrompt) and spec.k > facts.vocab:
        yield f"recovery.k = {spec.k}: the vocabulary of {name} has {facts.vocab} entries"


def _learned_misfits(spec: cells.Learned, dtype: str, model: _Model) -> Iterator[str]:
    blocks = getattr(spec, "layers", None) or 0
    if blocks > model.facts.layers:
        yield f"recovery.layers = {blocks}: {model.name} has {model.facts.layers} decoder blocks"
    long_text = [*model.too_long("recovery.text.seq_len", spec.text.seq_len, spec.prompt_rows)]
    yield from long_text or model.too_long("recovery.validation.seq_len", spec.validation.seq_len, spec.prompt_rows)
    if spec.precision == "fp32" and dtype == "float16":
        yield f"recovery.precision = 'fp32': {model.name} is float16, whose gradients underflow: use bf16 or fp16"


def _evaluate_misfits(cell: Evaluate, model: _Model) -> Iterator[str]:
    measure = cell.measure
    counts = [n for n in ("seq_len", "new_tokens") if hasattr(measure, n)]
    fed = "text.seq_len" if hasattr(measure, "text") else " + ".join(counts) or "tokens"
    yield from model.too_long(f"measures.{fed}", measure.needed_tokens, cell.prompt_rows)
    if measure.generates and cell.recovery and cell.recovery.recovery.in_front:
        yield from model.refuses("generate")
    if isinstance(measure, cells.Neighbours) and measure.top > model.facts.vocab:
        yield f"measures.top = {measure.top}: the vocabulary of {model.name} has {model.facts.vocab} entries"


def missing_tokens(cell: Cell, specials: Callable[[], Specials | None]) -> list[str]:
    """What cannot work because the model's tokenizer lacks a special token. specials: called only where it matters."""
    places = [f"{place}.bos = 'each'" for place, text in windows_of(cell) if text.bos == "each"]
    if isinstance(cell.method, cells.Bos):
        places.append("recovery.method = 'bos'")
    if not places and not isinstance(cell.method, cells.Task):
        return []
    try:
        found = specials()
    except ValueError as e:
        return [str(e)]
    if found is None or found.bos is not None:
        return []
    out = [f"{place}: the tokenizer of {cell.model.name} has no beginning-of-text token" for place in places]
    if isinstance(cell.method, cells.Task) and found.eos is None:
        out.append(f"measures.name = {cell.method.name!r}: the tokenizer of {cell.model.name} has neither a "
                   "beginning-of-text nor an end-of-text token, and a task needs one of them")  # fmt: skip
    return out


def namesakes(planned: Iterable[Cell], locations: Mapping[str, str]) -> list[str]:
    """Models, checkpoints, adapters and tasks from several places that have one short name.

    Tables, MLflow and --where go by these names, and could not tell them apart. locations: as `Runtime` has them.
    """
    places: dict[tuple[str, str], set[str]] = {}
    for cell in planned:
        for field in type(cell).model_fields:
            thing = getattr(cell, field)
            if isinstance(thing, Pinned) and not isinstance(thing, Windows):  # texts are called as the grid calls them
                what, name = getattr(thing, "method", "model"), getattr(thing, thing.NAMED_BY)
                places.setdefault((what, name), set()).add(location(locations, thing))
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
    if isinstance(cell, Compress):
        texts = {"calibration": cell.calibration}
    else:
        axis = "recovery" if isinstance(cell, Learn) else "measures"
        texts = {f"{axis}.{field}": getattr(cell.method, field, None) for field in ("text", "validation")}
    return [(place, text) for place, text in texts.items() if isinstance(text, Windows)]
