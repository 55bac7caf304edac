"""What a method is given to do its work with: models, token windows, a folder for what it makes, a place to report."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
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
from ctp.execution.unchanged import Reads
from ctp.learning.checkpoint import TrainState
from ctp.models.config import model_facts
from ctp.models.load import load_tokenizer
from ctp.prompts import adapter
from ctp.storage.store import Store

if TYPE_CHECKING:  # transformers takes seconds
    from ctp.prompts.prefix import Prefix
from ctp.execution.loading import _load_base, _prefix, _sha256, forget, load_compressed, token_windows
from ctp.storage.ref import identity, ref


@dataclass
class Job:
    """One cell being done. folder: its payload, empty at first. record: what its manifest says beside the metrics.

    reads: the models and texts outside the store that it reads.
    """

    store: Store
    runtime: Runtime
    device: str
    folder: Path
    record: dict[str, Any]
    report: Report
    reads: Reads = field(default=Reads({}), kw_only=True)

    def progress(self, done: int, of: int) -> None:
        """Tell how many steps are done."""
        self.report(Progress(done, of))

    def notice(self, text: str) -> None:
        """Tell people a sentence about this cell; "" is not told."""
        if text:
            self.report(Notice(text))

    def location(self, thing: Pinned) -> str:
        """Where a pinned thing lies on this machine."""
        return location(self.runtime.locations, thing)

    def write_json(self, name: str, value: Any) -> None:
        """A payload file. Raises ValueError on a number that is not finite."""
        (self.folder / name).write_text(json.dumps(value, indent=1, allow_nan=False) + "\n")


@dataclass
class CompressJob(Job):
    """cell: what is to be compressed and how."""

    cell: Compress

    @property
    def base(self) -> Model:
        """The model before compression."""
        return self.cell.model

    def load_base(self) -> tuple[Any, Any]:
        """(model, tokenizer) before compression, for this job to change."""
        forget()  # the model of the cell before would stay in memory beside the one to compress
        return _load_base(self.cell, self.runtime, self.device)

    def base_tokenizer(self) -> Any:
        """The tokenizer of the model before compression."""
        return load_tokenizer(self.location(self.base), self.base.revision)

    def calibration(self, tokenizer: Any) -> Tensor:
        """The token windows (n, seq_len) to calibrate with, on the job's device."""
        assert self.cell.calibration is not None
        return token_windows(self.cell.calibration, tokenizer, self.runtime).to(self.device)


@dataclass
class LearnJob(Job):
    """cell: what is to be recovered, and how. The model is the compressed one, unpacked."""

    cell: Learn

    @cached_property
    def loaded(self) -> tuple[Any, Any]:
        """(model in eval mode, tokenizer). LoRA is put into ordinary linears: packed ones are for prompts."""
        packed = self.runtime.packed and self.cell.recovery.in_front
        return load_compressed(self.cell.source, self.store, self.runtime, self.device, packed)

    @property
    def model(self) -> Any:
        """The compressed model on the job's device: give it back as it was."""
        return self.loaded[0]

    @property
    def tokenizer(self) -> Any:
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

    def partial(self) -> Any:
        """Context manager: the folder of the last saved state of this cell, or None."""
        return self.store.states.newest(ref(self.cell))

    def keep(self, state: TrainState) -> None:
        """Save a state to go on from. Raises Changed where what it was learned with is not what is pinned any more."""
        self.reads.check()
        self.store.states.save(ref(self.cell), identity(self.cell), state.step, state.save)


@dataclass
class EvaluateJob(Job):
    """cell: what is to be measured. prompt: rows (k, d) in front, None without; LoRA is inside the model already.

    lowered: what the record says of the inputs at a time, where memory allows fewer than runtime.batch.
    """

    cell: Evaluate
    model: Any
    tokenizer: Any
    prompt: Tensor | None
    lowered: dict[str, Any] = field(default_factory=dict)

    def progress(self, done: int, of: int) -> None:
        """Tell how many steps are done."""
        self.report(Progress(done, of, **self.lowered))

    def windows(self, spec: Windows) -> Tensor:
        """Token windows (n, seq_len) on the CPU. What they are enters the record: numbers on others do not compare."""
        ids = token_windows(spec, self.tokenizer, self.runtime)
        self.record["text"] = text_stats(ids, self.tokenizer, _sha256(self.tokenizer))
        return ids

    def behind(self, windows: Tensor) -> "list[tuple[Tensor, Prefix | Tensor | None]]":
        """Windows (n, s) with the prompt that stands in front of them.

        They are of two kinds where the prompt is a text: in those that begin with BOS it stands in front of the prompt.
        """
        recovery = self.cell.recovery.recovery if self.cell.recovery else None
        if not isinstance(recovery, HardPrompt):
            return [(windows, self.prefix)]
        from ctp.prompts.opening import Opening

        opening = Opening.of_windows(self.model, self.tokenizer, recovery.text)
        if opening is None:
            return [(windows, self.prefix)]
        begins, swapped = opening.split(windows)
        parts: list[tuple[Tensor, Prefix | Tensor | None]] = [(swapped[begins], opening.rows)] if begins.any() else []
        return parts if begins.all() else [*parts, (windows[~begins], self.prefix)]

    @property
    def prefix(self) -> "Prefix | None":
        """The prompt as the model reads it, None without one; kept for the next cell with this target and prompt."""
        return None if self.prompt is None else _prefix(self.cell, self.model, self.prompt)


@contextmanager
def evaluating(cell: Evaluate, **base: Any) -> Iterator[EvaluateJob]:
    """The job of an Evaluate cell, its target loaded and its recovery applied; taken off again on the way out."""
    store, runtime, device = base["store"], base["runtime"], base["device"]
    model, tokenizer = load_compressed(cell.target, store, runtime, device)
    if cell.recovery is None:
        yield EvaluateJob(**base, cell=cell, model=model, tokenizer=tokenizer, prompt=None)
        return
    with adapter.applied(model, store.fetch(ref(cell.recovery))) as prompt:
        rows = None if prompt is None else prompt.to(device)
        yield EvaluateJob(**base, cell=cell, model=model, tokenizer=tokenizer, prompt=rows)
