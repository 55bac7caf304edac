"""A soft prompt in front of token windows: logits, and the log-likelihoods that are scored.

Shapes: b windows of s tokens, k prompt rows of d numbers (the width of the *embedding*, which in some OPT models is not
the hidden size), V vocabulary entries. Of a window x_0 .. x_{s-1}, x_0 is not scored and x_{s-1} is not fed.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from ctp.architectures import families
from ctp.architectures.context import context_length
from ctp.architectures.head import head_of
from ctp.machine.memory import ran_out
from ctp.prompts.agreement import alike, body_states, mostly, other_tokens, spread_tokens
from ctp.prompts.prefix import Prefix, kept, serves, with_prompt

# fp32 numbers that one log-softmax may copy: 64 MiB, whatever the vocabulary.
CHUNK = 2**24


def token_logits(model: PreTrainedModel, ids: Tensor, prompt: Tensor | Prefix | None = None) -> Tensor:
    """Logits (b, t, V) at the tokens `ids` (b, t) behind the prompt (k, d), in the model's dtype.

    prompt: its rows, or what `prefix` made of them, which costs less. The head runs at the tokens' positions only, if
    the architecture allows.
    """
    return model(**_inputs(model, ids, prompt), **kept(model, ids.shape[1])).logits[:, -ids.shape[1] :]


def _inputs(model: PreTrainedModel, ids: Tensor, prompt: Tensor | Prefix | None) -> dict[str, Any]:
    """The arguments with which the model, or its body, reads `ids` (b, t) behind the prompt."""
    if prompt is None:
        return {"input_ids": ids, "use_cache": False}
    if isinstance(prompt, Prefix) and serves(model, prompt, ids):
        return {"input_ids": ids, "past_key_values": prompt.cache, "use_cache": True}
    rows = prompt.rows if isinstance(prompt, Prefix) else prompt
    return {"inputs_embeds": with_prompt(model, ids, rows), "use_cache": False}


def scored_logits(model: PreTrainedModel, windows: Tensor, prompt: Tensor | Prefix | None = None) -> Tensor:
    """Logits (b, s - 1, V) that predict x_1 .. x_{s-1} of each window (b, s)."""
    return token_logits(model, windows[:, :-1], prompt)


def summed_nll(logits: Tensor, windows: Tensor) -> Tensor:
    """Sum of -log p (nats) over the logits of `scored_logits`: a float64 scalar on their device.

    Log-softmax in fp32 (or wider, if the logits are), a chunk at a time: no fp32 copy of all the logits is made.
    """
    return _summed(lambda chunk: chunk, logits, windows, logits.shape[-1])


def scored_nll(model: PreTrainedModel, windows: Tensor, prompt: Tensor | Prefix | None = None) -> Tensor:
    """`summed_nll` of the `scored_logits`; if the architecture allows, only a chunk of the logits exists at a time.

    Without gradients: with them every chunk is kept.
    """
    head = head_of(model)
    if head is None:
        return summed_nll(scored_logits(model, windows, prompt), windows)
    return _summed(head, scored_states(model, windows, prompt), windows, head.weight.shape[0])


def scored_states(model: PreTrainedModel, windows: Tensor, prompt: Tensor | Prefix | None = None) -> Tensor:
    """What the body gives (b, s - 1, d) where the head would make the `scored_logits` of it; see `head_of`."""
    ids = windows[:, :-1]
    return model.base_model(**_inputs(model, ids, prompt)).last_hidden_state[:, -ids.shape[1] :]


def _summed(head: Callable[[Tensor], Tensor], states: Tensor, windows: Tensor, vocabulary: int) -> Tensor:
    """Sum of -log p of x_1 .. x_{s-1} over what `head` makes of the states (b, s - 1, any)."""
    flat, targets = states.flatten(0, 1), windows[:, 1:].flatten().to(states.device)
    rows = max(1, CHUNK // vocabulary)
    total = torch.zeros((), dtype=torch.float64, device=flat.device)
    for chunk, target in zip(flat.split(rows), targets.split(rows), strict=True):
        logits = head(chunk)
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        total = total + F.cross_entropy(wide, target, reduction="none").sum(dtype=torch.float64)
    return total


def context_of(model: PreTrainedModel) -> int | None:
    """The model's longest input in tokens; None for BLOOM, to which ALiBi sets no limit."""
    return context_length(model.config)


