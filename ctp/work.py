"""execute(cell, store, runtime): fetch the inputs, call the pure function, publish what it gives."""

import json
import platform
import resource
import subprocess
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ctp import corpora, models
from ctp.compression import compress_model
from ctp.compression.artifact import Compressed
from ctp.evaluate.perplexity import perplexity
from ctp.formats import checkpoint
from ctp.inputs import Windows
from ctp.methods import Adapter, Checkpoint, Dense, Perplexity, SoftPrompt, Solver
from ctp.pins import location
from ctp.recover import adapter
from ctp.recover.soft_prompt import learn
from ctp.recover.state import TrainState
from ctp.spec import Cell, Compress, Evaluate, Learn, Runtime, key
from ctp.store import Draft, Store

Report = Callable[[dict[str, Any]], None]
LIBRARIES = ("torch", "transformers", "accelerate", "ray", "mlflow", "peft", "safetensors")


def execute(cell: Cell, store: Store, runtime: Runtime, report: Report) -> None:
    """Do one cell, unless it is done; its inputs must be. Progress goes to `report` as flat dicts of numbers."""
    if store.has(cell):
        return
    device = pick_device(runtime)
    about = surroundings()  # before the work: what could fail here must not cost its result
    torch.manual_seed(0)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    begun = time.monotonic()
    with store.publish(cell) as draft:
        if isinstance(cell, Compress):
            draft.record["metrics"] = _compress(cell, draft, runtime, device, report)
        elif isinstance(cell, Learn):
            draft.record["metrics"] = _learn(cell, draft, store, runtime, device, report)
        elif isinstance(cell, Evaluate):
            draft.record["metrics"] = _evaluate(cell, draft, store, runtime, device, report)
        else:
            raise TypeError(f"nothing here does a {type(cell).__name__}")
        peak = torch.cuda.max_memory_allocated() if device == "cuda" else _peak_memory()
        draft.record |= {"seconds": time.monotonic() - begun, "device": device, "peak_memory_bytes": peak}
        draft.record |= {"created": time.time(), **about}


# ---------------------------------------------------------------- the three kinds


def _compress(cell: Compress, draft: Draft, runtime: Runtime, device: str, report: Report) -> dict[str, float]:
    spec = cell.compression
    if isinstance(spec, Dense):  # the model itself is the artifact, at its pinned revision
        draft.record["location"] = location(runtime.locations, cell.model)
        size = models.facts(draft.record["location"], cell.model.revision).parameters
        return {"parameters": size, "sparsity": 0.0}
    if isinstance(spec, Checkpoint):
        small = _import_checkpoint(cell, spec, runtime)
        small.save(draft.path)
        return small.stats()
    if not isinstance(spec, Solver):
        raise TypeError(f"nothing here compresses by {spec.method}")
    assert cell.calibration is not None
    global _held
    _held = None  # the model of the cell before would stay in memory beside the one to compress
    model, tokenizer = _load_base(cell, runtime, device)
    ids = token_windows(cell.calibration, tokenizer, runtime).to(device)
    # Not Runtime.batch: sums in another order round a weight to another code here and there.
    layers = compress_model(model, ids, spec, progress=lambda n, of: report({"step": n, "steps": of}))
    small = Compressed.of(model, layers, tokenizer)
    small.save(draft.path)
    return small.stats()


def _import_checkpoint(cell: Compress, spec: Checkpoint, runtime: Runtime) -> Compressed:
    """A model compressed elsewhere, with the base model's tokenizer: all cells of a model score the same tokens."""
    folder = checkpoint.fetch(location(runtime.locations, spec), spec.revision)
    tokenizer = models.load_tokenizer(location(runtime.locations, cell.model), cell.model.revision)
    small = checkpoint.open_checkpoint(folder, cell.model.dtype, tokenizer)
    small.model()  # raises where a weight is missing or odd
    return small


def _learn(cell: Learn, draft: Draft, store: Store, runtime: Runtime, device: str, report: Report) -> dict[str, float]:
    spec = cell.recovery
    if isinstance(spec, Adapter):
        return _import(spec, draft, runtime)
    if not isinstance(spec, SoftPrompt):
        raise TypeError(f"nothing here learns {spec.method}")
    model, tokenizer = load_compressed(cell.source, store, runtime, device)
    train = token_windows(spec.text, tokenizer, runtime)
    validation = token_windows(spec.validation, tokenizer, runtime)

    def keep(state: TrainState) -> None:
        store.save_partial(cell, state.step, state.save)

    with store.partial(cell) as resume:
        learned = learn(
            model, train, validation, spec, tokenizer=tokenizer, runtime=runtime,
            resume=resume, checkpoint=keep, report=report,
        )  # fmt: skip
    learned.save(draft.path, cell.source.model.name)
    first, best = learned.history[0]["val_loss"], learned.best_val_loss
    draft.record["train_seconds"] = learned.seconds
    return {
        "best_step": learned.best_step,
        "best_val_loss": best,
        "initial_val_loss": first,
        "trainable_parameters": learned.embeddings.numel(),
    }


