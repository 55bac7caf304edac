"""How a cell is named to people: a slug for folders and lines, axes to filter and pivot by."""

from ctp.cells import Adapter, Learned
from ctp.cells.cell import Cell, Compress, Evaluate, Learn, canonical
from ctp.cells.method import short_hash

DATA_FIELDS = {"text", "name", "revision", "questions"}  # of a measure: what is read; the rest says how


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
        parts = [cell.model.name, origin(cell), cell.recovery.label]
    else:
        learned = cell.recovery
        recovery = f"{origin(learned)}_{learned.recovery.label}" if learned else "none"
        parts = [slug(cell.target), recovery, cell.measure.label]
    return "_".join(p.replace("/", "--").replace(":", "of") for p in parts)


def axes(cell: Cell) -> dict[str, object]:
    """Every axis a person may filter or pivot by, flat. Evaluate has `source`/`target`; `none` marks no recovery."""
    out: dict[str, object] = {"kind": cell.kind}
    if isinstance(cell, Evaluate):
        out |= _measure_axes(cell) | {"source": "none", "recovery": "none", "k": 0}
    learned = cell if isinstance(cell, Learn) else cell.recovery if isinstance(cell, Evaluate) else None
    if learned is not None:
        out |= _recovery_axes(learned)
    base = cell.base
    out |= {"model": base.model.name, "dtype": base.model.dtype, "compression": base.compression.label}
    settings = base.compression.model_dump(mode="json")
    out |= {n: v for n, v in settings.items() if n in ("method", "bits", "sparsity", "pattern", "group_size")}
    if base.calibration is not None:
        out |= {"calibration": base.calibration.dataset, "calibration_seed": base.calibration.seed}
    return {n: v for n, v in out.items() if v is not None}


def _measure_axes(cell: Evaluate) -> dict[str, object]:
    settings = cell.measure.model_dump(mode="json")
    read = settings["text"] if isinstance(settings.get("text"), dict) else settings
    out: dict[str, object] = {"measure": cell.measure.method, "target": cell.target.compression.label}
    out |= {n: v for n, v in read.items() if n in ("dataset", "split", "seq_len", "bos")}
    if cell.measure.method == "task":
        out |= {"task": settings["name"], "shots": settings["shots"]}
    return out


def _recovery_axes(cell: Learn) -> dict[str, object]:
    recovery = cell.recovery
    return {
        "source": origin(cell),
        "recovery": recovery.method,
        "k": recovery.prompt_rows,
        "seed": getattr(recovery, "seed", None),
        "rank": getattr(recovery, "r", None),
        "learned_on": recovery.text.dataset if isinstance(recovery, Learned) else None,
        "adapter": recovery.path if isinstance(recovery, Adapter) else None,
        "recovery_label": recovery.label,
    }


def params(cell: Cell) -> dict[str, object]:
    """The axes, by which people filter and pivot, and every setting of the cell and its inputs by its path."""
    return axes(cell) | flat(cell.model_dump(mode="json"), "spec")


def flat(value: object, path: str) -> dict[str, object]:
    """Every value of nested dicts by its path; what is None is left out."""
    if isinstance(value, dict):
        return {n: v for name, inner in value.items() for n, v in flat(inner, f"{path}.{name}").items()}
    return {} if value is None else {path: value}


def fingerprints(cell: Evaluate) -> dict[str, str]:
    """`data` and `protocol` of an evaluation, 12 hex digits each: numbers of which one differs belong in no one table.

    data: the documents (a text's windows but for their length, a task's revision, the questions). protocol: all other
    settings of the measure, and the version of evaluations.
    """
    settings = cell.measure.model_dump(mode="json")
    data = {n: settings.pop(n) for n in sorted(DATA_FIELDS & settings.keys())}
    if isinstance(data.get("text"), dict):
        settings["seq_len"] = data["text"].pop("seq_len")
    protocol = {"version": cell.VERSION, **settings}
    return {"data": short_hash(canonical(data), 12), "protocol": short_hash(canonical(protocol), 12)}
