"""Whether a loaded model is what its configuration describes, so that its compressed form can be opened again."""

from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import AutoModelForCausalLM

from ctp.models.hf import skeleton


def not_plain(model: Any) -> str:
    """Why a transformers model cannot be compressed as it was loaded, in one sentence; "" where it can."""
    config, name = model.config, type(model).__name__
    if getattr(config, "quantization_config", None) is not None or getattr(model, "hf_quantizer", None) is not None:
        return f"{name} is quantized already: load the model that it was made of"
    if any(isinstance(m, BaseTunerLayer) for m in model.modules()):
        return f"{name} has adapter layers inside: merge or unload them first (merge_and_unload in PEFT)"
    if any(t.is_meta for t in model.parameters()):
        return f"{name} has weights on the meta device, so not in memory: load it whole"
    kind = AutoModelForCausalLM._model_mapping.get(type(config), None)
    if kind is None or not isinstance(model, kind):
        wanted = f"AutoModelForCausalLM gives {kind.__name__}" if kind else "AutoModelForCausalLM does not know it"
        return f"{name} is no causal language model with its head: for model type {config.model_type} {wanted}"
    if odd := sorted(_shapes(model) ^ _shapes(skeleton(config))):
        return f"{name} has other weights than its configuration describes: {odd[0][0]}"
    return ""


def _shapes(model: nn.Module) -> set[tuple[str, tuple[int, ...]]]:
    return {(n, tuple(p.shape)) for n, p in model.named_parameters(remove_duplicate=False)}
