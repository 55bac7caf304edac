"""Compression of causal language models by GPTQ, SparseGPT and both at once."""

from ctp.compression.blocks import decoder_blocks
from ctp.compression.layer import Layer
from ctp.compression.pack import pack, stats, unpack, unpack_each
from ctp.compression.walk import compress_model

__all__ = ["Layer", "compress_model", "decoder_blocks", "pack", "stats", "unpack", "unpack_each"]
