"""The query and value projections of a model, on which LoRA is learned."""

from typing import Any

from torch import nn

from ctp import families
from ctp.compression.blocks import decoder_blocks

QUERY, VALUE = "q_proj", "v_proj"
FUSED = {"bloom": "query_key_value"}  # model_type: a matrix whose rows are (heads, [query, key, value], head size)


def unfit(model: Any) -> str:
    """Why LoRA cannot be learned through a model, "" where it can; known from its modules, the model may be without
    weights.
    """
    if why := families.refusals(model.config).get("lora"):
        return why
    try:
        for i in range(len(decoder_blocks(model)[1])):
            projections(model, i)
    except ValueError as e:
        return f"model type {model.config.model_type}: {e}"
    return ""


def projections(model: Any, i: int) -> list[str]:
    """Names of the query and value projections in block i, or of the fused one. Raises ValueError where it has none."""
    place, blocks = decoder_blocks(model)
    fused = FUSED.get(model.config.model_type)
    linears = [n for n, m in blocks[i].named_modules() if isinstance(m, nn.Linear)]
    wanted = {fused} if fused else {QUERY, VALUE}
    found = [n for n in linears if n.split(".")[-1] in wanted]
    if {n.split(".")[-1] for n in found} != wanted:
        raise ValueError(
            f"LoRA is learned on {QUERY} and {VALUE} of every block, or BLOOM's {FUSED['bloom']}; the linears of "
            f"{place}.{i} are {', '.join(linears) or 'none'}"
        )
    return [f"{place}.{i}.{n}" for n in found]


def outside(model: Any) -> bool:
    """Are there linears of these names outside the decoder blocks, as in a tower for images?"""
    place = decoder_blocks(model)[0]
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and not n.startswith(f"{place}.")]
    return any(n.split(".")[-1] in (QUERY, VALUE) for n in names)
