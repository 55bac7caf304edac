"""What a method is given to do its work with: models, token windows, a folder for what it makes, a place to report."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ctp import corpora, models
from ctp.inputs import Model, Pinned, Windows
from ctp.machine.arithmetic import widen
from ctp.memory import AtOnce, smaller
from ctp.methods import Dense, HardPrompt
from ctp.pins import location
from ctp.recover import adapter
from ctp.recover.state import TrainState
from ctp.spec import Compress, Evaluate, Learn, Runtime, key
from ctp.store import Store
from ctp.unchanged import Reads

if TYPE_CHECKING:  # transformers takes seconds
    from ctp.recover.prefix import Prefix

Report = Callable[[dict[str, Any]], None]


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
        self.report({"step": done, "steps": of})

    def notice(self, text: str) -> None:
        """Tell people a sentence about this cell; "" is not told."""
        if text:
            self.report({"notice": text})

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
        return models.load_tokenizer(self.location(self.base), self.base.revision)

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
        return self.cell.source.model.name

    @property
    def width(self) -> int:
        """Numbers in a row of the model's embedding, and so in a row of a prompt. Loads nothing."""
        if "loaded" in vars(self):
            return int(self.model.get_input_embeddings().embedding_dim)
        model = self.cell.source.model
        return models.facts(self.location(model), model.revision).width

    def windows(self, spec: Windows) -> Tensor:
        """Token windows (n, seq_len) on the CPU."""
        return token_windows(spec, self.tokenizer, self.runtime)

    def partial(self) -> Any:
        """Context manager: the folder of the last saved state of this cell, or None."""
        return self.store.partial(self.cell)

    def keep(self, state: TrainState) -> None:
        """Save a state to go on from. Raises Changed where what it was learned with is not what is pinned any more."""
        self.reads.check()
        self.store.save_partial(self.cell, state.step, state.save)


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
        self.report({"step": done, "steps": of, **self.lowered})

    def measured(self) -> dict[str, float]:
        """What the cell's measure gives, with fewer inputs at a time where memory runs out. Raises OutOfMemory."""
        if not self.cell.measure.batched:
            return self.cell.measure.measure(self)
        asked, before, at_once = self.runtime.batch, dict(self.record), AtOnce(self.runtime.batch, self.runtime.halved)

        def attempt(batch: int) -> dict[str, float]:
            for left in self.folder.iterdir():
                left.unlink() if left.is_file() else shutil.rmtree(left)
            self.record.clear()
            self.record.update(before)
            self.runtime, self.lowered = self.runtime.model_copy(update={"batch": batch}), smaller(asked, batch)
            return self.cell.measure.measure(self)

        metrics = at_once(attempt)
        self.record |= self.lowered
        return metrics

    def windows(self, spec: Windows) -> Tensor:
        """Token windows (n, seq_len) on the CPU. What they are enters the record: numbers on others do not compare."""
        ids = token_windows(spec, self.tokenizer, self.runtime)
        self.record["text"] = corpora.text_stats(ids, self.tokenizer, _sha256(self.tokenizer))
        return ids

    def behind(self, windows: Tensor) -> "list[tuple[Tensor, Prefix | Tensor | None]]":
        """Windows (n, s) with the prompt that stands in front of them.

        They are of two kinds where the prompt is a text: in those that begin with BOS it stands in front of the prompt.
        """
        recovery = self.cell.recovery.recovery if self.cell.recovery else None
        if not isinstance(recovery, HardPrompt):
            return [(windows, self.prefix)]
        from ctp.recover.opening import Opening

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
    with adapter.applied(model, store.fetch(cell.recovery)) as prompt:
        rows = None if prompt is None else prompt.to(device)
        yield EvaluateJob(**base, cell=cell, model=model, tokenizer=tokenizer, prompt=rows)


# ------------------------------------------------------------------ what they read

_held: tuple[tuple[str, bool], Any, Any] | None = None
_in_front: "tuple[tuple[str, ...], Prefix] | None" = None


def forget(texts: bool = False) -> None:
    """Free the model that stayed loaded, and what came of it; texts: and the windows of all texts."""
    global _held, _in_front
    _held = _in_front = None
    _sha256.cache_clear()
    if texts:
        _windows.clear()


def load_compressed(
    cell: Compress, store: Store, runtime: Runtime, device: str, packed: bool = False
) -> tuple[Any, Any]:
    """(model, tokenizer) of a finished Compress cell, held as its device computes it. The last one stays loaded: cells
    of one target come together.
    """
    global _held
    wanted = key(cell), packed
    if _held is None or _held[0] != wanted:
        forget()  # the old weights before the new ones come
        model, tokenizer = open_model(cell, store, runtime, device, packed)
        widen(model)
        _held = wanted, model, tokenizer
    return _held[1], _held[2]


def _prefix(cell: Evaluate, model: Any, prompt: Tensor) -> "Prefix":
    """The keys and values of the cell's prompt in its target. The last ones stay: cells of one prompt come together."""
    global _in_front
    inputs = tuple(key(i) for i in cell.inputs)
    if _in_front is None or _in_front[0] != inputs:
        import torch

        from ctp.recover.attach import frozen
        from ctp.recover.prefix import prefix

        _in_front = None  # the old ones before the new ones come
        with frozen(model), torch.no_grad():
            _in_front = inputs, prefix(model, prompt)
    return _in_front[1]


def open_model(cell: Compress, store: Store, runtime: Runtime, device: str, packed: bool = False) -> tuple[Any, Any]:
    """(model in eval mode, tokenizer) of a finished Compress cell, unpacked to ordinary weights bit for bit.

    packed: they are unpacked at every use only.
    """
    if isinstance(cell.compression, Dense):
        return _load_base(cell, runtime, device)
    from ctp.compression.artifact import Compressed

    small = Compressed.open(store.fetch(cell))
    return small.model(device, packed), small.tokenizer


def _load_base(cell: Compress, runtime: Runtime, device: str) -> tuple[Any, Any]:
    where = location(runtime.locations, cell.model)
    return models.load(where, cell.model.revision, cell.model.dtype, device)


_windows: dict[tuple[Windows, str], Tensor] = {}


def token_windows(spec: Windows, tokenizer: Any, runtime: Runtime) -> Tensor:
    """The token ids (n, seq_len) that the spec names, kept for the next cell that asks."""
    memo = (spec, _sha256(tokenizer))
    if memo not in _windows:
        custom = {n: corpora.parse_corpus(n, d) for n, d in runtime.datasets.items()}
        corpus = corpora.find(spec.dataset, custom)
        last = None if spec.documents is None else spec.skip + spec.documents
        documents = corpora.documents(location(runtime.locations, spec), corpus, spec.split, last)
        _windows[memo] = corpora.windows(spec, documents, tokenizer)
    return _windows[memo]


@lru_cache(maxsize=1)
def _sha256(tokenizer: Any) -> str:
    """Asked by every cell, and megabytes to digest: kept by object, since nothing changes a loaded tokenizer."""
    return corpora.tokenizer_sha256(tokenizer)
