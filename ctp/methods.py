"""The methods of compression, recovery and measure, and their settings.

A method is a frozen class in one of three families; declaring it registers it under its `method` name, and grid files
find it there. Values are strict: a string is no number, an unknown field is an error.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    BeforeValidator,
    Field,
    SerializeAsAny,
    ValidationInfo,
    model_validator,
)

from ctp.inputs import Bool, Finite, Pinned, PositiveInt, Seed, Spec, Windows
from ctp.names import unknown


class Method(Spec):
    """Base of compressions, recoveries and measures: picked by the field `method`, found in `registry`."""

    registry: ClassVar[dict[str, type["Method"]]]
    method: str

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        default = cls.model_fields["method"].default
        if isinstance(default, str):
            cls.registry[default] = cls

    @classmethod
    def parse(cls, data: Any, info: ValidationInfo) -> Any:
        """`{method: gptq, …}` or plain `gptq` -> the spec registered under that name."""
        if isinstance(data, cls):
            return data
        if isinstance(data, str):
            data = {"method": data}
        if not isinstance(data, Mapping) or "method" not in data:
            raise ValueError(f"needs a 'method', one of: {', '.join(sorted(cls.registry))}")
        if not isinstance(data["method"], str) or data["method"] not in cls.registry:
            raise ValueError(unknown("method", data["method"], cls.registry))
        return cls.registry[data["method"]].model_validate(data, context=info.context)

    @property
    def label(self) -> str:
        """A short unique name: the method, then every field that is not at its default."""
        rest = {n: v for n, v in self.changed().items() if n != "method"}
        return "-".join([self.method, *(_tag(n, v) for n, v in rest.items())])


def _tag(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return name if value else f"no_{name}"
    return f"{name}{value:g}" if isinstance(value, float) else f"{name}{value}"


# ---------------------------------------------------------------- compression


class Compression(Method):
    """How a model is made smaller."""

    registry: ClassVar[dict[str, type[Method]]] = {}


class Dense(Compression):
    """The model as it is: the reference row of every table."""

    method: Literal["dense"] = "dense"


class Checkpoint(Pinned, Compression):
    """The model as somebody else compressed it: AutoGPTQ's format, compressed-tensors, or a pruned folder.

    `path` is a folder or hub id. `parameters` (of the model, uncompressed) and `width` (of its embedding) are read
    from its configuration when a grid is planned, and must be those of the grid's model; `path` becomes its short name.
    """

    NAMED_BY: ClassVar[str] = "path"
    PINNED_BY: ClassVar[str] = "pin_path"

    method: Literal["checkpoint"] = "checkpoint"
    path: Annotated[str, Field(min_length=1)]
    parameters: Annotated[int, Field(strict=True, ge=0)] = 0
    width: Annotated[int, Field(strict=True, ge=0)] = 0

    @property
    def label(self) -> str:
        return f"checkpoint-{self.path}"


class Solver(Compression):
    """What SparseGPT, GPTQ and both at once share: one pass of second-order error compensation per linear.

    damping: added to the Hessian's diagonal, as a fraction of its mean. block_size: columns updated lazily together.
    act_order: columns in the order of falling Hessian diagonal. true_sequential: linears of a block one group after
    the other (q/k/v, output, up/gate, down), each seeing the inputs that the compressed ones before it produce.
    group_size: inputs that share one scale, None for one scale per output channel. static_groups: with act_order, each
    group's scale is fixed from the original weights in their original order. scale: "minmax" spans the weights
    exactly; "mse" searches the shrunken range with the least rounding error. refit: when all codes are settled, each
    scale is fitted anew by least squares on the layer's output error, codes and zero points kept; without it the
    algorithms are the papers' to the letter. block_size is rounded up to whole groups and patterns.
    """

    damping: Annotated[float, Field(strict=True, gt=0, le=1)] = 0.01
    block_size: PositiveInt = 128
    act_order: Bool = False
    true_sequential: Bool = False
    group_size: Annotated[int, Field(strict=True, ge=2)] | None = None
    sym: Bool = False
    static_groups: Bool = False
    scale: Literal["minmax", "mse"] = "minmax"
    refit: Bool = True

    def _suffix(self, known: set[str]) -> str:
        short = {"act_order": "act", "true_sequential": "seq", "static_groups": "static"}
        rest = {n: v for n, v in self.changed().items() if n not in known}
        return "".join(
            f"-g{v}" if n == "group_size" else f"-{v}" if n == "scale" else f"-{_tag(short.get(n, n), v)}"
            for n, v in rest.items()
        )


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
    pattern: Annotated[str, Field(pattern=r"^\d+:\d+$")] | None = None
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


# ------------------------------------------------------------------- recovery


class Recovery(Method):
    """How lost quality is won back. learned: through each source of the grid; else it comes as it is, once a model."""

    registry: ClassVar[dict[str, type[Method]]] = {}
    learned: ClassVar[bool] = True


class SoftPrompt(Recovery):
    """k trained rows before every input, Eq. (1) of the paper; defaults are the paper's text (section 4).

    batch counts sequences per optimiser step, `accumulate` the micro-batches it is split into. warmup: steps of linear
    warm-up from 0; "linear" and "cosine" then reach 0 at `steps`. loss: "token_mean", or "sequence_sum" (summed over
    tokens, mean over sequences) as in their code. precision: "fp32" computes in the model's dtype, "bf16" and "fp16"
    under autocast (a float16 model needs one of them: its gradients underflow without); the prompt is always fp32.
    The best step by the loss on `validation` is kept; it defaults to 32 windows of the same data set's validation
    split. on_reported: a study may report on documents that were learned from or chose the step, as in their code.
    """

    method: Literal["soft_prompt"] = "soft_prompt"
    k: PositiveInt = 100
    text: Windows
    validation: Windows
    validate_every: PositiveInt = 500
    init: Literal["random_rows", "first_rows", "text"] = "random_rows"
    init_text: Annotated[str, Field(min_length=1)] | None = None
    steps: PositiveInt = 30_000
    batch: PositiveInt = 4
    accumulate: PositiveInt = 1
    lr: Annotated[float, Finite, Field(gt=0)] = 1e-3
    weight_decay: Annotated[float, Finite, Field(ge=0)] = 1e-5
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup: Annotated[int, Field(strict=True, ge=0)] = 0
    clip: Annotated[float, Finite, Field(gt=0)] | None = 1.0
    loss: Literal["token_mean", "sequence_sum"] = "token_mean"
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    on_reported: Bool = False
    seed: Seed = 0

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and isinstance(data.get("text"), Mapping):
            text, own = data["text"], data.get("validation") or {}
            if isinstance(own, Mapping):
                base = {n: text[n] for n in ("dataset", "seq_len") if n in text}
                data = {**data, "validation": {**base, "split": "validation", "count": 32, **own}}
        return data

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.init == "text") != (self.init_text is not None):
            raise ValueError("init 'text' and init_text belong together: give both or neither")
        if self.batch % self.accumulate:
            raise ValueError(f"accumulate = {self.accumulate} must divide batch = {self.batch}")
        if self.warmup >= self.steps:
            raise ValueError(f"warmup = {self.warmup} must be below steps = {self.steps}")
        if self.validation.overlaps(self.text):
            raise ValueError(
                "validation shares documents with the text that is learned from: take another split, or skip"
            )
        return self

    @property
    def label(self) -> str:
        seed = f"-seed{self.seed}" if self.seed else ""
        return f"soft_prompt-k{self.k}-{self.text.dataset}{seed}"


class Adapter(Pinned, Recovery):
    """A PEFT adapter made elsewhere, a soft prompt or LoRA, in front of or inside every target.

    `path` is a folder or hub id; kind, k and width (rows of a prompt and their numbers each, 0 for LoRA) are read from
    its configuration when a grid is planned, and `path` becomes its short name.
    """

    NAMED_BY: ClassVar[str] = "path"
    PINNED_BY: ClassVar[str] = "pin_path"
    learned: ClassVar[bool] = False

    method: Literal["adapter"] = "adapter"
    path: Annotated[str, Field(min_length=1)]
    kind: Literal["", "prompt", "lora"] = ""
    k: Annotated[int, Field(strict=True, ge=0)] = 0
    width: Annotated[int, Field(strict=True, ge=0)] = 0

    @property
    def label(self) -> str:
        return f"adapter-{self.path}"


# -------------------------------------------------------------------- measure


class Measure(Method):
    """What is measured on a target."""

    registry: ClassVar[dict[str, type[Method]]] = {}


class Perplexity(Measure):
    """Perplexity over fixed windows; the prompt stands outside the window, the first token is not scored."""

    method: Literal["perplexity"] = "perplexity"
    text: Windows

    @property
    def label(self) -> str:
        return f"ppl-{self.text.dataset}-{self.text.split}"


AnyCompression = Annotated[SerializeAsAny[Compression], BeforeValidator(Compression.parse)]
AnyRecovery = Annotated[SerializeAsAny[Recovery], BeforeValidator(Recovery.parse)]
AnyMeasure = Annotated[SerializeAsAny[Measure], BeforeValidator(Measure.parse)]
