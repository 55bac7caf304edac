"""Methods of compression: how a model is made smaller."""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from ctp.cells.inputs import MOST, Bool, Pinned, PositiveInt
from ctp.cells.method import Method, tag


class Compression(Method):
    """How a model is made smaller. calibrated: learns from the study's calibration text."""

    registry: ClassVar[dict[str, type[Method]]] = {}
    calibrated: ClassVar[bool] = False


class Dense(Compression):
    """The model as it is: the reference row of every table."""

    method: Literal["dense"] = "dense"


class Checkpoint(Pinned, Compression):
    """The model as somebody else compressed it: a format that `ctp.formats` reads, or a pruned folder.

    `path` is a folder, a hub id or a GGUF file, and becomes its short name. `parameters` (before compression) and
    `width` (of the embedding) are read from its configuration when a grid is planned, and must be the model's.
    """

    NAMED_BY: ClassVar[str] = "path"
    PINNED_BY: ClassVar[str] = "pin_path"
    LABEL: ClassVar[str] = "checkpoint-{0.path}"

    method: Literal["checkpoint"] = "checkpoint"
    path: Annotated[str, Field(min_length=1)]
    parameters: Annotated[int, Field(strict=True, ge=0)] = 0
    width: Annotated[int, Field(strict=True, ge=0)] = 0


class Solver(Compression):
    """What SparseGPT, GPTQ and both at once share: one pass of second-order error compensation per linear.

    damping: added to the Hessian's diagonal, as a fraction of its mean. block_size: columns updated lazily together,
    rounded up to whole groups and patterns. act_order: columns by falling Hessian diagonal. true_sequential: linears of
    a block one group after the other (q/k/v, output, up/gate, down), each on the inputs from the compressed ones before
    it. group_size: inputs that share one scale, None for one per output channel. static_groups: with act_order, scales
    are fixed from the original weights in their order. scale: "minmax" spans the weights; "mse" takes the shrunken
    range with the least rounding error. refit: scales are fitted anew at the end, by least squares on the layer's
    output error; without it the algorithms are the papers' to the letter.
    """

    calibrated: ClassVar[bool] = True

    damping: Annotated[float, Field(strict=True, gt=0, le=1)] = 0.01
    block_size: PositiveInt = 128
    act_order: Bool = False
    true_sequential: Bool = False
    group_size: Annotated[int, Field(strict=True, ge=2, le=MOST)] | None = None
    sym: Bool = False
    static_groups: Bool = False
    scale: Literal["minmax", "mse"] = "minmax"
    refit: Bool = True

    def _suffix(self, known: set[str]) -> str:
        """The settings that are not at their default and not `known` to the label, each behind a dash."""
        tags = {"act_order": "act", "true_sequential": "seq", "static_groups": "static", "group_size": "g", "scale": ""}
        rest = {n: v for n, v in self.changed().items() if n not in known}
        return "".join("-plain" if n == "refit" else f"-{tag(tags.get(n, n), v)}" for n, v in rest.items())


class GPTQ(Solver):
    """Quantization by GPTQ (Frantar et al. 2022, algorithm 1)."""

    method: Literal["gptq"] = "gptq"
    bits: Literal[2, 3, 4, 8]

    @property
    def label(self) -> str:
        return f"gptq-{self.bits}bit" + self._suffix({"method", "bits"})


class SparseGPT(Solver):
    """Pruning by SparseGPT (Frantar & Alistarh 2023, algorithm 1); with `bits`, pruned and quantized in the same pass.

    Exactly one of `sparsity` (fraction of weights set to zero) and `pattern` ("n:m": n zeros in every m inputs).
    """

    method: Literal["sparsegpt"] = "sparsegpt"
    sparsity: Annotated[float, Field(strict=True, gt=0, lt=1)] | None = None
    pattern: Annotated[str, Field(pattern=r"^[0-9]{1,4}:[0-9]{1,4}$")] | None = None
    bits: Literal[2, 3, 4, 8] | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.sparsity is None) == (self.pattern is None):
            raise ValueError("give exactly one of 'sparsity' and 'pattern'")
        if self.pattern is not None:
            n, m = self.n_of_m
            if not 0 < n < m:
                raise ValueError(f"pattern = {self.pattern!r}: n:m means n zeros in every m inputs, 0 < n < m")
            if self.act_order:
                raise ValueError("act_order reorders the inputs that an n:m pattern groups: use one or the other")
        if self.bits is None:
            idle = {"group_size", "sym", "static_groups", "scale", "refit"} & set(self.changed())
            if idle:
                raise ValueError(f"{', '.join(sorted(idle))} only mean something with 'bits'")
        return self

    @property
    def n_of_m(self) -> tuple[int, int]:
        assert self.pattern is not None
        n, m = self.pattern.split(":")
        return int(n), int(m)

    @property
    def label(self) -> str:
        kept = self.pattern or f"{100 * (self.sparsity or 0):g}"
        bits = f"-{self.bits}bit" if self.bits else ""
        return f"sparsegpt-{kept}{bits}" + self._suffix({"method", "sparsity", "pattern", "bits"})
