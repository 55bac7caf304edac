"""What a method of your own is written with: `from ctp.plugin import …`.

A plugin is a Python file with a class of settings for each method, named in a grid file under `plugins`:

    Compression   with `compress(self, job: CompressJob) -> dict[str, float]`
    Recovery      with `recover(self, job: LearnJob) -> dict[str, float]`
    Measure       with `measure(self, job: EvaluateJob) -> dict[str, float]`

The base classes and field types load in no time. All else needs torch: import it inside your function, so that planning
a grid does not wait for it.
"""

from typing import TYPE_CHECKING, Any

from ctp.cells import Compression, Measure, Recovery
from ctp.cells.inputs import Bool, Count, Finite, Pinned, PositiveInt, Seed, Windows

if TYPE_CHECKING:
    from ctp.architectures.blocks import decoder_blocks
    from ctp.execution.jobs import CompressJob, EvaluateJob, LearnJob
    from ctp.formats.artifact import Compressed
    from ctp.formats.layer import Layer, gather_kept
    from ctp.prompts.files import save_prompt

__all__ = [
    "Bool",
    "CompressJob",
    "Compressed",
    "Compression",
    "Count",
    "EvaluateJob",
    "Finite",
    "Layer",
    "LearnJob",
    "Measure",
    "Pinned",
    "PositiveInt",
    "Recovery",
    "Seed",
    "Windows",
    "decoder_blocks",
    "gather_kept",
    "save_prompt",
]

_WHERE = {
    "CompressJob": "ctp.execution.jobs",
    "Compressed": "ctp.formats.artifact",
    "EvaluateJob": "ctp.execution.jobs",
    "Layer": "ctp.formats.layer",
    "LearnJob": "ctp.execution.jobs",
    "decoder_blocks": "ctp.architectures.blocks",
    "gather_kept": "ctp.formats.layer",
    "save_prompt": "ctp.prompts.files",
}


def __getattr__(name: str) -> Any:
    """These come when they are asked for."""
    if name not in _WHERE:
        raise AttributeError(f"module 'ctp.plugin' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_WHERE[name]), name)
