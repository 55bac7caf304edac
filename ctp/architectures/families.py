"""What ctp refuses for a model type, known from the configuration before any weights are read.

`_RULES` has for each use of a model functions that give the reason against it, "" where there is none. A rule looks at
fields and layer types wherever these decide, so that it covers models that do not exist yet, and else at the name of
the model type.
"""

import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

# compress: GPTQ, SparseGPT. prompt: rows in front of the text, learned or given. lora: learning LoRA layers.
# generate: decoding behind rows in front.
Use = Literal["compress", "prompt", "lora", "generate"]

# Model types whose attention reads both directions, or draws random numbers, though nothing in their configuration or
# their class says so.
NOT_LEFT_TO_RIGHT = {"cpmant": "it reads both directions", "xlnet": "it reads both directions",
                     "reformer": "its attention draws random numbers in every pass"}  # fmt: skip
# Arguments of `forward` that an attached prompt needs.
ATTACHED = ("input_ids", "inputs_embeds", "attention_mask", "past_key_values", "logits_to_keep")

# LoRA is learned on these, or on one matrix for them, whose rows are (heads, [query, key, value], head size).
QUERY, VALUE = "q_proj", "v_proj"
FUSED = {"bloom": "query_key_value"}


def _not_causal(config: Any) -> str:
    """Halves of an encoder and decoder, and encoders, are causal only where their configuration says decoder."""
    halves = "encoder_hidden_states" in _arguments(config) and getattr(config, "is_decoder", None) is False
    if halves or getattr(config, "causal", True) is False:
        return "it is no decoder that reads text from left to right: is_decoder, or causal, is false"
    if (both := getattr(config, "use_bidirectional_attention", None)) in (True, "all"):  # "vision": images alone
        return f"it is no decoder that reads text from left to right: use_bidirectional_attention is {both!r}"
    return NOT_LEFT_TO_RIGHT.get(config.model_type, "")


def _needs_ids(config: Any) -> str:
    """Rows in front have no token ids."""
    if getattr(config, "hidden_size_per_layer_input", None):
        return "hidden_size_per_layer_input: every layer reads embeddings of the token ids, which rows in front lack"
    if "hash_moe" in (getattr(config, "mlp_layer_types", None) or ()):
        return "mlp_layer_types: experts are chosen by token ids, which rows in front lack"
    arguments = _arguments(config)
    if "shared_kv_states" in arguments:
        return "it reads the keys and values of another model"
    return "" if not arguments or "inputs_embeds" in arguments else "its forward takes token ids only, no embeddings"


def _no_decoding(config: Any) -> str:
    """An attached prompt sees by the length of a DynamicCache whether the model decodes or reads the first tokens."""
    arguments = _arguments(config)
    if lacking := [n for n in ATTACHED if arguments and n not in arguments]:
        return f"its forward lacks {', '.join(lacking)}, which decoding behind a prompt needs"
    from transformers import cache_utils as cache

    try:
        layers = cache.DynamicCache(config=config).layers
    except Exception:  # of a configuration that no such cache is made for
        return "it decodes with a cache of its own, which an attached prompt does not know"
    states = any(isinstance(layer, cache.LinearAttentionCacheLayerMixin) for layer in layers)
    if getattr(_class(config), "_is_stateful", False) and not states:
        return "its decoding state lies outside the cache, where an attached prompt cannot see it"
    if layers and not any(isinstance(layer, cache.CacheLayerMixin) for layer in layers):
        return "no layer of its cache counts tokens, which decoding behind a prompt needs"
    kinds = {type(layer) for layer in layers if not isinstance(layer, cache.LinearAttentionCacheLayerMixin)}
    if odd := kinds - {cache.DynamicLayer, cache.DynamicSlidingWindowLayer}:
        names = ", ".join(sorted(kind.__name__ for kind in odd))
        return f"an attached prompt does not know what its cache keeps ({names})"
    return ""


_RULES: dict[Use, tuple[Callable[[Any], str], ...]] = {
    "prompt": (_not_causal, _needs_ids),
    "lora": (_not_causal,),
    "generate": (_not_causal, _needs_ids, _no_decoding),
}


def _class(config: Any) -> Any:
    """The causal language model of a configuration, None where transformers has none."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return None
    found = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    return found[0] if isinstance(found, tuple) else found


def _arguments(config: Any) -> Mapping[str, Any]:
    """What the model's forward takes, empty where the model is not known."""
    found = _class(config)
    return {} if found is None else inspect.signature(found.forward).parameters


def refusals(config: Any) -> dict[str, str]:
    """use -> why a model with this transformers configuration is refused for it, for the uses that are refused.

    The text names the model type and the reason in one sentence, without a full stop.
    """
    text = config.get_text_config()
    reasons = {use: next(filter(None, (rule(text) for rule in rules)), "") for use, rules in _RULES.items()}
    return {use: f"model type {text.model_type}: {why}" for use, why in reasons.items() if why}


def needs_bos(config: Any) -> bool:
    """Does every window that the model reads have to begin with the beginning-of-text token?

    All Gemma models were trained so; without it their perplexity is hundreds of times higher. Nothing in a
    configuration but its name says so.
    """
    return "gemma" in config.get_text_config().model_type


def counts_padding(config: Any) -> bool:
    """Does the model make positions of its token ids, leaving padding out, as RoBERTa's kind does? Rows have no ids."""
    found = _class(config)
    module = vars(sys.modules[found.__module__]) if found is not None else {}
    return any(isinstance(m, type) and hasattr(m, "create_position_ids_from_input_ids") for m in module.values())


def no_projections(config: Any, blocks: Any, layers: int | None = None) -> str:
    """Why LoRA is refused for a model with this list of decoder blocks (without weights as well), "" where it is not.

    layers: how many of the last blocks it is learned on, None for all.
    """
    text = config.get_text_config()
    wanted = {FUSED[text.model_type]} if text.model_type in FUSED else {QUERY, VALUE}
    for i in range(len(blocks) - (layers or len(blocks)), len(blocks)):
        # A module made of others is no linear, whatever its name.
        if not wanted <= {n.split(".")[-1] for n, m in blocks[i].named_modules() if not list(m.children())}:
            return (f"model type {text.model_type}: LoRA is learned on {QUERY} and {VALUE}, or BLOOM's "
                    f"{FUSED['bloom']}, and block {i} has no such projections")  # fmt: skip
    return ""


def check(config: Any, use: Use) -> None:
    """Raises ValueError with the reason if the use is refused."""
    assert use in get_args(Use)
    if why := refusals(config).get(use):
        raise ValueError(why)
