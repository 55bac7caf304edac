"""Scripts of tests/foreign, run in the environments of other libraries beside the project."""

import os
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parents[1]


def run(folder: Path, library: str, script: str, *arguments: object) -> None:
    """Run a script of tests/foreign inside a library's environment, in `folder`: GPTQModel leaves logs there."""
    python = HERE.parent / ".foreign" / library / "bin" / "python"
    if not python.exists():
        pytest.skip(f"{library} is not installed beside the project: make foreign")
    command = [str(python), str(HERE / "foreign" / script), *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""})
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
