"""Token windows cut from documents, specified to the token."""

import hashlib
import itertools
import json
import logging
import math
import random
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeAlias

from ctp.cells.inputs import Windows
from ctp.data.texts import find

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

Tokenizer: TypeAlias = "PreTrainedTokenizerBase"
log = logging.getLogger(__name__)

_MARGIN = 1024  # tokens read beyond the windows: what follows cannot change them, as tokenizers decide word by word


def cut_windows(spec: Windows, documents: Sequence[str], tokenizer: Tokenizer) -> "torch.LongTensor":
    """The token ids of `spec`: int64 (n, seq_len), with special tokens as `Windows.bos` says.

    Sequential windows are those of all documents joined and tokenised at once (with `count`, of as many as it takes).
    Crops: a document is drawn, with replacement, from those longer than seq_len, then one of its windows, uniformly.

    Raises ValueError if there are fewer windows than `count`, or none, no document longer than a crop, or no BOS to put
    in front of each.
    """
    import torch

    if spec.bos == "each" and tokenizer.bos_token_id is None:
        raise ValueError(f"{_title(spec)}: bos = 'each': the tokenizer has no beginning-of-text token")
    front = [tokenizer.bos_token_id] if spec.bos == "each" else []

    documents = documents[spec.skip :]
    if spec.documents is not None:
        if len(documents) < spec.documents:
            log.warning("%s has %d documents after %d, not %d", _title(spec), len(documents), spec.skip, spec.documents)
        documents = documents[: spec.documents]
    cut = _crops if spec.sampling == "crops" else _sequential
    return torch.LongTensor([front + ids for ids in cut(spec, documents, tokenizer, spec.seq_len - len(front))])


def _title(spec: Windows) -> str:
    return f"{spec.dataset}/{spec.split}"


def _tokens(spec: Windows, tokenizer: Tokenizer, text: str) -> list[int]:
    # verbose=False: a text longer than the model's context is no mistake here
    special = spec.bos == "first"
    return list(tokenizer(text, add_special_tokens=special, return_attention_mask=False, verbose=False)["input_ids"])


def _sequential(spec: Windows, documents: Sequence[str], tokenizer: Tokenizer, size: int) -> list[list[int]]:
    """Pieces of `size` tokens, one after the other."""
    join = spec.join if spec.join is not None else find(spec.dataset).join
    wanted = math.inf if spec.count is None else spec.count * size + _MARGIN
    lengths = itertools.accumulate(map(len, documents))
    used = next((n for n, length in enumerate(lengths, 1) if length >= 5 * wanted), len(documents))
    ids = _tokens(spec, tokenizer, join.join(documents[:used]))
    while used < len(documents) and len(ids) < wanted:
        used *= 2
        ids = _tokens(spec, tokenizer, join.join(documents[:used]))
    n = len(ids) // size
    if n < (spec.count or 1):
        needed = "" if spec.count is None else f"; {spec.count} are asked for"
        raise ValueError(f"{_title(spec)} has {len(ids)} tokens, {n} windows of {spec.seq_len}{needed}")
    return [ids[i * size : (i + 1) * size] for i in range(spec.count or n)]


def _crops(spec: Windows, documents: Sequence[str], tokenizer: Tokenizer, size: int) -> list[list[int]]:
    """Pieces of `size` tokens out of longer documents."""
    assert spec.count is not None
    draw = random.Random(spec.seed)
    candidates = list(range(len(documents)))  # those not yet known to be short
    crops: list[list[int]] = []
    while len(crops) < spec.count:
        if not candidates:
            raise ValueError(f"{_title(spec)} has no document of more than {size} tokens to crop")
        at = draw.randrange(len(candidates))
        ids = _tokens(spec, tokenizer, documents[candidates[at]])
        if len(ids) <= size:
            candidates[at] = candidates[-1]
            candidates.pop()
            continue
        start = draw.randrange(len(ids) - size + 1)
        crops.append(ids[start : start + size])
    return crops


def text_stats(windows: "torch.Tensor", tokenizer: Tokenizer, sha256: str | None = None) -> dict[str, Any]:
    """What a perplexity depends on besides the model: tokenizer_sha256, tokens (count), unk (count).

    sha256: the tokenizer's, if known. unk is 0 if the unknown token has the id of another special token.
    """
    unk = tokenizer.unk_token_id
    is_known = unk is not None and unk not in (tokenizer.bos_token_id, tokenizer.eos_token_id)
    return {
        "tokenizer_sha256": sha256 or tokenizer_sha256(tokenizer),
        "tokens": windows.numel(),
        "unk": int((windows == unk).sum()) if is_known else 0,
    }


def tokenizer_sha256(tokenizer: Tokenizer) -> str:
    """Hex digest of how a tokenizer cuts text: its serialised backend, else its vocabulary."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return _state_sha256(json.dumps({"vocab": tokenizer.get_vocab()}) if backend is None else backend.to_str())


@lru_cache(maxsize=1)  # all targets of a model have one tokenizer, whose state is megabytes of JSON
def _state_sha256(serialised: str) -> str:
    state: dict[str, Any] = json.loads(serialised)
    for name in ("truncation", "padding"):  # left there by the last call of the tokenizer
        state.pop(name, None)
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
