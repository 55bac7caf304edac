"""Compress, Then Prompt."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ctp.api import compress, learn_prompt, load
    from ctp.formats.export import export
    from ctp.prompts.attached import attach_prompt

__all__ = ["attach_prompt", "compress", "export", "learn_prompt", "load"]

_WHERE = {"attach_prompt": "ctp.prompts.attached", "export": "ctp.formats.export"}


def __getattr__(name: str) -> Any:
    """Imported when first used: torch and transformers take seconds, and planning needs neither."""
    if name not in __all__:
        raise AttributeError(f"module 'ctp' has no attribute {name!r}")
    return getattr(import_module(_WHERE.get(name, "ctp.api")), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
