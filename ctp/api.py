"""ctp from Python: compress a loaded model, learn a prompt through it, load what was made. No Ray, store or MLflow
is needed; everything here works on a Hugging Face causal language model and its tokenizer.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from ctp import corpora, models
from ctp.compression import compress_model
from ctp.compression.artifact import PACKED, Compressed
from ctp.formats.checkpoint import open_checkpoint, quantization
from ctp.gridfile import explain
from ctp.inputs import Windows
from ctp.methods import AnyCompression, AnyRecovery, Solver
from ctp.recover.adapter import attach_adapter
from ctp.recover.prompted import attach_prompt
from ctp.recover.soft_prompt import learn
from ctp.recover.state import LearnedPrompt
from ctp.spec import Runtime

Texts = Sequence[str] | Tensor
Progress = Callable[[dict[str, Any]], None]


def compress(
    model: Any,
    tokenizer: Any,
    spec: Mapping[str, Any] | Solver,
    texts: Texts,
    *,
    count: int = 128,
    seq_len: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Compressed:
    """Compress the decoder's linears in place, on the device where the model lies; what comes back can be saved.

    spec: as in a grid file, for example {"method": "gptq", "bits": 3}. texts: documents to calibrate with, of which the
    first `count` windows of `seq_len` tokens (default: 2,048, or the model's context) are taken, or token ids
    (windows, tokens) as they are. progress is told (blocks done, blocks).

    Raises ValueError where the spec is wrong, does not fit the model, or the texts hold no window.
    """
    solver = _parsed(AnyCompression, spec, "spec")
    if not isinstance(solver, Solver):
        raise ValueError(f"spec = {solver.label}: calibrated methods only: gptq, sparsegpt")
    windows = _windows(model, tokenizer, texts, seq_len, count)
    layers = compress_model(model, windows, solver, progress=progress)
    return Compressed.of(model, layers, tokenizer)


def learn_prompt(
    model: Any,
    tokenizer: Any,
    texts: Texts,
    *,
    validation: Texts | None = None,
    k: int = 100,
    seq_len: int | None = None,
    device: str = "auto",
    progress: Progress | None = None,
    **settings: Any,
) -> LearnedPrompt:
    """Learn k prompt rows in front of `model`, whose weights stay as they are; Eq. (1) of the paper.

    texts: documents, cut into windows of `seq_len` tokens (default: 1,024, or what the context leaves beside k), or
    token ids (windows, tokens). validation: likewise, to choose the best step by; without it the last tenth of the
    windows is kept apart for that (at most 32). settings: fields of ctp.methods.SoftPrompt: steps, lr, batch,
    schedule, precision, ... progress is told step, loss and rate about once a second.

    Raises ValueError where a setting is wrong or texts are too short, FloatingPointError where learning diverges.
    """
    context = _context(model)
    length = texts.shape[1] if isinstance(texts, Tensor) else seq_len or min(1024, (context or 1024 + k) - k)
    if length < 2:
        raise ValueError(f"k = {k}: leaves no room for text in the model's context of {context} tokens")
    text = {"dataset": "given", "split": "train", "seq_len": length}
    asked = {"method": "soft_prompt", "k": k, "text": text, **settings}
    spec = _parsed(AnyRecovery, {"validate_every": max(1, settings.get("steps", 30_000) // 10), **asked}, "settings")
    train = _windows(model, tokenizer, texts, length, None)
    if validation is None:
        held = min(32, len(train) // 10)
        if not held:
            raise ValueError(f"texts give {len(train)} windows of {length} tokens: 10 are needed to hold one back")
        train, held_out = train[:-held], train[-held:]
    else:
        held_out = _windows(model, tokenizer, validation, length, None)
    return learn(model, train, held_out, spec, tokenizer=tokenizer, runtime=Runtime(device=device), report=progress)


def load(
    what: str | Path, *, prompt: str | Path | Tensor | None = None, store: str | None = None, device: str = "auto"
) -> tuple[Any, Any]:
    """A ready model in eval mode, and its tokenizer, from a folder or the key of a stored artifact.

    what: a folder with a model that ctp compressed or exported, a checkpoint of AutoGPTQ, GPTQModel or llm-compressor,
    a plain model, or a PEFT adapter (its base model is loaded too); or a key (its first 6 digits or more) in `store`
    (default: CTP_STORE, else results/store). prompt: an adapter's folder, or rows (k, d), to put in front; a Learn key
    and an adapter's folder bring their own. `generate` and the forward pass of the model then work as without prompt.

    Quantized weights come unpacked to ordinary ones, bit for bit. The tokenizer pads on the left, with the end of text
    where it has no token for that, so that batches can be generated. Raises ValueError or ctp.store.StoreError, in one
    sentence, where there is no such thing.
    """
    device = _device(device)
    folder = Path(what).expanduser()
    if folder.is_dir():
        model, tokenizer = _load_folder(folder, device)
    else:
        from ctp.artifacts import load_key

        model, tokenizer = load_key(str(what), store, device)
    if isinstance(prompt, Tensor):
        attach_prompt(model, prompt)
    elif prompt is not None:
        model = attach_adapter(model, Path(prompt))
    tokenizer.padding_side = "left"  # as generating in batches needs it
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def _load_folder(folder: Path, device: str) -> tuple[Any, Any]:
    if (folder / "adapter_config.json").is_file():
        base = json.loads((folder / "adapter_config.json").read_text()).get("base_model_name_or_path")
        if not base or not Path(base).is_dir():
            raise ValueError(
                f"{folder} is an adapter, and its base model {base!r} no folder: load(base, prompt=adapter)"
            )
        model, tokenizer = _load_folder(Path(base), device)
        return attach_adapter(model, folder), tokenizer
    if (folder / PACKED).is_file():
        opened = Compressed.open(folder)
        return opened.model(device), opened.tokenizer
    location = models.locate(str(folder))[2]
    if quantization(folder) is not None:
        opened = open_checkpoint(folder)
        return opened.model(device), opened.tokenizer
    return models.load(location, "", "auto", device)


def _device(device: str) -> str:
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device = {device!r}: allowed: auto, cpu, cuda")
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def _context(model: Any) -> int | None:
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def _windows(model: Any, tokenizer: Any, texts: Texts, seq_len: int | None, count: int | None) -> Tensor:
    """Token windows (n, seq_len) of documents; token ids are taken as they are."""
    if isinstance(texts, Tensor):
        return texts[:count]
    if isinstance(texts, str) or not all(isinstance(t, str) for t in texts):
        raise ValueError("texts: a list of documents, or token ids (windows, tokens)")
    length = seq_len or min(2048, _context(model) or 2048)
    spec = Windows(dataset="given", split="train", seq_len=length, join="\n\n")
    return corpora.windows(spec, texts, tokenizer)[:count]


def _parsed(kind: Any, value: Any, place: str) -> Any:
    """`value` as a spec. Raises ValueError with one line per mistake."""
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as e:
        raise ValueError("; ".join(explain(place, value, x, kind) for x in e.errors(include_url=False))) from e
