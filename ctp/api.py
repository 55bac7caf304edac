"""ctp from Python: compress a loaded model, learn a prompt through it, load what was made. No Ray, store or MLflow
is needed; everything here works on a Hugging Face causal language model and its tokenizer.
"""

import json
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import Tensor
from transformers import PreTrainedModel as Model
from transformers import PreTrainedTokenizerBase as Tokenizer

from ctp.cells import Compression, Recovery, SoftPrompt, Solver
from ctp.cells.inputs import Windows
from ctp.cells.runtime import Runtime
from ctp.compression.walk import compress_model
from ctp.data.textfiles import encodable
from ctp.data.windows import cut_windows
from ctp.execution.open import load_key
from ctp.formats.artifact import PACKED, Compressed, Routing
from ctp.formats.checkpoint import fetch, open_checkpoint, quantization
from ctp.learning.soft_prompt import learn
from ctp.machine.arithmetic import AUTOCAST, as_stored, dtype_name, notice, widen
from ctp.machine.device import pick
from ctp.models import sources
from ctp.models.config import config_facts
from ctp.models.load import load_model
from ctp.models.plain import not_plain
from ctp.planning.gridfile import explain
from ctp.prompts.adapter import attach_adapter
from ctp.prompts.attach import check_fit, context_of
from ctp.prompts.attached import HANDLE, attach_prompt
from ctp.prompts.files import LearnedPrompt
from ctp.storage.catalog import KEY

Texts = Iterable[str] | Tensor
Loaded = tuple[Model, Tokenizer]
Progress = Callable[[dict[str, Any]], None]