def check_context(model: PreTrainedModel, total: int, sizes: str) -> None:
    """Raise ValueError if `total` positions, the sum of `sizes`, exceed the model's context."""
    context = context_of(model)
    if context is not None and total > context:
        raise ValueError(f"{sizes} = {total} exceed the model's context of {context}")


def check_shape(model: PreTrainedModel, prompt: Tensor) -> None:
    """Raise ValueError unless the prompt has k > 0 rows as wide as the model's embedding."""
    width = model.get_input_embeddings().embedding_dim
    if prompt.dim() != 2 or len(prompt) == 0 or prompt.shape[1] != width:
        raise ValueError(f"prompt of shape {tuple(prompt.shape)}: must be (k, {width}) for this model, with k > 0")


def check_fit(model: PreTrainedModel, windows: Tensor, k: int, width: int | None = None) -> None:
    """Raise ValueError unless `windows` are token windows (n, s) that the model can read behind k rows of `width`."""
    if windows.dim() != 2 or windows.dtype != torch.long or len(windows) == 0 or windows.shape[1] < 2:
        shape = tuple(windows.shape)
        raise ValueError(f"windows must be a LongTensor (n > 0, s > 1); got {windows.dtype} of shape {shape}")
    embedding = model.get_input_embeddings()
    low, high = int(windows.min()), int(windows.max())
    if low < 0 or high >= embedding.num_embeddings:
        raise ValueError(f"token ids {low}..{high} do not fit a vocabulary of {embedding.num_embeddings}")
    if width is not None and width != embedding.embedding_dim:
        raise ValueError(f"prompt rows of {width} numbers do not fit embeddings of {embedding.embedding_dim}")
    if k:
        families.check(model.config, "prompt")
        pad = getattr(model.config.get_text_config(), "pad_token_id", None)
        if pad is not None and bool((windows == pad).any()) and families.counts_padding(model.config):
            raise ValueError(
                f"windows hold the padding token {pad}, by which model type {model.config.model_type} counts "
                "positions: behind a prompt it cannot"
            )
    s = windows.shape[1]
    check_context(model, k + s, f"{k} prompt rows + windows of {s} tokens")


_readable: WeakKeyDictionary[PreTrainedModel, str] = WeakKeyDictionary()  # the reason why not, or ""


def check_readable(model: PreTrainedModel) -> None:
    """Raise ValueError if rows in front of the text cannot mean what tokens there would.

    By its configuration, or by a trial once a model: it must read the embeddings of tokens as it reads the tokens, and
    no token may change what was read before it.
    """
    families.check(model.config, "prompt")
    if model not in _readable:
        with frozen(model), torch.no_grad():
            _readable[model] = _unreadable(model)
    if why := _readable[model]:
        raise ValueError(f"{type(model).__name__} cannot read rows in front of the text: {why}")


def _unreadable(model: PreTrainedModel) -> str:
    embedding, ids = model.get_input_embeddings(), spread_tokens(model)
    changed = torch.cat([ids[:, :-1], other_tokens(model, ids[:, -1:])], dim=1)
    read = body_states(model, input_ids=ids, use_cache=False)
    if not bool(torch.isfinite(read).all()):
        return ""  # reported where the loss is summed
    try:
        embedded = body_states(model, inputs_embeds=embedding(ids), use_cache=False)
    except Exception as e:  # whatever a model raises that looks for token ids and finds none
        if ran_out(e):
            raise
        return f"without token ids it raises {type(e).__name__}: {' '.join(str(e).split())}"
    if not alike(model, embedded, read):
        return "it makes more of token ids than their embeddings"
    later = body_states(model, input_ids=changed, use_cache=False)
    return "" if mostly(model, later[:, :-1], read[:, :-1]) else "what it reads depends on tokens that come later"


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode (no dropout) and no gradient of any parameter; each flag is restored on the way out."""
    modes = [(m, m.training) for m in model.modules()]
    flags = [(p, p.requires_grad) for p in model.parameters()]
    try:
        model.eval()
        for p, _ in flags:
            p.requires_grad_(False)
        yield
    finally:
        for m, training in modes:
            m.training = training
        for p, flag in flags:
            p.requires_grad_(flag)
