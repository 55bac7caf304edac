"""What a method of your own is written with: `from ctp.plugin import …`.

A plugin is a Python file with a class of settings for each method, named in a grid file under `plugins`:

    Compression   with `compress(self, job: CompressJob) -> dict[str, float]`
    Recovery      with `recover(self, job: LearnJob) -> dict[str, float]`
    Measure       with `measure(self, job: EvaluateJob) -> dict[str, float]`

A class that derives from a built-in method may leave the function out, or call `builtin_compress(self, job)`,
`builtin_recover` or `builtin_measure` in its own for what the built-in one does. Base classes and field types load at
once; the rest needs torch: import it inside your function, so that planning a grid does not wait for it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ctp.cells import GPTQ, Compression, LoRA, Measure, Perplexity, Recovery, SoftPrompt, SparseGPT, Task
from ctp.cells.inputs import Bool, Count, Finite, Pinned, PositiveInt, Seed, Windows

if TYPE_CHECKING:
    from ctp.architectures.blocks import decoder_blocks
    from ctp.execution.compress import builtin_compress
    from ctp.execution.jobs import CompressJob, EvaluateJob, LearnJob
    from ctp.execution.learn import builtin_recover
    from ctp.execution.measure import builtin_measure
    from ctp.formats.artifact import Compressed
    from ctp.formats.layer import Layer, gather_kept
    from ctp.prompts.files import save_prompt

__all__ = [
    "GPTQ",
    "Bool",
    "CompressJob",
    "Compressed",
    "Compression",
    "Count",
    "EvaluateJob",
    "Finite",
    "Layer",
    "LearnJob",
    "LoRA",
    "Measure",
    "Perplexity",
    "Pinned",
    "PositiveInt",
    "Recovery",
    "Seed",
    "SoftPrompt",
    "SparseGPT",
    "Task",
    "Windows",
    "builtin_compress",
    "builtin_measure",
    "builtin_recover",
    "decoder_blocks",
    "gather_kept",
    "save_prompt",
]  # fmt: skip
_MODULES = {
    "ctp.architectures.blocks": ("decoder_blocks",),
    "ctp.execution.compress": ("builtin_compress",),
    "ctp.execution.learn": ("builtin_recover",),
    "ctp.execution.measure": ("builtin_measure",),
    "ctp.execution.jobs": ("CompressJob", "EvaluateJob", "LearnJob"),
    "ctp.formats.artifact": ("Compressed",),
    "ctp.formats.layer": ("Layer", "gather_kept"),
    "ctp.prompts.files": ("save_prompt",),
}


def __getattr__(name: str) -> Any:
    """Names that need torch are imported when they are first used."""
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(module), name)
    raise AttributeError(f"module 'ctp.plugin' has no attribute {name!r}")
