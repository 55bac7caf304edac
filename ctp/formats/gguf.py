"""GGUF files of llama.cpp, read: the block formats whose weights are evenly spaced, which are most.

A row of weights is cut into blocks, and these into groups of 16 or 32; weight = scale * (code - zero) or, with a least
weight per group, scale * code + shift. gguf's own dequantizer gives the codes where the scales of a block are set to
1, and the scales where its codes are set to 1. The weights are then compared with those that the library makes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ctp.formats.checks import Layers
from ctp.formats.layer import Layer

Bytes = dict[tuple[int, int], tuple[int, ...]]  # place in a block -> what to write there, repeated
ONE = (0x00, 0x3C)  # in float16
K_ONES = (1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1, 1)  # eight scales of 1 and eight least weights of 0, in 6 bits each


@dataclass(frozen=True)
class Blocks:
    """A block format. unit: scales that make of a weight its code - zero. one: codes that make of a weight its scale.
    none: codes that make of a weight its shift; None where there is a zero point in the middle instead.
    """

    bits: int
    group: int
    unit: Bytes
    one: Bytes
    none: Bytes | None = None


FORMATS = {
    "Q4_0": Blocks(4, 32, {(0, 2): ONE}, {(2, 18): (0x99,)}),
    "Q4_1": Blocks(4, 32, {(0, 2): ONE, (2, 4): (0,)}, {(2, 4): (0,), (4, 20): (0x11,)}, {(4, 20): (0,)}),
    "Q5_0": Blocks(5, 32, {(0, 2): ONE}, {(2, 6): (0xFF,), (6, 22): (0x11,)}),
    "Q5_1": Blocks(5, 32, {(0, 2): ONE, (2, 4): (0,)}, {(2, 8): (0,), (8, 24): (0x11,)}, {(4, 24): (0,)}),
    "Q8_0": Blocks(8, 32, {(0, 2): ONE}, {(2, 34): (1,)}),
    "Q2_K": Blocks(2, 16, {(0, 16): (1,), (80, 82): ONE, (82, 84): (0,)}, {(16, 80): (0x55,), (82, 84): (0,)},
                   {(16, 80): (0,)}),
    "Q3_K": Blocks(3, 16, {(96, 104): (0x11,), (104, 108): (0xAA,), (108, 110): ONE},
                   {(0, 32): (0xFF,), (32, 96): (0x55,)}),
    "Q4_K": Blocks(4, 32, {(0, 2): ONE, (2, 4): (0,), (4, 16): K_ONES}, {(2, 4): (0,), (16, 144): (0x11,)},
                   {(16, 144): (0,)}),
    "Q5_K": Blocks(5, 32, {(0, 2): ONE, (2, 4): (0,), (4, 16): K_ONES},
                   {(2, 4): (0,), (16, 48): (0,), (48, 176): (0x11,)}, {(16, 176): (0,)}),
    "Q6_K": Blocks(6, 16, {(192, 208): (1,), (208, 210): ONE}, {(0, 128): (0x11,), (128, 192): (0xAA,)}),
}  # fmt: skip
PLAIN = ("F32", "F16", "BF16", "F64")


def layers(tensors: Mapping[str, Tensor], file: Path, bare: Any) -> Layers:
    """Every quantized linear of a GGUF file: its name, its compressed form, and the name of its weight.

    tensors: the file's weights as transformers makes them. Raises ValueError naming a tensor whose format is not read.
    """
    from gguf import GGUFReader
    from transformers import modeling_gguf_pytorch_utils as hf

    reader = GGUFReader(file)
    kind = hf.TENSOR_PROCESSORS.get(hf.read_field(reader, "general.architecture")[0], hf.TensorProcessor)
    processor = kind(config=bare.config.to_dict())
    names = hf.get_gguf_hf_weights_map(bare, processor)
    head = bare.get_output_embeddings()
    linears = {f"{n}.weight": n for n, m in bare.named_modules() if isinstance(m, nn.Linear) and m is not head}
    for found in reader.tensors:
        name, quant = names.get(found.name, ""), found.tensor_type.name
        weight = tensors.get(name)
        if name not in linears or quant in PLAIN or weight is None:
            continue
        if quant not in FORMATS:
            raise ValueError(f"{found.name} is {quant} in {file.name}: allowed: {', '.join((*FORMATS, *PLAIN))}")

        def ordered(values: np.ndarray[Any, Any], name: str = found.name) -> Tensor:
            return torch.from_numpy(np.copy(processor.process(weights=values, name=name).weights))

        layer = read(np.asarray(found.data), quant, ordered)
        if not torch.equal(layer.dense(torch.float32), weight.float()):
            raise ValueError(f"{found.name} of {file.name}: ctp does not read it as transformers does")
        yield linears[name], layer, {name}


def read(data: np.ndarray[Any, Any], quant: str, ordered: Any = torch.from_numpy) -> Layer:
    """A weight in a block format, bytes (outputs, n), as a layer. ordered: an array by outputs -> a tensor of those of
    the model's, which may be in another order.
    """
    how = FORMATS[quant]
    codes = ordered(_weights(data, quant, how.unit)) + (2 ** (how.bits - 1) if how.none is None else 0)
    scale = ordered(np.ascontiguousarray(_weights(data, quant, how.one)[:, :: how.group]))
    shift = None
    if how.none is not None:
        shift = ordered(np.ascontiguousarray(_weights(data, quant, how.none)[:, :: how.group]))
    half = scale.half()
    return Layer(
        (codes.shape[0], codes.shape[1]),
        bits=how.bits,
        codes=codes.to(torch.uint8),
        scale=half if torch.equal(half.float(), scale) else scale,
        shift=shift,
    )


def _weights(data: np.ndarray[Any, Any], quant: str, change: Bytes) -> np.ndarray[Any, Any]:
    """float32 (outputs, inputs): what gguf makes of the blocks once these bytes are changed in each."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

    kind = GGMLQuantizationType[quant]
    blocks = data.reshape(-1, GGML_QUANT_SIZES[kind][1]).copy()
    for (start, stop), values in change.items():
        blocks[:, start:stop] = np.resize(np.array(values, dtype=np.uint8), stop - start)
    weights: np.ndarray[Any, Any] = dequantize(blocks.reshape(data.shape), kind)
    return weights.astype(np.float32, copy=False)