def compress(
    model: Model,
    tokenizer: Tokenizer,
    spec: Mapping[str, Any] | Solver,
    texts: Texts,
    *,
    count: int = 128,
    seq_len: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Compressed:
    """Compress the decoder's linears in place, on the model's device; returns what can be saved.

    spec: as in a grid file, for example {"method": "gptq", "bits": 3}. texts: documents to calibrate with, of which the
    first `count` windows of `seq_len` tokens (default: 2,048, or the model's context) are taken, or token ids
    (windows, tokens). progress is called with (blocks done, blocks). `routing` of the result counts the calibration
    tokens of each expert; a warning names experts with too few.

    Raises ValueError, before anything is changed, if the spec is wrong or does not fit the model, the texts hold no
    window, or the model is no plain chain of decoder blocks (a head is missing, LoRA is inside, it is quantized).
    """
    _check_plain(model, tokenizer)
    solver = _parsed(Compression, spec, "spec")
    if not isinstance(solver, Solver):
        raise ValueError(f"spec = {solver.label}: calibrated methods only: gptq, sparsegpt")
    if why := not_plain(model) or config_facts(model.config).refused.get("compress"):
        raise ValueError(why)
    windows = _windows(model, tokenizer, texts, seq_len, count)
    with as_stored(model):
        _announce(notice(dtype_name(model.dtype), model.device.type))
        routing = Routing()
        layers = compress_model(model, windows, solver, progress=progress, routing=routing)
        _announce(routing.notice())
        return replace(Compressed.of(model, layers, tokenizer), routing=routing)


def learn_prompt(
    model: Model,
    tokenizer: Tokenizer,
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
    token ids (windows, tokens). validation: likewise, to choose the best step by (default: the last tenth of the
    windows, at most 32). settings: fields of `ctp.cells.SoftPrompt`: steps, lr, batch, schedule, precision, ...
    progress is called with step, loss and rate about once a second.

    Raises ValueError if a setting is wrong or texts are too short, FloatingPointError if learning diverges, MemoryError
    if one window at once is too many.
    """
    _check_plain(model, tokenizer)
    spec, device = _prompt_spec(model, texts, k, seq_len, settings), pick(device)
    length = spec.text.seq_len
    train = _windows(model, tokenizer, texts, length, None, k)
    if validation is None:
        held = min(32, len(train) // 10)
        if not held:
            raise ValueError(f"texts give {len(train)} windows of {length} tokens: 10 are needed to hold one back")
        train, held_out = train[:-held], train[-held:]
    else:
        held_out = _windows(model, tokenizer, validation, length, None, k)
    _announce(notice(AUTOCAST.get(spec.precision, dtype_name(model.dtype)), device))
    unknown = {"loss": None, "lr": None, "tokens_per_s": None}
    report = None if progress is None else lambda p: progress(unknown | p.numbers())
    return learn(model, train, held_out, spec, tokenizer=tokenizer, runtime=Runtime(device=device), report=report)


def _prompt_spec(model: Model, texts: Texts, k: int, seq_len: int | None, settings: dict[str, Any]) -> SoftPrompt:
    """The checked settings, with windows of `seq_len`, of the given token ids, or as long as there is room."""
    if not isinstance(k, int) or k < 1:
        raise ValueError(f"k = {k!r}: should be a whole number above 0")
    context, length = context_of(model), texts.shape[-1] if isinstance(texts, Tensor) else seq_len
    if length is None:
        length = min(1024, (context or 1024 + k) - k)
        if length < 2:
            raise ValueError(f"k = {k}: leaves no room for text in the model's context of {context} tokens")
    if "text" in settings:
        raise ValueError("settings.text: give the documents as texts")
    steps = settings.get("steps", 30_000)
    fields: dict[str, Any] = {"validate_every": max(1, steps // 10)} if isinstance(steps, int) else {}
    fields["text"] = {"dataset": "given", "split": "train", "seq_len": length}
    return _parsed(Recovery, {"method": "soft_prompt", "k": k, **fields, **settings}, "settings")


def load(
    what: str | Path,
    *,
    prompt: str | Path | Tensor | LearnedPrompt | None = None,
    store: str | None = None,
    device: str = "auto",
) -> Loaded:
    """(model in eval mode, tokenizer) of a folder, a name, or the key of a stored artifact.

    what: a folder with a compressed, exported or plain model, a checkpoint of another tool (docs/formats.md), a GGUF
    file, or a PEFT adapter whose base model is a folder; a hub id or packaged model; or a key (its first 6 digits or
    more) in `store` (default: CTP_STORE, else results/store). prompt: what `learn_prompt` gave, rows (k, d) or an
    adapter's folder, to put in front; a Learn key and an adapter's folder bring their own. With LoRA it is a PeftModel.

    Quantized weights are unpacked, bit for bit. A model in half precision that its device has no fast arithmetic for
    comes in float32, with the same values and a warning. The tokenizer pads on the left, so that batches can be
    generated. Raises ValueError or StoreError, in one sentence, if there is no such thing.
    """
    device = pick(device)
    folder = Path(what).expanduser()
    if folder.is_dir():
        model, tokenizer = _load_folder(folder, device)
    elif KEY.fullmatch(str(what)):
        model, tokenizer = load_key(str(what), store, device)
    else:
        _, revision, location = sources.locate(str(what))
        there = fetch(location, revision) if location.startswith("hub:") else None
        if there is not None and (any(there.glob("*.safetensors")) or not (there / "config.json").is_file()):
            model, tokenizer = _load_folder(there, device)
        else:
            model, tokenizer = load_model(location, revision, "auto", device)
    _announce(widen(model))
    if isinstance(prompt, str | Path):
        model = attach_adapter(model, Path(prompt))
    elif prompt is not None:
        attach_prompt(model, prompt)
    tokenizer.padding_side = "left"  # as generating in batches needs it
    if tokenizer.pad_token is None:  # padding is masked: any token does
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.bos_token or tokenizer.convert_ids_to_tokens(0)
    return model, tokenizer


def _load_folder(folder: Path, device: str) -> Loaded:
    adapter = folder / "adapter_config.json"
    whole = (folder / PACKED).is_file() or (folder / "config.json").is_file()
    if adapter.is_file() and not whole:
        base = str(json.loads(adapter.read_text()).get("base_model_name_or_path"))
        places = [p for p in (Path(base), folder.parent / base) if p.is_dir() and p.resolve() != folder.resolve()]
        if not places:
            raise ValueError(f"{folder}: its base model {base!r} is no folder; say load(base, prompt={str(folder)!r})")
        model, tokenizer = _load_folder(places[0], device)
    elif (folder / PACKED).is_file() or quantization(folder) is not None:
        opened = open_checkpoint(folder)
        model, tokenizer = opened.model(device), opened.tokenizer
    else:
        model, tokenizer = load_model(sources.locate(str(folder))[2], "", "auto", device)
    return (attach_adapter(model, folder) if adapter.is_file() else model), tokenizer


def _announce(text: str) -> None:
    """A warning, shown once, at the line that called ctp."""
    if text:
        warnings.warn(text, stacklevel=3)


def _check_plain(model: object, tokenizer: object) -> None:
    """Raises ValueError unless these are a plain transformers model and its tokenizer."""
    if not isinstance(model, Model):
        raise ValueError(f"model: a {type(model).__name__}; a transformers.PreTrainedModel is needed, not wrapped")
    if hasattr(model, HANDLE):
        raise ValueError("the model has a soft prompt attached: remove() it first")
    if not isinstance(tokenizer, Tokenizer):
        raise ValueError(f"tokenizer: a {type(tokenizer).__name__}; the model's transformers tokenizer is needed")


def _windows(
    model: Model, tokenizer: Tokenizer, texts: Texts, seq_len: int | None, count: int | None, k: int = 0
) -> Tensor:
    """Token windows (n, seq_len) of documents, or the token ids given. They fit the model behind k rows."""
    if count is not None and (not isinstance(count, int) or count < 1):
        raise ValueError(f"count = {count!r}: should be a whole number above 0")
    if isinstance(texts, Tensor):
        windows = texts[:count]
    else:
        documents = [] if isinstance(texts, str) or not isinstance(texts, Iterable) else list(texts)
        if not documents or not all(isinstance(t, str) for t in documents):
            raise ValueError("texts: a list of documents, or token ids (windows, tokens)")
        if half := [i for i, t in enumerate(documents) if not encodable(t)]:
            raise ValueError(f"texts[{half[0]}] has half a character, a lone surrogate: a tokenizer cannot read it")
        length = min(2048, context_of(model) or 2048) if seq_len is None else seq_len
        spec = _parsed(Windows, {"dataset": "given", "split": "train", "seq_len": length, "join": "\n\n"}, "texts")
        windows = cut_windows(spec, documents, tokenizer)[:count]
    check_fit(model, windows, k)
    return windows


def _parsed(kind: Any, value: Any, place: str) -> Any:
    """`value` as a spec. Raises ValueError with one line per mistake."""
    try:
        return kind.model_validate(value)
    except ValidationError as e:
        raise ValueError("; ".join(explain(place, value, x, kind) for x in e.errors(include_url=False))) from e
