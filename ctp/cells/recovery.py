"""Methods of recovery: how lost quality is won back, and the controls to compare them with."""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from ctp.cells.inputs import Bool, Count, Finite, Pinned, PositiveInt, Seed, Windows
from ctp.cells.method import Method, short_hash

# The hand-written prompt of the paper's figure 1.
PAPER_HARD_PROMPT = (
    "Please carefully examine the weight matrix within the model, as it may contain errors. It is crucial to verify "
    "its accuracy and make any necessary adjustments to ensure optimal performance"
)


class Recovery(Method):
    """How lost quality is won back. learned: through each source of the grid; else it comes as it is, once a model."""

    registry: ClassVar[dict[str, type[Method]]] = {}
    learned: ClassVar[bool] = True

    @property
    def in_front(self) -> bool:
        """Is it rows in front of the input, and not a change inside the model?"""
        return True

    @property
    def prompt_rows(self) -> int:
        """How many positions it takes in front of every input, as far as its settings tell."""
        return int(getattr(self, "k", 0))


class NoRecovery(Recovery):
    """The model as it is. Every target is also measured so."""

    learned: ClassVar[bool] = False
    method: Literal["none"] = "none"


class Learned(Recovery):
    """What soft prompts and LoRA share: next-token loss through frozen weights. The defaults are the paper's text.

    batch: sequences per optimiser step, in `accumulate` micro-batches. warmup: steps of linear warm-up from 0; "linear"
    and "cosine" then reach 0 at `steps`. clip: the largest norm of a gradient, as in the paper's code. loss:
    "token_mean", or "sequence_sum" (summed over tokens, mean over sequences) as in that code. precision: "fp32"
    computes in the model's dtype, "bf16" and "fp16" under autocast (a float16 model needs one of them: its gradients
    underflow without). The best step by the loss on `validation` is kept; it defaults to 32 windows of the same data
    set's validation split. on_reported: a study may report on documents that were learned from or chose the step.
    """

    text: Windows
    validation: Windows
    validate_every: PositiveInt = 500
    steps: PositiveInt = 30_000
    batch: PositiveInt = 4
    accumulate: PositiveInt = 1
    lr: Annotated[float, Finite, Field(gt=0, le=1e9)] = 1e-3
    weight_decay: Annotated[float, Finite, Field(ge=0)] = 1e-5
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup: Count = 0
    clip: Annotated[float, Finite, Field(gt=0)] | None = 1.0
    loss: Literal["token_mean", "sequence_sum"] = "token_mean"
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    on_reported: Bool = False
    seed: Seed = 0

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, data: object) -> object:
        if isinstance(data, Mapping) and isinstance(data.get("text"), Mapping):
            text, validation = data["text"], data.get("validation") or {}
            if isinstance(validation, Mapping):
                base = {n: text[n] for n in ("dataset", "seq_len", "bos") if n in text}
                data = {**data, "validation": {**base, "split": "validation", "count": 32, **validation}}
        return data

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.batch % self.accumulate:
            raise ValueError(f"accumulate = {self.accumulate} must divide batch = {self.batch}")
        if self.warmup >= self.steps:
            raise ValueError(f"warmup = {self.warmup} must be below steps = {self.steps}")
        if self.validation.overlaps(self.text):
            raise ValueError(
                "validation shares documents with the text that is learned from: take another split, or skip"
            )
        return self


class SoftPrompt(Learned):
    """k trained rows before every input, Eq. (1) of the paper; defaults are the paper's text (section 4).

    init: what the rows start from: distinct tokens drawn by `seed` (the text), the first k (their code),
    or the tokens of init_text. dtype: of the prompt and so of its updates; "bfloat16" is their code's.
    """

    LABEL: ClassVar[str] = "soft_prompt-k{0.k}-{0.text.dataset}"

    method: Literal["soft_prompt"] = "soft_prompt"
    k: PositiveInt = 100
    init: Literal["random_rows", "first_rows", "text"] = "random_rows"
    init_text: Annotated[str, Field(min_length=1)] | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"

    @model_validator(mode="after")
    def _check_init(self) -> Self:
        if (self.init == "text") != (self.init_text is not None):
            raise ValueError("init 'text' and init_text belong together: give both or neither")
        if self.dtype == "bfloat16" and self.precision == "fp16":
            raise ValueError("dtype = 'bfloat16' goes with precision fp32 or bf16, not with the loss scale of fp16")
        return self


class LoRA(Learned):
    """Low-rank adapters on the query and value projections, learned as the prompts are (the paper's appendix A.5).

    layers: only the last so many decoder blocks, None for all: with r = 1 and layers = k / 4 it has as many trained
    parameters as a prompt of k rows, where queries and values are as wide as the model. BLOOM's fused projection is
    split while it learns; the adapter that is saved fits the fused one.
    """

    method: Literal["lora"] = "lora"
    r: PositiveInt = 32
    alpha: PositiveInt = 32
    dropout: Annotated[float, Finite, Field(ge=0, lt=1)] = 0.1
    layers: PositiveInt | None = None
    lr: Annotated[float, Finite, Field(gt=0, le=1e9)] = 2e-4
    weight_decay: Annotated[float, Finite, Field(ge=0)] = 0.0

    @property
    def in_front(self) -> bool:
        return False

    @property
    def label(self) -> str:
        layers, seed = (f"-last{self.layers}" if self.layers else ""), (f"-seed{self.seed}" if self.seed else "")
        return f"lora-r{self.r}{layers}-{self.text.dataset}{seed}"


class Untrained(Recovery):
    """Rows of the model's embedding in front of every input, in a learned prompt's place."""

    learned: ClassVar[bool] = False


class HardPrompt(Untrained):
    """A text in front of every input: [BOS] + its tokens + the input's tokens. Questions follow after a space.

    BOS stands once, at the very front, if the tokenizer puts it there or the input begins with it.
    """

    method: Literal["hard_prompt"] = "hard_prompt"
    text: Annotated[str, Field(min_length=1)] = PAPER_HARD_PROMPT
    bos: Literal["once"] = "once"  # in the key: inputs kept a second one before

    @property
    def label(self) -> str:
        return "hard_prompt" + (f"-{short_hash(self.text, 6)}" if self.text != PAPER_HARD_PROMPT else "")


class RandomPrompt(Untrained):
    """k distinct vocabulary rows drawn by `seed`, not trained: where a soft prompt of that seed starts."""

    LABEL: ClassVar[str] = "random_prompt-k{0.k}"

    method: Literal["random_prompt"] = "random_prompt"
    k: PositiveInt = 100
    seed: Seed = 0


class Bos(Untrained):
    """The tokenizer's beginning-of-text token alone, as one more row before whatever an input begins with."""

    method: Literal["bos"] = "bos"


class Adapter(Pinned, Recovery):
    """A PEFT adapter made elsewhere, a soft prompt or LoRA, in front of or inside every target.

    `path` is a folder or hub id, and becomes its short name; kind, k and width (a prompt's rows and numbers in each, 0
    for LoRA) are read from its configuration when a grid is planned.
    """

    NAMED_BY: ClassVar[str] = "path"
    PINNED_BY: ClassVar[str] = "pin_path"
    LABEL: ClassVar[str] = "adapter-{0.path}"
    learned: ClassVar[bool] = False

    method: Literal["adapter"] = "adapter"
    path: Annotated[str, Field(min_length=1)]
    kind: Literal["", "prompt", "lora"] = ""
    k: Annotated[int, Field(strict=True, ge=0)] = 0
    width: Annotated[int, Field(strict=True, ge=0)] = 0

    @property
    def in_front(self) -> bool:
        return self.kind != "lora"
