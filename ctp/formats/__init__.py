"""Checkpoint formats of other tools."""

FORMATS = ("hf", "compressed-tensors", "gptq")  # that a compressed model is exported to
