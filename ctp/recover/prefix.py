"""A soft prompt's keys and values, computed once and read by every window that stands behind it.

In a causal model they depend on the k prompt rows alone: a batch of b windows of t tokens then costs b t positions
instead of b (k + t), and windows, batches and texts share them. Where gradients are on, so do they: the prompt's
gradient comes back through the one pass over its rows.
"""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

CACHE = ("inputs_embeds", "past_key_values", "use_cache")


@dataclass(frozen=True, eq=False)
class Prefix:
    """A prompt as one model reads it, made by `prefix`, of use to that model only.

    rows: the prompt (k, d). cache: `past_key_values` of a forward pass of any batch, which leaves it as it is; it holds
    2 numbers per layer, row and key width (LLaMA-7B, k = 100, float16: 52 MB). None where the model keeps its past in
    another form: the rows then stand in front of every window.
    """

    rows: Tensor
    cache: DynamicCache | None

    def __len__(self) -> int:
        return len(self.rows)


def prefix(model: PreTrainedModel, prompt: Tensor) -> Prefix:
    """Run the prompt (k, d) through the model, without its head but for one row, where and as the embedding lies.

    Differentiable in the prompt; under `no_grad` it holds no graph.
    """
    embedding = model.get_input_embeddings().weight
    rows = prompt.to(embedding.device, embedding.dtype)
    if not set(CACHE) <= inspect.signature(model.forward).parameters.keys():
        return Prefix(prompt, None)
    past = model(inputs_embeds=rows[None], use_cache=True, **kept(model, 1)).get("past_key_values")
    layers = [_fixed(layer) for layer in past.layers] if isinstance(past, DynamicCache) else []
    if not layers or any(layer is None or layer.get_seq_length() != len(rows) for layer in layers):
        return Prefix(prompt, None)
    cache = DynamicCache()
    cache.layers = layers
    return Prefix(prompt, cache)


def kept(model: PreTrainedModel, positions: int) -> dict[str, int]:
    """The argument by which the head runs at the last `positions` only, where the architecture has one."""
    return {"logits_to_keep": positions} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}


class _Full(DynamicLayer):
    """Keys and values (1, heads, k, width) that stand in front of what each pass brings, and keep none of it.

    A growing layer would hold every layer's keys and values of the whole batch until the pass ends.
    """

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return _in_front(self.keys, key_states), _in_front(self.values, value_states)


class _Sliding(DynamicSlidingWindowLayer):
    """The same for a layer that sees `sliding_window` positions: of the k rows it has the last ones."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return _in_front(self.keys, key_states), _in_front(self.values, value_states)


_FIXED: dict[type, type] = {DynamicLayer: _Full, DynamicSlidingWindowLayer: _Sliding}


def _fixed(layer: Any) -> Any:
    """The filled layer of a cache as one that stays as it is; None for layers that keep something else as well."""
    if type(layer) not in _FIXED or not layer.is_initialized:
        return None
    fixed: Any = object.__new__(_FIXED[type(layer)])
    fixed.__dict__.update(layer.__dict__)
    return fixed


def _in_front(past: Tensor, states: Tensor) -> Tensor:
    return torch.cat([past.expand(len(states), -1, -1, -1), states], dim=-2)
