"""Real data that is stored beside the project where it is developed, in ../shared; its own tests skip elsewhere."""

from pathlib import Path

import pytest

SHARED = Path(__file__).parents[3] / "shared"
DATA = SHARED / "data"


def needs(path: Path) -> pytest.MarkDecorator:
    """Skip where there is no such file or folder of SHARED."""
    return pytest.mark.skipif(not path.exists(), reason=f"checks data beside the project, and there is no {path}")
