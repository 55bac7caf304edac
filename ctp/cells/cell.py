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
from typing import Any, ClassVar, Self, TypeAlias, TypedDict

from pydantic import SerializeAsAny, model_validator

from ctp.cells import Compression, Measure, Method, Recovery
from ctp.cells.inputs import Model, Pinned, Spec, Windows
from ctp.machine.arithmetic import AUTOCAST


class _Cell(Spec):
    """One unit of work with one artifact. INPUTS: the fields that are cells.

    VERSION is raised by hand when the numbers of a kind change.
    """

    VERSION: ClassVar[int]
    INPUTS: ClassVar[tuple[str, ...]] = ()
    kind: ClassVar[str]

    @property
    def inputs(self) -> tuple["Cell", ...]:
        """The cells whose artifacts this one reads."""
        return tuple(cell for name in self.INPUTS if (cell := getattr(self, name)) is not None)

    @property
    def base(self) -> "Compress":
        """The compressed model that the cell makes or works on."""
        return self if isinstance(self, Compress) else self.inputs[0].base

    @property
    def method(self) -> Method:
        """Its compression, recovery or measure."""
        return next(value for _, value in self if isinstance(value, Method))

    @property
    def dtype(self) -> str:
        """The number type in which the cell asks to be computed."""
        return self.base.model.dtype


class Compress(_Cell):
    VERSION: ClassVar[int] = 3  # 3: sums in another order (kernels, batches, refit): a tie rounds to another code
    kind: ClassVar[str] = "compress"

    model: Model
    compression: SerializeAsAny[Compression]
    calibration: Windows | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.compression.calibrated != (self.calibration is not None):
            raise ValueError(f"calibration text is for methods that calibrate; here: {self.compression.label}")
        return self


class Learn(_Cell):
    VERSION: ClassVar[int] = 3  # not raised for how half precision rounds: that is the device's, as on a GPU
    INPUTS: ClassVar[tuple[str, ...]] = ("source",)
    kind: ClassVar[str] = "learn"

    source: Compress
    recovery: SerializeAsAny[Recovery]

    @property
    def model(self) -> Model:
        return self.source.model

    @property
    def dtype(self) -> str:
        return AUTOCAST.get(getattr(self.recovery, "precision", ""), self.model.dtype)


class Evaluate(_Cell):
    VERSION: ClassVar[int] = 2
    INPUTS: ClassVar[tuple[str, ...]] = ("target", "recovery")
    kind: ClassVar[str] = "evaluate"

    target: Compress
    recovery: Learn | None = None
    measure: SerializeAsAny[Measure]

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.recovery is not None and self.recovery.model != self.model:
            raise ValueError(f"a prompt learned on {self.recovery.model.name} cannot stand before {self.model.name}")
        return self

    @property
    def model(self) -> Model:
        return self.target.model

    @property
    def prompt_rows(self) -> int:
        """How many positions the recovery takes in front of every input."""
        return self.recovery.recovery.prompt_rows if self.recovery else 0


Cell: TypeAlias = Compress | Learn | Evaluate
KINDS: dict[str, type[Cell]] = {c.kind: c for c in (Compress, Learn, Evaluate)}


class CellData(TypedDict):
    """A cell as plain data."""

    kind: str
    spec: dict[str, object]


def to_json(cell: Cell) -> CellData:
    """Plain data that `from_json` turns back into the same cell."""
    return {"kind": cell.kind, "spec": cell.model_dump(mode="json")}


def from_json(data: CellData) -> Cell:
    """The cell that `to_json` wrote. Raises KeyError or pydantic.ValidationError on anything else."""
    return KINDS[str(data["kind"])].model_validate(data["spec"])


def canonical(value: object) -> str:
    """JSON with one spelling per value. Raises TypeError on anything without a stable form."""
    _check_stable(value, "value")
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def _check_stable(value: object, place: str) -> None:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            if not isinstance(name, str):
                raise TypeError(f"{place}: key {name!r} is not a string")
            _check_stable(inner, f"{place}.{name}")
    elif isinstance(value, list | tuple):
        for i, inner in enumerate(value):
            _check_stable(inner, f"{place}[{i}]")
    elif isinstance(value, float) and not math.isfinite(value):
        raise TypeError(f"{place} = {value} has no stable form")
    elif not isinstance(value, str | bool | int | float | None):
        raise TypeError(f"{place}: {type(value).__name__} has no stable form")


def key(cell: Cell) -> str:
    """sha256 (hex) of kind, VERSION, fields and the keys of the inputs; computed once for an object.

    Raises ValueError where a model, text or adapter is not pinned to a revision: such a key would not name one result.
    """

    def make() -> str:
        fields = (f'"{name}":{_text(getattr(cell, name))}' for name in sorted(type(cell).model_fields))
        return _key(cell.kind, cell.VERSION, f"{{{','.join(fields)}}}")

    return cell.remembered("_key", make)


def own_key(manifest: Mapping[str, Any]) -> str:
    """The key that a manifest's kind, version, spec and inputs make, whatever version or plugin wrote it.

    Raises KeyError or TypeError where the manifest is incomplete.
    """
    fields, inputs = dict(manifest["spec"]), list(manifest["inputs"])
    for name in KINDS[manifest["kind"]].INPUTS:
        if fields[name] is not None:
            fields[name] = {"key": inputs.pop(0)}
    return _key(manifest["kind"], manifest["version"], canonical(fields))


def _key(kind: str, version: int, fields: str) -> str:
    """The hash of canonical({"fields": …, "kind": …, "version": …}); fields: in canonical JSON already."""
    text = f'{{"fields":{fields},"kind":{canonical(kind)},"version":{canonical(version)}}}'
    return hashlib.sha256(text.encode()).hexdigest()


def _text(value: object) -> str:
    """A field of a cell in canonical JSON, an input by its key; once an object, as cells share models and methods."""
    if isinstance(value, Cell):
        return f'{{"key":"{key(value)}"}}'
    return value.remembered("_text", lambda: _pinned_text(value)) if isinstance(value, Spec) else canonical(value)


def _pinned_text(spec: Spec) -> str:
    _check_pinned(spec)
    return canonical(spec.model_dump(mode="python"))


def _check_pinned(value: object) -> None:
    """Raise ValueError where something inside `value` has no revision."""
    if isinstance(value, Pinned):
        _ = value.pinned_name
    if isinstance(value, Spec):
        for name in type(value).model_fields:
            _check_pinned(getattr(value, name))
