"""Names of tensors in a model's original checkpoints, which other tools look for, where transformers has others."""

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, WeightRenaming, revert_weight_conversion


def as_original(model: Any, state: dict[str, Tensor], only_names: bool = False) -> dict[str, Tensor]:
    """Tensors by their names in a model of transformers as its original checkpoints hold them.

    only_names: where such checkpoints hold parts of one tensor, or several as one, they stay as they are. Parts have
    memory of their own: files cannot hold tensors that share theirs.
    """
    known = [c for c in get_model_conversion_mapping(model, add_legacy=False) if not isinstance(c, PrefixChange)]
    known = [c for c in known if isinstance(c, WeightRenaming) or not only_names]
    if not known:
        return state
    about = SimpleNamespace(_weight_conversions=known, config=model.config)
    changed: dict[str, Tensor] = revert_weight_conversion(about, state)
    return {n: t if t.nbytes == t.untyped_storage().nbytes() else t.clone() for n, t in changed.items()}


def original_names(model: Any, linears: Iterable[str]) -> dict[str, str]:
    """module name -> its name in original checkpoints, for linears that are the same there."""
    numbers = dict(enumerate(linears))
    found = as_original(model, {f"{n}.weight": torch.tensor(i) for i, n in numbers.items()}, only_names=True)
    return {numbers[int(i)]: n.removesuffix(".weight") for n, i in found.items()}


def names_here(model: Any) -> dict[str, str]:
    """name in original checkpoints -> name in the model, of parameters and of the modules whose weights they are."""
    numbers = dict(enumerate(n for n, _ in model.named_parameters(remove_duplicate=False)))
    found = as_original(model, {n: torch.tensor(i) for i, n in numbers.items()}, only_names=True)
    out = {n: numbers[int(i)] for n, i in found.items()}
    weights = [(n, here) for n, here in out.items() if n.endswith(".weight") and here.endswith(".weight")]
    return out | {n.removesuffix(".weight"): here.removesuffix(".weight") for n, here in weights}
