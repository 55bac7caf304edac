"""Compression of causal language models by GPTQ, SparseGPT and both at once."""
