"""Jobs: what a method works with. Models, token windows, a folder for the result, a place to report."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ctp.cells import HardPrompt
from ctp.cells.cell import Compress, Evaluate, Learn
from ctp.cells.events import Notice, Progress, Report
from ctp.cells.inputs import Model, Pinned, Windows
from ctp.cells.runtime import Runtime, location
from ctp.data.windows import text_stats
from ctp.execution import loading
from ctp.execution.loading import Loaded, load_compressed, token_windows
from ctp.execution.unchanged import Reads
from ctp.learning.checkpoint import TrainState
from ctp.models.config import model_facts
from ctp.models.load import load_tokenizer
from ctp.prompts import adapter
from ctp.prompts.files import write_plain
from ctp.storage.manifest import Record
from ctp.storage.ref import identity, ref
from ctp.storage.store import Store

if TYPE_CHECKING:  # transformers takes seconds
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ctp.prompts.prefix import Prefix

Place = tuple[Store, Runtime, str, Path, Record, Report, Reads]  # the fields of a Job


@dataclass
class Job:
    """One cell being done. folder: its payload. record: fields of its manifest. reads: inputs outside the store."""

    store: Store
    runtime: Runtime
    device: str
    folder: Path
    record: Record
    report: Report
    reads: Reads

    def progress(self, done: int, of: int) -> None:
        """Report how many steps are done."""
        self.report(Progress(done, of))

    def notice(self, text: str) -> None:
        """Show the user a sentence about this cell; "" shows nothing."""
        if text:
            self.report(Notice(text))

    def location(self, thing: Pinned) -> str:
        """Where a pinned thing is on this machine."""
        return location(self.runtime.locations, thing)

    def write_json(self, name: str, value: object) -> None:
        """Write a payload file. Raises ValueError on a number that is not finite."""
        write_plain(self.folder / name, value)


@dataclass
class CompressJob(Job):
    """cell: what to compress and how."""

    cell: Compress

    @property
    def base(self) -> Model:
        """The model before compression."""
        return self.cell.model

    def load_base(self) -> Loaded:
        """(model, tokenizer) before compression, for this job to change."""
        loading.forget()  # the model of the previous cell would stay in memory beside the one to compress
        return loading.load_base(self.cell, self.runtime, self.device)

    def base_tokenizer(self) -> "PreTrainedTokenizerBase":
        """The tokenizer of the model before compression."""
        return load_tokenizer(self.location(self.base), self.base.revision)

    def calibration(self, tokenizer: "PreTrainedTokenizerBase") -> Tensor:
        """The token windows (n, seq_len) to calibrate with, on the job's device."""
        assert self.cell.calibration is not None
        return token_windows(self.cell.calibration, tokenizer, self.runtime).to(self.device)


@dataclass
class LearnJob(Job):
    """cell: what to recover, and how. The model is the compressed one, unpacked."""

    cell: Learn

    @cached_property
    def loaded(self) -> Loaded:
        """(model in eval mode, tokenizer). LoRA goes into ordinary linears: packed ones are for prompts."""
        packed = self.runtime.packed and self.cell.recovery.in_front
        return load_compressed(self.cell.source, self.store, self.runtime, self.device, packed)

    @property
    def model(self) -> "PreTrainedModel":
        """The compressed model on the job's device. Leave it as it was."""
        return self.loaded[0]

    @property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        return self.loaded[1]

    @property
    def model_name(self) -> str:
        return self.cell.model.name

    @property
    def width(self) -> int:
        """Numbers in a row of the model's embedding, and so in a row of a prompt. Loads nothing."""
        if "loaded" in vars(self):
            return int(self.model.get_input_embeddings().embedding_dim)
        model = self.cell.model
        return model_facts(self.location(model), model.revision).width

    def windows(self, spec: Windows) -> Tensor:
        """Token windows (n, seq_len) on the CPU."""
        return token_windows(spec, self.tokenizer, self.runtime)

    def partial(self) -> AbstractContextManager[Path | None]:
        """The folder of the last saved state of this cell, or None."""
        return self.store.states.newest(ref(self.cell))

    def keep(self, state: TrainState) -> None:
        """Save a state to resume from. Raises Changed if what it learns from is no longer what was pinned."""
        self.reads.check()
        self.store.states.save(ref(self.cell), identity(self.cell), state.step, state.save)


@dataclass
class EvaluateJob(Job):
    """cell: what to measure. prompt: rows (k, d) in front, or None; LoRA is inside the model already.

    lowered: a note for the record if memory allows fewer inputs at once than runtime.batch.
    """

    cell: Evaluate
    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    prompt: Tensor | None
    lowered: dict[str, Any] = field(default_factory=dict)

    def progress(self, done: int, of: int) -> None:
        """Report how many steps are done."""
        self.report(Progress(done, of, **self.lowered))

    def windows(self, spec: Windows) -> Tensor:
        """Token windows (n, seq_len) on the CPU, described in the record: other windows give other numbers."""
        ids = token_windows(spec, self.tokenizer, self.runtime)
        self.record["text"] = text_stats(ids, self.tokenizer, loading.tokenizer_digest(self.tokenizer))
        return ids

    @property
    def hard_prompt(self) -> str:
        """The text in front of every input; "" if the prompt is not a text."""
        recovery = self.cell.recovery.recovery if self.cell.recovery else None
        return recovery.text if isinstance(recovery, HardPrompt) else ""

    def behind(self, windows: Tensor) -> "list[tuple[Tensor, Prefix | Tensor | None]]":
        """Windows (n, s) with the prompt in front of them; a BOS that windows begin with moves before a hard prompt."""
        from ctp.prompts.opening import Opening

        opening = Opening.of_windows(self.model, self.tokenizer, self.hard_prompt) if self.hard_prompt else None
        if opening is None:
            return [(windows, self.prefix)]
        begins, swapped = opening.split(windows)
        parts: list[tuple[Tensor, Prefix | Tensor | None]] = [(swapped[begins], opening.rows)] if begins.any() else []
        return parts if begins.all() else [*parts, (windows[~begins], self.prefix)]

    @property
    def prefix(self) -> "Prefix | None":
        """The prompt as the model reads it, or None; kept for the next cell with this target and prompt."""
        return None if self.prompt is None else loading.prompt_prefix(self.cell, self.model, self.prompt)


@contextmanager
def evaluating(cell: Evaluate, place: Place) -> Iterator[EvaluateJob]:
    """The job of an Evaluate cell: its target is loaded and its recovery applied, then removed on the way out."""
    store, runtime, device = place[:3]
    model, tokenizer = load_compressed(cell.target, store, runtime, device)
    if cell.recovery is None:
        yield EvaluateJob(*place, cell, model, tokenizer, prompt=None)
        return
    with adapter.applied(model, store.fetch(ref(cell.recovery))) as prompt:
        rows = None if prompt is None else prompt.to(device)
        yield EvaluateJob(*place, cell, model, tokenizer, rows)
