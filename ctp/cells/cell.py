"""What a cell is: small, frozen, validated data, and the key that names its result.

Three kinds of cell make up every study:

    Compress(model, compression, calibration)  -> a compressed model
    Learn(source: Compress, recovery)          -> a soft prompt, or an adapter that was made elsewhere
    Evaluate(target: Compress, recovery, measure) -> numbers

Everything here can change a result and therefore enters a key. What cannot (device, batch size of an
evaluation, paths) is `Runtime`, which no cell can hold.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from pydantic import model_validator

from ctp.cells import AnyCompression, AnyMeasure, AnyRecovery
from ctp.cells.inputs import Model, Pinned, Spec, Windows
from ctp.machine.arithmetic import AUTOCAST

INPUTS = {"compress": (), "learn": ("source",), "evaluate": ("target", "recovery")}  # a kind's fields that are cells


def own_key(manifest: Mapping[str, Any]) -> str:
    """The key that the manifest's own kind, version, spec and inputs make; see `ctp.cells.cell.key`.

    From plain JSON, so that it holds for artifacts of other versions and of plugins. Raises KeyError or TypeError on
    what is incomplete.
    """
    fields, inputs = dict(manifest["spec"]), list(manifest["inputs"])
    for name in INPUTS[manifest["kind"]]:
        if fields[name] is not None:
            fields[name] = {"key": inputs.pop(0)}
    text = canonical({"fields": fields, "kind": manifest["kind"], "version": manifest["version"]})
    return hashlib.sha256(text.encode()).hexdigest()


class Cell(Spec):
    """One unit of work with one artifact. VERSION is raised by hand when the numbers of a kind change."""

    VERSION: ClassVar[int]
    kind: ClassVar[str]

    @property
    def inputs(self) -> tuple["Cell", ...]:
        """The cells whose artifacts this one reads."""
        return tuple(v for n in type(self).model_fields if isinstance(v := getattr(self, n), Cell))


class Compress(Cell):
    VERSION: ClassVar[int] = 3  # 3: sums in another order (kernels, batches, refit): a tie rounds to another code
    kind: ClassVar[str] = "compress"

    model: Model
    compression: AnyCompression
    calibration: Windows | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.compression.calibrated != (self.calibration is not None):
            raise ValueError(f"calibration text is for methods that calibrate; here: {self.compression.label}")
        return self


class Learn(Cell):
    VERSION: ClassVar[int] = 3  # not raised for how half precision rounds: that is the device's, as on a GPU
    kind: ClassVar[str] = "learn"

    source: Compress
    recovery: AnyRecovery


class Evaluate(Cell):
    VERSION: ClassVar[int] = 2
    kind: ClassVar[str] = "evaluate"

    target: Compress
    recovery: Learn | None = None
    measure: AnyMeasure

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.recovery is not None and self.recovery.source.model != self.target.model:
            raise ValueError(
                f"a prompt learned on {self.recovery.source.model.name} cannot stand before {self.target.model.name}"
            )
        return self


def requested(cell: Cell) -> str:
    """The number type in which a cell asks to be computed: its model's, or that of its precision."""
    if isinstance(cell, Learn):
        return AUTOCAST.get(getattr(cell.recovery, "precision", ""), cell.source.model.dtype)
    assert isinstance(cell, Compress | Evaluate)
    return (cell.model if isinstance(cell, Compress) else cell.target.model).dtype


KINDS: dict[str, type[Cell]] = {c.kind: c for c in (Compress, Learn, Evaluate)}


def to_json(cell: Cell) -> dict[str, Any]:
    """Plain data that `from_json` turns back into the same cell."""
    return {"kind": cell.kind, "spec": cell.model_dump(mode="json")}


def from_json(data: Mapping[str, Any]) -> Cell:
    """The cell that `to_json` wrote. Raises KeyError or pydantic.ValidationError on anything else."""
    return KINDS[data["kind"]].model_validate(data["spec"])


def canonical(value: Any) -> str:
    """JSON with one spelling per value. Raises TypeError on anything without a stable form."""

    def check(v: Any, where: str) -> None:
        if isinstance(v, Mapping):
            for n, x in v.items():
                if not isinstance(n, str):
                    raise TypeError(f"{where}: key {n!r} is not a string")
                check(x, f"{where}.{n}")
        elif isinstance(v, list | tuple):
            for i, x in enumerate(v):
                check(x, f"{where}[{i}]")
        elif isinstance(v, float) and not math.isfinite(v):
            raise TypeError(f"{where} = {v} has no stable form")
        elif not isinstance(v, str | bool | int | float | None):
            raise TypeError(f"{where}: {type(v).__name__} has no stable form")

    check(value, "value")
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def key(cell: Cell) -> str:
    """sha256 (hex) of kind, VERSION, own fields and the keys of the inputs; computed once for an object.

    Raises ValueError where a model, text or adapter is not pinned to a revision: such a key would not name one result.
    """
    return cell.remembered("_key", lambda: _key(cell))


def _key(cell: Cell) -> str:
    """The hash of canonical({"fields": …, "kind": …, "version": …}), put together from the fields' own texts."""
    fields = ",".join(f'"{name}":{_text(getattr(cell, name))}' for name in sorted(type(cell).model_fields))
    text = f'{{"fields":{{{fields}}},"kind":{canonical(cell.kind)},"version":{canonical(cell.VERSION)}}}'
    return hashlib.sha256(text.encode()).hexdigest()


def _text(value: Any) -> str:
    """A field of a cell in canonical JSON; an input by its key. Cells share models, texts and methods."""
    if isinstance(value, Cell):
        return f'{{"key":"{key(value)}"}}'
    return value.remembered("_text", lambda: _canonical(value)) if isinstance(value, Spec) else canonical(value)


def _canonical(spec: Spec) -> str:
    _check_pinned(spec)
    return canonical(spec.model_dump(mode="python"))


def _check_pinned(value: Any) -> None:
    """Raise ValueError where something inside `value` has no revision."""
    if isinstance(value, Pinned):
        _ = value.pinned_name
    if isinstance(value, Spec):
        for name in type(value).model_fields:
            _check_pinned(getattr(value, name))
