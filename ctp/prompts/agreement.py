"""Whether two ways to compute the same thing agree on a model, up to the rounding of its arithmetic."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

# Largest difference between two computations of the same hidden states:
TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}  # relative to the largest state
UNSEEN = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}  # to its own position, in the same arithmetic
ROUNDED = {torch.float32: 1e-3, torch.float16: 1e-1, torch.bfloat16: 2e-1}  # to its own, with tensors of other shapes


def alike(model: PreTrainedModel, found: Tensor, wanted: Tensor) -> bool:
    """Are these hidden states or logits the same, as the model computes them here?"""
    return float((found - wanted).abs().max()) <= TOLERANCE[computed(model)] * float(wanted.abs().max())


def unmoved(model: PreTrainedModel, found: Tensor, wanted: Tensor) -> bool:
    """Are these hidden states (..., d) the same at every position, though something else changed?"""
    found, wanted = found.float(), wanted.float()
    return bool(((found - wanted).norm(dim=-1) <= UNSEEN[computed(model)] * wanted.norm(dim=-1)).all())


def mostly(model: PreTrainedModel, found: Tensor, wanted: Tensor) -> bool:
    """Are these hidden states the same, but for single positions in half precision, where an expert may be another?"""
    found, wanted = found.float(), wanted.float()
    same = (found - wanted).norm(dim=-1) <= ROUNDED[computed(model)] * wanted.norm(dim=-1)
    return bool(same.all()) if computed(model) == torch.float32 else 2 * int(same.sum()) >= same.numel()


def computed(model: PreTrainedModel) -> torch.dtype:
    """The dtype of the model's arithmetic: autocast's if that is on."""
    device = model.get_input_embeddings().weight.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else model.dtype
    return dtype if dtype in TOLERANCE else torch.float32


def other_tokens(model: PreTrainedModel, ids: Tensor, shift: int = 1) -> Tensor:
    """Tokens of the shape of `ids`, each another one than there; so are those of shift 1 and 2."""
    size = model.get_input_embeddings().num_embeddings
    return (ids + max(1, size // 3) * shift) % size


def spread_tokens(model: PreTrainedModel) -> Tensor:
    """Six tokens (1, 6) of the whole vocabulary, without the first: that is often padding, whose embedding is 0."""
    embedding = model.get_input_embeddings()
    return torch.linspace(0, embedding.num_embeddings - 1, 7, device=embedding.weight.device).long()[None, 1:]


def body_states(model: PreTrainedModel, **inputs: Any) -> Tensor:
    """The hidden states (b, n, d) before the head; logits of a model without a body."""
    return read(model, **inputs)[0]


def read(model: PreTrainedModel, **inputs: Any) -> Any:
    """The output of the body, or of a whole model without one; a prompt attached to the model does not count."""
    body = model.base_model
    return type(model).forward(model, **inputs) if body is model else body(**inputs)
