"""The longest input of a model, by its configuration."""

from typing import Any

# As configurations call it, where `attribute_map` has no max_position_embeddings for it.
NAMES = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "context_length", "seq_length",
         "max_sequence_length", "max_target_positions")  # fmt: skip


def context_length(config: Any) -> int | None:
    """Tokens of the longest input of a transformers configuration; None where nothing sets a limit (ALiBi, states).

    Only fields that the configuration's class knows count: a file may hold others, which its model does not read.
    """
    text = config.get_text_config()
    if getattr(text, "alibi", False) is True:
        return None
    known = {*getattr(type(text), "__dataclass_fields__", {}), *type(text).attribute_map}
    for name in NAMES:
        value = getattr(text, name, None) if name in known else None
        if isinstance(value, int) and value > 0:
            return value
    return None
