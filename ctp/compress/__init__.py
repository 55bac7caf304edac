"""Compression of causal language models by GPTQ, SparseGPT and both at once."""

from ctp.compress.blocks import decoder_blocks
from ctp.compress.layer import Layer
from ctp.compress.pack import pack, stats, unpack
from ctp.compress.walk import compress_model

__all__ = ["Layer", "compress_model", "decoder_blocks", "pack", "stats", "unpack"]
