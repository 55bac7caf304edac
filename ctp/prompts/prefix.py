"""A soft prompt's keys and values, computed once and read by every window that stands behind it.

In a causal model they depend on the k prompt rows alone: a batch of b windows of t tokens then costs b t positions
instead of b (k + t). With gradients on, the prompt's gradient comes back through the one pass over its rows.
"""

import inspect
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ctp.architectures.context import context_length
from ctp.machine.memory import ran_out
from ctp.prompts.agreement import alike, body_states

CACHE = ("inputs_embeds", "past_key_values", "use_cache")
FAILED = -1
# model -> k -> the longest windows, in tokens, that the cache of k rows was tried with; or FAILED.
_tried: WeakKeyDictionary[PreTrainedModel, dict[int, int]] = WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class Prefix:
    """A prompt as one model reads it, made by `prefix` for that model only.

    rows: the prompt (k, d). cache: `past_key_values` for a forward pass of any batch, which does not change it
    (LLaMA-7B, k = 100, float16: 52 MB). Without one, or if `serves` says no, the rows stand in front of every window.
    """

    rows: Tensor
    cache: DynamicCache | None

    def __len__(self) -> int:
        return len(self.rows)


def prefix(model: PreTrainedModel, prompt: Tensor, tokens: int = 0) -> Prefix:
    """Run the prompt (k, d) through the model, with its head at one row only, on the embedding's device.

    Differentiable in the prompt. tokens: of the windows behind it, if known: nothing is run for a cache that will not
    serve them.
    """
    if stretched(model.config, len(prompt) + tokens) or _tried.get(model, {}).get(len(prompt)) == FAILED:
        return Prefix(prompt, None)
    embedding = model.get_input_embeddings().weight
    rows = prompt.to(embedding.device, embedding.dtype, copy=True)  # some models scale what they are given in place
    if not set(CACHE) <= inspect.signature(model.forward).parameters.keys():
        return Prefix(prompt, None)
    try:
        past = model(inputs_embeds=rows[None], use_cache=True, **kept(model, 1)).get("past_key_values")
    except Exception as e:  # the model cannot use the cache that it is given or makes
        if ran_out(e):
            raise
        past = None
    layers = [_fixed(layer) for layer in past.layers] if isinstance(past, DynamicCache) else []
    if not layers or any(layer is None or layer.get_seq_length() != len(rows) for layer in layers):
        _tried.setdefault(model, {})[len(rows)] = FAILED
        return Prefix(prompt, None)
    cache = DynamicCache()
    cache.layers = layers
    return Prefix(prompt, cache)


def serves(model: PreTrainedModel, made: Prefix, ids: Tensor) -> bool:
    """Do the tokens `ids` (b, t) behind the prefix's cache read as behind its rows?

    Tried with two rows of `ids`, and again if they are longer than before: a cache may keep less than attention sees.
    """
    k, t = len(made), ids.shape[1]
    if made.cache is None or stretched(model.config, k + t):
        return False
    tried = _tried.setdefault(model, {})
    if tried.get(k) != FAILED and tried.get(k, 0) < t:
        tried[k] = t if _reads_alike(model, made, ids[:2]) else FAILED
    return tried[k] != FAILED


def _reads_alike(model: PreTrainedModel, made: Prefix, ids: Tensor) -> bool:
    try:
        with torch.no_grad():
            found = body_states(model, input_ids=ids, past_key_values=made.cache, use_cache=True)
            rows = [with_prompt(model, w, made.rows) for w in ids.split(1)]  # both at once might take too much memory
            wanted = torch.cat([body_states(model, inputs_embeds=r, use_cache=False) for r in rows])
    except Exception as e:  # a cache that the model does not go on from
        if ran_out(e):
            raise
        return False
    return alike(model, found, wanted[:, -ids.shape[1] :])


def stretched(config: Any, tokens: int) -> bool:
    """Are positions in an input of so many tokens rotated by other angles than in a short one (longrope, dynamic)?"""
    text = config.get_text_config()
    given = getattr(text, "rope_parameters", None) or {}
    for part in (given, *given.values()):  # of all layers, or by the kind of layer
        kind = part.get("rope_type") if isinstance(part, dict) else None
        if kind is not None and (kind == "longrope" or "dynamic" in kind):
            name = "original_max_position_embeddings"
            original = part.get(name) or getattr(text, name, None) or context_length(text) or 0
            if tokens > original:
                return True
    return False


def with_prompt(model: PreTrainedModel, ids: Tensor, prompt: Tensor) -> Tensor:
    """Embeddings (b, k + t, d) of the prompt (k, d) followed by the tokens `ids` (b, t), in the embedding's dtype."""
    tokens = model.get_input_embeddings()(ids)
    rows = prompt.to(tokens.device, tokens.dtype)
    with torch.autocast(tokens.device.type, enabled=False):  # on a CPU it cannot join rows of float16
        return torch.cat([rows.expand(len(ids), -1, -1), tokens], dim=1)


def kept(model: PreTrainedModel, positions: int) -> dict[str, int]:
    """The argument by which the head runs at the last `positions` only, if the architecture has one."""
    return {"logits_to_keep": positions} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}


class _Full(DynamicLayer):
    """Keys and values (1, heads, k, width) that stand in front of those of each pass, and do not grow by them."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return _in_front(self.keys, key_states), _in_front(self.values, value_states)


class _Sliding(DynamicSlidingWindowLayer):
    """The same for a layer that sees `sliding_window` positions: of the k rows it has the last ones."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return _in_front(self.keys, key_states), _in_front(self.values, value_states)


_FIXED: dict[type, type] = {DynamicLayer: _Full, DynamicSlidingWindowLayer: _Sliding}


def _fixed(layer: Any) -> Any:
    """The filled layer of a cache as one that does not grow; None for layers that keep something else as well."""
    if type(layer) not in _FIXED or not layer.is_initialized:
        return None
    fixed: Any = object.__new__(_FIXED[type(layer)])
    fixed.__dict__.update(layer.__dict__)
    return fixed


def _in_front(past: Tensor, states: Tensor) -> Tensor:
    return torch.cat([past.expand(len(states), -1, -1, -1), states], dim=-2)
