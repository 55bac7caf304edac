"""Random streams that are named by their use."""

import hashlib
from typing import Any

import torch


def generator(*name: Any) -> torch.Generator:
    """Seeded by what it is for: no two uses share a stream, and neighbouring seeds are unrelated."""
    digest = hashlib.sha256(repr(name).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
