"""The ways of learning that the benchmark times take the same step; real times need the real model."""

import pytest
import torch
from support.tiny import tiny_llama

from benchmarks import steps


@pytest.mark.parametrize("way", ["trainer", "ctp", "recompute"])
def test_the_first_loss_is_that_of_the_plain_loop(way, monkeypatch):
    monkeypatch.setattr(steps, "K", 3)
    windows = torch.randint(1, 60, (2, 12), generator=torch.Generator().manual_seed(0))
    expected, found = (steps.steps_of(each, tiny_llama(), windows, 3, "fp32") for each in ("peft", way))
    assert found[1] == pytest.approx(expected[1], rel=1e-5)  # the benchmark's own bound: sums in another order
    for seconds, _ in (expected, found):
        assert len(seconds) == 2
        assert min(seconds) > 0
