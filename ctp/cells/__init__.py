"""The methods of compression, recovery and measure, and their settings: one frozen class each."""

from ctp.cells.compression import GPTQ, AnyCompression, Checkpoint, Compression, Dense, Solver, SparseGPT
from ctp.cells.measure import AnyMeasure, Generation, Latency, Measure, Neighbours, Perplexity, Task
from ctp.cells.method import Method
from ctp.cells.recovery import (
    Adapter,
    AnyRecovery,
    Bos,
    HardPrompt,
    Learned,
    LoRA,
    NoRecovery,
    RandomPrompt,
    Recovery,
    SoftPrompt,
    Untrained,
)

__all__ = [
    "GPTQ",
    "Adapter",
    "AnyCompression",
    "AnyMeasure",
    "AnyRecovery",
    "Bos",
    "Checkpoint",
    "Compression",
    "Dense",
    "Generation",
    "HardPrompt",
    "Latency",
    "Learned",
    "LoRA",
    "Measure",
    "Method",
    "Neighbours",
    "NoRecovery",
    "Perplexity",
    "RandomPrompt",
    "Recovery",
    "SoftPrompt",
    "Solver",
    "SparseGPT",
    "Task",
    "Untrained",
]  # fmt: skip
