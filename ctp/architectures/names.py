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
    found = _original(model, [f"{name}.weight" for name in linears])
    return {here.removesuffix(".weight"): name.removesuffix(".weight") for name, here in found.items()}


def names_here(model: Any) -> dict[str, str]:
    """name in original checkpoints -> name in the model, of parameters and of the modules whose weights they are."""
    out = _original(model, [n for n, _ in model.named_parameters(remove_duplicate=False)])
    weights = [(n, here) for n, here in out.items() if n.endswith(".weight") and here.endswith(".weight")]
    return out | {n.removesuffix(".weight"): here.removesuffix(".weight") for n, here in weights}


def _original(model: Any, names: list[str]) -> dict[str, str]:
    """name in original checkpoints -> name in the model: found by converting tensors that hold the names' numbers."""
    found = as_original(model, {name: torch.tensor(i) for i, name in enumerate(names)}, only_names=True)
    return {name: names[int(i)] for name, i in found.items()}
