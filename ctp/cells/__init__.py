"""What a cell is: the methods of compression, recovery and measure with their settings, one frozen class each.

method        the base of all methods: picked by name, found in a registry
compression   how a model is made smaller
recovery      how lost quality is won back
measure       what is measured
inputs        models and texts, pinned to one exact version
cell          the three kinds of cell, and their keys
events        what is reported of a cell while it runs
labels        names of cells for people, and the axes to filter by
runtime       how and where work is done, which is in no key
"""

from ctp.cells.compression import GPTQ, Checkpoint, Compression, Dense, Solver, SparseGPT
from ctp.cells.measure import Generation, Latency, Measure, Neighbours, Perplexity, Task
from ctp.cells.method import Method
from ctp.cells.recovery import (
    Adapter,
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
    "GPTQ", "Adapter", "Bos", "Checkpoint", "Compression", "Dense",
    "Generation", "HardPrompt", "Latency", "Learned", "LoRA", "Measure", "Method", "Neighbours", "NoRecovery",
    "Perplexity", "RandomPrompt", "Recovery", "SoftPrompt", "Solver", "SparseGPT", "Task", "Untrained",
]  # fmt: skip
