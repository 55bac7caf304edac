"""AutoAWQ's checkpoint format, read: 4 bits in the layout that its config calls `gemm`, of AutoAWQ and GPTQModel.

A linear of n inputs and m outputs is stored, inputs first, as
    qweight  int32 (n, m / 8)       codes: eight outputs a word, of which the lowest 4 bits are output 0, then 2, 4, 6,
                                    1, 3, 5, 7
    qzeros   int32 (groups, m / 8)  zero points, likewise
    scales   float16 (groups, m)
Weight = scale * (code - zero).
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ctp.formats import checks
from ctp.formats.checks import FLOATS, Layers, part
from ctp.formats.layer import Layer
from ctp.formats.pack import from_words

BITS, VERSION = 4, "gemm"
PLACES = [0, 4, 1, 5, 2, 6, 3, 7]  # of outputs 0 to 7 within a word


def check(config: Mapping[str, Any]) -> None:
    """Raises ValueError naming what in a quantization config ctp does not read."""
    version = str(config.get("version") or config.get("checkpoint_format") or config.get("format") or VERSION)
    checks.check_setting("version", version.lower(), (VERSION,), " of awq")
    checks.check_setting("bits", config.get("bits", config.get("w_bit", BITS)), (BITS,), " of awq")
    checks.check_setting("zero_point", config.get("zero_point", True), (True,), " of awq")
    checks.check_group_size(_group_size(config), " of awq")


def _group_size(config: Mapping[str, Any]) -> Any:
    return config.get("group_size", config.get("q_group_size", 128))


def layers(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Layers:
    """The quantized linears of a checkpoint with this quantization config. Raises ValueError naming what is wrong."""
    fields = ("qweight", "qzeros", "scales")
    return checks.read_layers(tensors, fields, "AWQ", lambda _, linear: _read(linear, _group_size(config)))


def _read(tensors: Mapping[str, Tensor], size: int) -> Layer:
    columns, words = part(tensors, "qweight", (torch.int32,), (None, None)).shape
    size = columns if size == -1 else size
    groups, rows = -(-columns // size), words * 8
    zero = _outputs(part(tensors, "qzeros", (torch.int32,), (groups, words)))
    return Layer(
        (rows, columns),
        bits=BITS,
        codes=_outputs(tensors["qweight"]),
        scale=part(tensors, "scales", FLOATS, (groups, rows)).T.contiguous(),
        zero=checks.unless_centred(zero, BITS),
        g_idx=checks.group_numbers("group_size", {}, columns, size),
    )


def _outputs(words: Tensor) -> Tensor:
    """int32 (k, m / 8) -> uint8 (m, k), in the outputs' order."""
    stored = from_words(words, BITS, words.shape[1] * 8)
    return stored.view(len(words), -1, 8)[:, :, PLACES].flatten(1).T.contiguous()
