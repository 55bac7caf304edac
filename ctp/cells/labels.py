"""How a cell is named to people: a slug for folders and lines, axes to filter and pivot by."""

import hashlib
from typing import Any

from ctp.cells import Adapter, Learned
from ctp.cells.cell import Cell, Compress, Evaluate, Learn, canonical

DATA_FIELDS = {"text", "name", "revision", "questions"}  # of a measure: what is read; the rest says how it is asked


def origin(cell: Learn) -> str:
    """What a recovery was learned through: a compression's label, "untrained" or "imported"."""
    if cell.recovery.learned:
        return cell.source.compression.label
    return "imported" if isinstance(cell.recovery, Adapter) else "untrained"


def slug(cell: Cell) -> str:
    """A readable name for folders and lines of output."""
    if isinstance(cell, Compress):
        parts = [cell.model.name, cell.compression.label]
    elif isinstance(cell, Learn):
        parts = [cell.source.model.name, origin(cell), cell.recovery.label]
    elif isinstance(cell, Evaluate):
        source = cell.recovery
        won = f"{origin(source)}_{source.recovery.label}" if source else "none"
        parts = [slug(cell.target), won, cell.measure.label]
    else:
        raise TypeError(f"no slug for {type(cell).__name__}")
    return "_".join(p.replace("/", "--").replace(":", "of") for p in parts)


def axes(cell: Cell) -> dict[str, str | int | float | bool]:
    """Every axis a person may filter or pivot by, flat. Evaluate has `source`/`target`; `none` marks no recovery."""
    out: dict[str, Any] = {"kind": cell.kind}
    base = cell if isinstance(cell, Compress) else cell.source if isinstance(cell, Learn) else None
    if isinstance(cell, Evaluate):
        base = cell.target
        measure = cell.measure.model_dump(mode="json")
        out |= {"measure": measure.pop("method"), "target": base.compression.label}
        text = measure.get("text")
        said = text if isinstance(text, dict) else measure
        out |= {n: v for n, v in said.items() if n in ("dataset", "split", "seq_len", "bos")}
        if out["measure"] == "task":
            out |= {"task": measure["name"], "shots": measure["shots"]}
        out |= {"source": "none", "recovery": "none", "k": 0}
    learned = cell if isinstance(cell, Learn) else cell.recovery if isinstance(cell, Evaluate) else None
    if learned is not None:
        recovery = learned.recovery
        out |= {"source": origin(learned), "recovery": recovery.method, "k": getattr(recovery, "k", 0)}
        out |= {"seed": getattr(recovery, "seed", None), "rank": getattr(recovery, "r", None)}
        if isinstance(recovery, Learned):
            out["learned_on"] = recovery.text.dataset
        if isinstance(recovery, Adapter):
            out["adapter"] = recovery.path
        out["recovery_label"] = recovery.label
    assert isinstance(base, Compress)
    out |= {"model": base.model.name, "dtype": base.model.dtype, "compression": base.compression.label}
    own = base.compression.model_dump(mode="json")
    out |= {n: v for n, v in own.items() if n in ("method", "bits", "sparsity", "pattern", "group_size")}
    if base.calibration is not None:
        out |= {"calibration": base.calibration.dataset, "calibration_seed": base.calibration.seed}
    return {n: v for n, v in out.items() if v is not None}


def params(cell: Cell) -> dict[str, Any]:
    """The axes, by which people filter and pivot, and every setting of the cell and its inputs by its path."""
    return dict(axes(cell)) | flat(cell.model_dump(mode="json"), "spec")


def flat(value: Any, path: str) -> dict[str, Any]:
    """Every value of nested dicts by its path; what is None is left out."""
    if not isinstance(value, dict):
        return {} if value is None else {path: value}
    return {n: v for name, inner in value.items() for n, v in flat(inner, f"{path}.{name}").items()}


def fingerprints(cell: Evaluate) -> dict[str, str]:
    """`data` and `protocol` of an evaluation, 12 hex digits each: numbers of which one differs belong in no one table.

    data: the documents (a text's windows but for their length, a task's revision, the questions). protocol: all other
    settings of the measure, and the version of evaluations.
    """
    return dict(cell.measure.remembered(f"_fingerprints{cell.VERSION}", lambda: _fingerprints(cell)))


def _fingerprints(cell: Evaluate) -> dict[str, str]:
    settings = cell.measure.model_dump(mode="json")
    data: dict[str, Any] = {n: settings.pop(n) for n in sorted(DATA_FIELDS & settings.keys())}
    if isinstance(data.get("text"), dict):
        settings["seq_len"] = data["text"].pop("seq_len")
    protocol = {"version": cell.VERSION, **settings}
    return {"data": _short_hash(data), "protocol": _short_hash(protocol)}


def _short_hash(value: Any) -> str:
    return hashlib.sha256(canonical(value).encode()).hexdigest()[:12]
