"""What ctp refuses for a kind of model, known from its configuration before any weights are read.

Each entry of `_RULES` is one use of a model and a function that gives the reason, "" where the use works. A rule looks
at what the configuration says (a field, a layer type) wherever that decides, so that it covers models that do not
exist yet; it goes by the name of the model type where nothing else tells.
"""

from collections.abc import Callable
from typing import Any, Literal, get_args

# compress: GPTQ, SparseGPT. prompt: rows in front of the text, learned or given. lora: learning LoRA layers.
# generate: decoding behind rows in front.
Use = Literal["compress", "prompt", "lora", "generate"]

_RULES: list[tuple[Use, Callable[[Any], str]]] = []


def refusals(config: Any) -> dict[str, str]:
    """use -> why a model with this transformers configuration is refused for it, for the uses that are refused.

    The text names the model type and the reason in one sentence, without a full stop.
    """
    text = config.get_text_config()
    found: dict[str, str] = {}
    for use, reason in _RULES:
        if why := reason(text):
            found.setdefault(use, f"model type {text.model_type}: {why}")
    return found


def needs_bos(config: Any) -> bool:
    """Does every window that the model reads have to begin with the beginning-of-text token?

    All Gemma models were trained so; without it their perplexity is hundreds of times higher. Nothing in a
    configuration but its name says so.
    """
    return "gemma" in config.get_text_config().model_type


def check(config: Any, use: Use) -> None:
    """Raises ValueError with the reason if the use is refused."""
    assert use in get_args(Use)
    if why := refusals(config).get(use):
        raise ValueError(why)
