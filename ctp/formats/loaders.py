"""Which compressed models other tools' loaders open, known from a model's modules alone."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import nn

from ctp.architectures.blocks import decoder_blocks
from ctp.architectures.chain import foreseen
from ctp.architectures.experts import Matrix, matrices
from ctp.architectures.linears import linears, matrix
from ctp.architectures.names import as_original
from ctp.formats import gptq
from ctp.models.hf import skeleton


def refusals(config: Any) -> dict[str, str]:
    """format -> the sentence with which `export` refuses a model of this transformers configuration in 4 bits."""
    bare = skeleton(config).eval()
    prefix, blocks = decoder_blocks(bare)
    idle = foreseen(bare)[1]
    experts = {m.name: m for m in matrices(bare).values()}
    shapes = {n: matrix(m).shape for n, m in linears(blocks, prefix).items() if n not in idle}
    shapes |= {n: m.of(bare.get_parameter(m.parameter)).shape for n, m in experts.items()}
    found = {f: refusal(f, bare, shapes, experts, 4) for f in ("compressed-tensors", "gptq")}
    return {f: why for f, why in found.items() if why}


def refusal(
    format: str, bare: Any, shapes: Mapping[str, Sequence[int]], experts: Mapping[str, Matrix], bits: int
) -> str:
    """One sentence where loaders of a format would not open a model with these weights packed; "" where they would.

    bare: the model without weights. shapes: (outputs, inputs) of the packed linears, and of those in `experts`.
    """
    why = _unopened(format, bare, shapes, experts) or (gptq.unaligned(shapes, bits) if format == "gptq" else "")
    return why and f"{format}: model type {bare.config.get_text_config().model_type}: {why}: export hf"


def _unopened(format: str, bare: Any, names: Collection[str], experts: Mapping[str, Matrix]) -> str:
    """Why transformers would not open packed forms of these weights instead of those of `bare`; "" if it would."""
    inside, blocks = decoder_blocks(bare)
    plain = sorted(linears(blocks, inside).keys() - set(names))
    if plain and format == "gptq":
        return f"{plain[0]} is not quantized, which loaders expect of all linears of a decoder block"
    packed: list[nn.Linear] = []
    for name in sorted(names):
        if name not in experts:
            module = bare.get_submodule(name)
            if not name.startswith(f"{inside}.") or type(module) is not nn.Linear:
                return f"{name} is no nn.Linear of a decoder block, which loaders expect"
            packed.append(module)
        elif not experts[name].original:
            return f"its checkpoints hold no linear for each expert, which loaders look for ({name})"
    if experts and (odd := _merged(bare, {f"{n}.weight" for n in names})):
        return f"its checkpoints hold {odd} in another form, which loaders of quantized models do not convert"
    if _opens(bare, packed):
        return ""
    return f"{type(bare).__name__} initialises linears by a weight, which packed ones do not have"


def _merged(bare: Any, packed: Collection[str]) -> str:
    """A parameter beside experts and packed linears that original checkpoints hold in parts, or with others as one."""
    inside = {m.parameter for m in matrices(bare).values()}
    rest = {n: p.detach() for n, p in bare.named_parameters() if n not in inside and n not in packed}
    differing = as_original(bare, rest).keys() - as_original(bare, rest, only_names=True).keys()
    return min(differing, default="")


def _opens(bare: Any, packed: Sequence[nn.Linear]) -> bool:
    """Can transformers initialise the model, as it always does before loading, without the weights of these linears?"""
    weights = [m.weight for m in packed]
    for module in packed:
        del module.weight
    for module in bare.modules():
        module._is_hf_initialized = False
    try:
        bare.initialize_weights()
    except AttributeError:
        return False
    finally:
        for module, weight in zip(packed, weights, strict=True):
            module.weight = weight
    return True
