"""Measures: what is measured on a target, with or without a recovery."""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from ctp.cells.inputs import Count, Pinned, PositiveInt, Windows
from ctp.cells.method import Method, short_hash

# The questions of the paper's case studies (figures 1, 7 and 8).
PAPER_QUESTIONS = "\n".join(
    f"Please give the answers to this question: {question}"
    for question in ("Where is Long Beach?", "Where is Tulsa, Oklahoma?", "What is Asparagus?", "Where is Boston?",
                     "Where is Memphis?", "Where is Colorado Springs?", "Where is Houston?", "Where is Omaha?")
)  # fmt: skip


class Measure(Method):
    """What is measured on a target.

    prompts_only: means nothing without a prompt. alone: nothing else may run on its machine. batched: it feeds
    `job.runtime.batch` inputs at a time, and fewer where memory runs out. generates: it decodes, token after token.
    """

    registry: ClassVar[dict[str, type[Method]]] = {}
    prompts_only: ClassVar[bool] = False
    alone: ClassVar[bool] = False
    batched: ClassVar[bool] = True
    generates: ClassVar[bool] = False

    @property
    def needed_tokens(self) -> int:
        """The longest input that it feeds for certain, prompt left out: what must fit the context."""
        return 0


class Perplexity(Measure):
    """Perplexity over fixed windows; the prompt stands outside the window, the first token is not scored."""

    LABEL: ClassVar[str] = "ppl-{0.text.dataset}-{0.text.split}"

    method: Literal["perplexity"] = "perplexity"
    text: Windows

    @property
    def needed_tokens(self) -> int:
        return self.text.seq_len


class Task(Pinned, Measure):
    """A task of lm-evaluation-harness, by its name there or as a YAML file.

    `revision` stands for the task's definition, the data that it reads and the harness: it is filled in when a grid is
    planned. limit: the first so many documents only.
    """

    NAMED_BY: ClassVar[str] = "name"
    PINNED_BY: ClassVar[str] = "pin_task"

    method: Literal["task"] = "task"
    name: Annotated[str, Field(min_length=1)]
    shots: Count = 0
    limit: PositiveInt | None = None

    @property
    def label(self) -> str:
        return f"task-{self.name}" + (f"-{self.shots}shot" if self.shots else "")


class Latency(Measure):
    """Seconds to read `seq_len` tokens behind the prompt (prefill), and for each of `new_tokens` after them (decode).

    Random tokens, greedy, with a cache; `warmup` rounds are thrown away, the median and spread are of `repeats`.
    """

    alone: ClassVar[bool] = True
    generates: ClassVar[bool] = True
    batched: ClassVar[bool] = False
    LABEL: ClassVar[str] = "latency-{0.seq_len}"

    method: Literal["latency"] = "latency"
    seq_len: PositiveInt = 1024
    new_tokens: PositiveInt = 32
    batch: PositiveInt = 1
    warmup: Count = 2
    repeats: PositiveInt = 7

    @property
    def needed_tokens(self) -> int:
        return self.seq_len + self.new_tokens


class Generation(Measure):
    """Answers to questions, one a line of `questions` (the paper's unless given): greedy, `new_tokens` at most."""

    generates: ClassVar[bool] = True
    method: Literal["generation"] = "generation"
    questions: Annotated[str, Field(min_length=1)] = PAPER_QUESTIONS
    new_tokens: PositiveInt = 64

    @property
    def label(self) -> str:
        return "generation" + (f"-{short_hash(self.questions, 6)}" if self.questions != PAPER_QUESTIONS else "")

    @property
    def needed_tokens(self) -> int:
        return self.new_tokens

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.questions.strip():
            raise ValueError("questions are blank lines only")
        return self


class Neighbours(Measure):
    """Cosine between every row of a prompt and the `top` vocabulary rows nearest to it (the paper's appendix D)."""

    prompts_only: ClassVar[bool] = True
    batched: ClassVar[bool] = False
    LABEL: ClassVar[str] = "neighbours"

    method: Literal["neighbours"] = "neighbours"
    top: PositiveInt = 100
