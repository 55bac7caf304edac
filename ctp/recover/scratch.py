"""Memory that the layers of a model compute in, one after the other."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


class Scratch:
    """Buffers that one layer after the other computes in.

    Blocks of this size between others that wait for the backward pass would stay in the heap as holes: half as much
    memory again.
    """

    def __init__(self) -> None:
        self._held: dict[tuple[int, torch.dtype, torch.device], Tensor] = {}

    def take(self, which: int, shape: Sequence[int], device: torch.device, dtype: torch.dtype) -> Tensor:
        """Buffer number `which` in this shape; what it holds is anything."""
        size, place = math.prod(shape), (which, dtype, device)
        held = self._held.get(place)
        if held is None or held.numel() < size:
            self._held[place] = held = torch.empty(size, dtype=dtype, device=device)
        return held[:size].view(shape)