def _import(spec: Adapter, draft: Draft, runtime: Runtime) -> dict[str, float]:
    """Copy an adapter that was made elsewhere."""
    adapter.copy_adapter(adapter.fetch(location(runtime.locations, spec), spec.revision), draft.path)
    return {"trainable_parameters": adapter.parameters(draft.path)}


def _evaluate(
    cell: Evaluate, draft: Draft, store: Store, runtime: Runtime, device: str, report: Report
) -> dict[str, float]:
    measure = cell.measure
    if not isinstance(measure, Perplexity):
        raise TypeError(f"nothing here measures {measure.method}")
    model, tokenizer = load_compressed(cell.target, store, runtime, device)
    ids = token_windows(measure.text, tokenizer, runtime)
    with adapter.applied(model, store.fetch(cell.recovery)) if cell.recovery else nullcontext() as prompt:
        result = perplexity(
            model, ids.to(device), None if prompt is None else prompt.to(device), batch=runtime.batch,
            progress=lambda n, of: report({"step": n, "steps": of}),
        )  # fmt: skip
    draft.record["text"] = corpora.text_stats(ids, tokenizer)
    metrics = {
        "ppl": result.ppl,
        "ppl_paper": result.ppl_paper,
        "nll_sum": result.nll_sum,
        "scored_tokens": result.scored_tokens,
        "positions": result.positions,
    }
    (draft.path / "result.json").write_text(json.dumps(metrics, indent=1, allow_nan=False))
    return metrics


# ------------------------------------------------------------------ what they read

_held: tuple[str, Any, Any] | None = None


def load_compressed(cell: Compress, store: Store, runtime: Runtime, device: str) -> tuple[Any, Any]:
    """(model, tokenizer) of a finished Compress cell. The last one stays loaded: cells of one target come together."""
    global _held
    if _held is None or _held[0] != key(cell):
        _held = None  # free the old weights before the new ones come
        _held = key(cell), *open_model(cell, store, runtime, device)
    return _held[1], _held[2]


def open_model(cell: Compress, store: Store, runtime: Runtime, device: str) -> tuple[Any, Any]:
    """(model in eval mode, tokenizer) of a finished Compress cell, unpacked to ordinary weights bit for bit."""
    if isinstance(cell.compression, Dense):
        return _load_base(cell, runtime, device)
    small = Compressed.open(store.fetch(cell))
    return small.model(device), small.tokenizer


def _load_base(cell: Compress, runtime: Runtime, device: str) -> tuple[Any, Any]:
    where = location(runtime.locations, cell.model)
    return models.load(where, cell.model.revision, cell.model.dtype, device)


_windows: dict[tuple[Windows, str], Tensor] = {}


def token_windows(spec: Windows, tokenizer: Any, runtime: Runtime) -> Tensor:
    """The token ids (n, seq_len) that the spec names, kept for the next cell that asks."""
    memo = (spec, corpora.tokenizer_sha256(tokenizer))
    if memo not in _windows:
        custom = {n: corpora.parse_corpus(n, d) for n, d in runtime.datasets.items()}
        corpus = corpora.find(spec.dataset, custom)
        last = None if spec.documents is None else spec.skip + spec.documents
        documents = corpora.documents(location(runtime.locations, spec), corpus, spec.split, last)
        _windows[memo] = corpora.windows(spec, documents, tokenizer)
    return _windows[memo]


# -------------------------------------------------------------------- surroundings


def pick_device(runtime: Runtime) -> str:
    """ "cuda" or "cpu"; "auto" takes the GPU where this process has one."""
    if runtime.device != "auto":
        return runtime.device
    return "cuda" if torch.cuda.is_available() else "cpu"


def _peak_memory() -> int:
    """Peak resident bytes of this process so far (Linux counts in KiB, macOS in bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024


@lru_cache
def surroundings() -> dict[str, Any]:
    """What a manifest says of the code and machine that made it."""
    return {
        "git_commit": _git_commit(),
        "versions": {name: _version(name) for name in ("ctp", *LIBRARIES)},
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
    }


def _git_commit() -> str | None:
    """The commit of the checkout that ctp runs from; None where it is installed, or there is no git."""
    root = Path(__file__).parent.parent
    if not (root / ".git").exists():
        return None
    try:
        asked = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return asked.stdout.strip() or None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
