"""How long a model takes to read tokens behind a prompt (prefill) and to write each token after them (decode)."""

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ctp.machine.record import process_peak
from ctp.prompts.attach import check_context, check_readable, check_shape, frozen
from ctp.prompts.prefix import kept, with_prompt

SEED = 0  # of the tokens that are read


@dataclass(frozen=True)
class LatencyResult:
    """Seconds of each round, in order: of the whole prefill, and of decode per step (a token for each row).

    prompt_tokens: k. cached_tokens: positions in the cache after a round, k + seq_len + new_tokens; cache_bytes: their
    size. memory_peak_bytes: of what `memory_measured` names.
    """

    prefill: tuple[float, ...]
    decode: tuple[float, ...]
    prompt_tokens: int
    cached_tokens: int
    cache_bytes: int
    memory_peak_bytes: int
    memory_measured: str

    def metrics(self) -> dict[str, float]:
        """Medians, least, most and (of several rounds) interquartile ranges of the timings; sizes."""
        out = _summary("prefill_seconds", self.prefill) | _summary("decode_seconds_per_token", self.decode)
        sizes = ("prompt_tokens", "cached_tokens", "cache_bytes", "memory_peak_bytes")
        return out | {name: getattr(self, name) for name in sizes}


def latency(
    model: PreTrainedModel,
    seq_len: int,
    new_tokens: int,
    prompt: Tensor | None = None,
    *,
    batch: int = 1,
    warmup: int = 2,
    repeats: int = 7,
    progress: Callable[[int, int], None] | None = None,
) -> LatencyResult:
    """Time `repeats` rounds after `warmup` that are thrown away, on the model's device, in its dtype.

    Prefill: `batch` rows of `seq_len` random tokens behind `prompt` (k, d) fill the cache and give the first token.
    Decode: `new_tokens` greedy steps. Raises ValueError if a number is not allowed, the prompt does not fit,
    k + seq_len + new_tokens exceed the context, or the model keeps no cache.
    """
    _check(model, seq_len, new_tokens, prompt, {"batch": batch, "warmup": warmup, "repeats": repeats})
    embedding = model.get_input_embeddings().weight
    ids = tokens(embedding.shape[0], batch, seq_len).to(embedding.device)
    rows = None if prompt is None else prompt.to(embedding.device, embedding.dtype)
    rounds = []
    with frozen(model), torch.inference_mode(), _no_collector(), _peak_memory(embedding.device) as peak:
        for done in range(warmup + repeats):
            rounds.append(_round(model, ids, new_tokens, rows))
            if progress is not None:
                progress(done + 1, warmup + repeats)
        memory, measured = peak()
    prefill, decode, cached, size = zip(*rounds[warmup:], strict=True)
    k = 0 if prompt is None else len(prompt)
    return LatencyResult(prefill, decode, k, cached[0], size[0], memory, measured)


def tokens(vocabulary: int, batch: int, seq_len: int) -> Tensor:
    """The token ids (batch, seq_len) that are read: random, and the same every time."""
    return torch.randint(vocabulary, (batch, seq_len), generator=torch.Generator().manual_seed(SEED))


def _round(model: PreTrainedModel, ids: Tensor, new_tokens: int, rows: Tensor | None) -> tuple[float, float, int, int]:
    """(prefill seconds, decode seconds per step, positions cached, bytes cached) of one pass from an empty cache."""
    last = kept(model, 1)
    gc.collect()  # it does not run by itself while rounds are timed
    _wait()
    begun = time.perf_counter()
    inputs = {"input_ids": ids} if rows is None else {"inputs_embeds": with_prompt(model, ids, rows)}
    output = model(**inputs, use_cache=True, **last)
    token = _most_likely(output, ids)
    _wait()
    read = time.perf_counter()
    if output.get("past_key_values") is None:
        raise ValueError(f"{type(model).__name__} keeps no cache: there is no decoding to time")
    cache = output.past_key_values
    del output  # its logits
    resumed = time.perf_counter()
    for _ in range(new_tokens):
        token = _most_likely(model(input_ids=token, past_key_values=cache, use_cache=True, **last), ids)
    _wait()
    decode = (time.perf_counter() - resumed) / new_tokens
    size = sum(t.numel() * t.element_size() for layer in cache.layers for t in _tensors(vars(layer)))
    return read - begun, decode, cache.get_seq_length(), size


def _tensors(held: Any) -> list[Tensor]:
    """Keys and values, or the states of layers that keep those."""
    if isinstance(held, dict | list | tuple):
        return [t for part in (held.values() if isinstance(held, dict) else held) for t in _tensors(part)]
    return [held] if isinstance(held, Tensor) and held.dim() > 1 else []


def _most_likely(output: Any, ids: Tensor) -> Tensor:
    """The next token (batch, 1), where the tokens are fed."""
    return output.logits[:, -1].argmax(-1, keepdim=True).to(ids.device)


def _wait() -> None:
    """Wait until every GPU of this process is idle."""
    if torch.cuda.is_initialized():
        for index in range(torch.cuda.device_count()):
            torch.cuda.synchronize(index)


@contextmanager
def _no_collector() -> Iterator[None]:
    """No pause by Python's garbage collector inside a timing."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


@contextmanager
def _peak_memory(device: torch.device) -> Iterator[Callable[[], tuple[int, str]]]:
    """Begin a new peak; gives a function for (most bytes since then, what they count)."""
    if device.type == "cuda":
        gpus = range(torch.cuda.device_count())
        for index in gpus:
            torch.cuda.reset_peak_memory_stats(index)
        yield lambda: (
            sum(torch.cuda.max_memory_allocated(index) for index in gpus),
            "tensors that torch held on the GPU at most while timing, weights included; summed over GPUs",
        )
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # not Linux, or not allowed
        yield lambda: (process_peak(), "resident memory of the process at most since it began, Python included")
    else:
        yield lambda: (_resident_peak(), "resident memory of the process at most while timing, Python included")


def _resident_peak() -> int:
    """Bytes of resident memory at most since the last reset, which `process_peak` does not know."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024


def _summary(name: str, seconds: tuple[float, ...]) -> dict[str, float]:
    out = {name: statistics.median(seconds), f"{name}_min": min(seconds), f"{name}_max": max(seconds)}
    if len(seconds) > 1:
        first, _, third = statistics.quantiles(seconds, n=4, method="inclusive")
        out[f"{name}_iqr"] = third - first
    return out


def _check(
    model: PreTrainedModel, seq_len: int, new_tokens: int, prompt: Tensor | None, counts: dict[str, int]
) -> None:
    for name, value in {"seq_len": seq_len, "new_tokens": new_tokens, **counts}.items():
        least = 0 if name == "warmup" else 1
        if value < least:
            raise ValueError(f"{name} = {value}, allowed: {least} and more")
    if prompt is not None:
        check_shape(model, prompt)
        check_readable(model)
    k = 0 if prompt is None else len(prompt)
    sizes = f"{k} prompt rows + {seq_len} tokens + {new_tokens} new ones"
    check_context(model, k + seq_len + new_tokens, sizes)
