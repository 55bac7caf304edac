"""Models and texts, each pinned to one exact version."""

import math
from collections.abc import Callable, Mapping
from typing import Annotated, ClassVar, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, model_serializer, model_validator

MOST = 10**9  # of whatever is counted: no run comes near
Seed = Annotated[int, Field(strict=True, ge=0, lt=2**63)]
Count = Annotated[int, Field(strict=True, ge=0, le=MOST)]
PositiveInt = Annotated[int, Field(strict=True, gt=0, le=MOST)]
T = TypeVar("T")
Finite = Field(strict=True, allow_inf_nan=False)
Bool = Annotated[bool, Field(strict=True)]


class Spec(BaseModel):
    """Frozen data that refuses unknown fields, so that a typo is an error and not a default."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    def changed(self) -> dict[str, object]:
        """The fields whose value differs from their default, in the order of declaration."""
        fields = type(self).model_fields
        return {n: v for n, f in fields.items() if (v := getattr(self, n)) != f.default}

    def remembered(self, what: str, make: Callable[[], T]) -> T:
        """What `make` gave the first time: this object's values never change."""
        if what not in self.__dict__:  # beside the fields, as functools.cached_property does: not compared or dumped
            self.__dict__[what] = make()
        found: T = self.__dict__[what]
        return found

    def model_copy(self, *, update: Mapping[str, object] | None = None, deep: bool = False) -> Self:
        """A copy with some fields changed, and nothing remembered."""
        copy = super().model_copy(update=update, deep=deep)
        for name in copy.__dict__.keys() - type(self).model_fields.keys():
            del copy.__dict__[name]
        return copy


class Pinned(Spec):
    """Settings that name something outside the grid, at one exact version.

    NAMED_BY: the field with its name, a path or hub id at first. PINNED_BY: the method of `Pins` that fills
    in `revision` and the short name while a grid is validated, from the name and the given fields to the pinned ones.
    """

    NAMED_BY: ClassVar[str]
    PINNED_BY: ClassVar[str]
    revision: str = ""

    @property
    def pinned_name(self) -> str:
        """`name@revision`, which `Runtime.locations` goes by. Raises ValueError where there is no revision."""
        name = getattr(self, self.NAMED_BY)
        if not self.revision:
            raise ValueError(f"{name!r} has no revision: pin it before taking a key")
        return f"{name}@{self.revision}"

    @model_validator(mode="before")
    @classmethod
    def _pin(cls, data: object, info: ValidationInfo) -> object:
        if isinstance(data, str):
            data = {cls.NAMED_BY: data}
        if info.context is not None and isinstance(data, Mapping):
            name = data.get(cls.NAMED_BY)
            if isinstance(name, str):
                return getattr(info.context, cls.PINNED_BY)(name, dict(data))
        return data


class Model(Pinned):
    """A causal language model at one exact version.

    `revision` is the hub's commit, or `sha256:…` of the files of a folder or package, filled in when a grid is planned.
    `dtype` "auto" becomes the checkpoint's.
    """

    NAMED_BY: ClassVar[str] = "name"
    PINNED_BY: ClassVar[str] = "pin_model"
    name: str
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"


class Windows(Pinned):
    """Token windows of one text, specified to the token.

    The documents of a split are joined by `join` (None: the data set's custom), tokenised in one go and cut into
    windows of `seq_len` tokens without overlap; the tail is dropped. `sampling="crops"` instead draws, by `seed`,
    random windows of random longer documents (the calibration protocol of GPTQ and SparseGPT). count: of windows, None
    for all. skip, documents: leave out the first documents, use only so many after them. bos: "first" tokenises the
    text (of crops: each document) with the tokenizer's default special tokens; with "each" every window is BOS and
    seq_len - 1 tokens of the text; with "none" it is tokens of the text alone.
    """

    NAMED_BY: ClassVar[str] = "dataset"
    PINNED_BY: ClassVar[str] = "pin_windows"
    dataset: str
    split: Literal["train", "validation", "test"]
    seq_len: Annotated[int, Field(strict=True, ge=2, le=MOST)]
    count: PositiveInt | None = None
    skip: Count = 0
    documents: PositiveInt | None = None
    join: str | None = None
    sampling: Literal["sequential", "crops"] = "sequential"
    seed: Seed = 0
    bos: Literal["first", "each", "none"] = "first"

    @model_serializer(mode="wrap")
    def _dumped(self, dump: Callable[[Self], dict[str, object]]) -> dict[str, object]:
        data = dump(self)
        if data.get("bos") == "first":  # keys are older than this field
            del data["bos"]
        return data

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.sampling == "crops" and self.count is None:
            raise ValueError("sampling 'crops' draws a stated number of windows: give count")
        return self

    def overlaps(self, other: "Windows") -> bool:
        """Do both draw on a document that they share?"""
        if (self.dataset, self.split) != (other.dataset, other.split):
            return False
        ends = [math.inf if w.documents is None else w.skip + w.documents for w in (self, other)]
        return self.skip < ends[1] and other.skip < ends[0]
