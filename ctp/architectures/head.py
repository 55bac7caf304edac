"""The head of a model apart from its body, so that not all logits need exist at once."""

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import PreTrainedModel

_plain: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def head_of(model: PreTrainedModel) -> Any:
    """The module that makes the logits of the body's last hidden states, None where more happens to either.

    Found by trying, once a model: some tokens through model, body and head must give the same logits to the bit, and
    not all 0, which no scaling or capping leaves them. A model that is called in another way than its class says (with
    a prompt attached, spread over GPUs) is not taken apart.
    """
    if "forward" in vars(model) or model._forward_hooks or model._forward_pre_hooks:
        return None
    if model not in _plain:
        _plain[model] = _is_plain(model)
    return model.get_output_embeddings() if _plain[model] else None


def _is_plain(model: PreTrainedModel) -> bool:
    head, body = model.get_output_embeddings(), model.base_model
    if head is None or body is model:
        return False
    embedding = model.get_input_embeddings()
    # Spread over the vocabulary: the first is often padding, whose states and logits are 0 whatever is done to them.
    ids = torch.linspace(0, embedding.num_embeddings - 1, 5, device=embedding.weight.device).long()[None]
    with torch.no_grad():
        states = body(input_ids=ids, use_cache=False).get("last_hidden_state")
        logits = model(input_ids=ids, use_cache=False).logits
        if states is None or states.shape[-1] != head.weight.shape[-1]:
            return False
        return bool(logits.any()) and torch.equal(head(states), logits)
