"""What keeps other tools from opening a compressed model of some architecture, known from its modules alone."""

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


def refusals(config: Any, bits: int = 4) -> dict[str, str]:
    """format -> the sentence with which `export` refuses a model of this transformers configuration in `bits` bits."""
    bare = skeleton(config).eval()
    prefix, blocks = decoder_blocks(bare)
    idle = foreseen(bare)[1]
    experts = {m.name: m for m in matrices(bare).values()}
    shapes = {n: matrix(m).shape for n, m in linears(blocks, prefix).items() if n not in idle}
    shapes |= {n: m.of(bare.get_parameter(m.parameter)).shape for n, m in experts.items()}
    why = {f: unopened(f, bare, shapes, experts) for f in ("compressed-tensors", "gptq")}
    why["gptq"] = why["gptq"] or gptq.unaligned(shapes, bits)
    return {f: refusal(f, config, reason) for f, reason in why.items() if reason}


def refusal(format: str, config: Any, why: str) -> str:
    """One sentence for a format that a model type does not fit."""
    return f"{format}: model type {config.get_text_config().model_type}: {why}: export hf"


def unopened(format: str, bare: Any, names: Collection[str], experts: Mapping[str, Matrix]) -> str:
    """Why transformers would not open packed forms of these weights in the place of those of `bare`; "" if it would.

    names: of linears, and of the matrices in `experts`.
    """
    inside, blocks = decoder_blocks(bare)
    plain = sorted(linears(blocks, inside).keys() - set(names))
    if plain and format == "gptq":
        return f"{plain[0]} is not quantized, which loaders expect of all linears of a decoder block"
    packed = []
    for name in sorted(names):
        if name in experts:
            if not experts[name].original:
                return f"its checkpoints hold no linear for each expert, which loaders look for ({name})"
            continue
        if not name.startswith(f"{inside}.") or type(bare.get_submodule(name)) is not nn.Linear:
            return f"{name} is no nn.Linear of a decoder block, which loaders expect"
        packed += [m for m in [bare.get_submodule(name)] if type(m) is nn.Linear]
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
    """Can transformers do without the weights of these what it always does before it takes those of a checkpoint?"""
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
