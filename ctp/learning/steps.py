"""Learning rates and batches as functions of spec and step: resuming needs no sampler and no scheduler."""

import math
from functools import lru_cache

import torch
from torch import Tensor

from ctp.cells import Learned
from ctp.machine.random import generator


def learning_rate(spec: Learned, done: int) -> float:
    """The rate of the update after `done` updates: linear warm-up from 0, then constant, linear or cosine to 0.

    Step for step as transformers' schedules, which the paper's code uses.
    """
    if done < spec.warmup:
        return spec.lr * done / spec.warmup
    left = (spec.steps - done) / (spec.steps - spec.warmup)
    if spec.schedule == "linear":
        return spec.lr * left
    return spec.lr * (1 - math.cos(math.pi * left)) / 2 if spec.schedule == "cosine" else spec.lr


def batch_rows(n: int, spec: Learned, done: int) -> Tensor:
    """The windows (batch,) of n for the update after `done` updates: every epoch is a new permutation."""
    places = range(done * spec.batch, (done + 1) * spec.batch)
    return torch.stack([_epoch(n, spec.seed, place // n)[place % n] for place in places])


@lru_cache(maxsize=2)
def _epoch(n: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(n, generator=generator("epoch", seed, epoch))
