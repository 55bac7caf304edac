"""Which code runs: the commit of ctp's checkout, and versions of what it computes with; none of it is imported."""

import shutil
import subprocess
from contextlib import suppress
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

LIBRARIES = ("torch", "transformers", "accelerate", "ray", "mlflow", "peft", "safetensors")


@lru_cache
def git_commit() -> str | None:
    """The commit of the checkout that ctp runs from; None where it is installed, or there is no git."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists() or shutil.which("git") is None:
        return None
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=False)
    return head.stdout.strip() or None


def versions() -> dict[str, str | None]:
    """ctp and LIBRARIES; None for one that is not installed."""
    found: dict[str, str | None] = dict.fromkeys(("ctp", *LIBRARIES))
    for name in found:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
