"""Perplexity over fixed token windows, with or without a soft prompt in front of each."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ctp.prompts.attach import check_fit, check_readable, frozen, scored_nll
from ctp.prompts.prefix import Prefix, prefix


@dataclass(frozen=True)
class PerplexityResult:
    """A sum and both denominators. Raises FloatingPointError if nll_sum is not finite.

    nll_sum: -log p in nats, over `scored_tokens` = n (s - 1) tokens. positions: n (s - 1 + k), the scored tokens and
    the k prompt rows before each of the n windows.
    """

    nll_sum: float
    scored_tokens: int
    positions: int

    def __post_init__(self) -> None:
        if not math.isfinite(self.nll_sum):
            raise FloatingPointError(f"summed NLL of {self.scored_tokens} tokens is {self.nll_sum}: no perplexity")

    @property
    def ppl(self) -> float:
        """Perplexity per scored token: a uniform model over V symbols gives V for every prompt."""
        return math.exp(self.nll_sum / self.scored_tokens)

    @property
    def ppl_paper(self) -> float:
        """As the paper's public code, which divides by the prompt positions too: ppl ** ((s - 1) / (s - 1 + k))."""
        return math.exp(self.nll_sum / self.positions)


def perplexity(
    model: PreTrainedModel,
    windows: Tensor,
    prompt: Tensor | Prefix | None = None,
    *,
    batch: int = 4,
    progress: Callable[[int, int], None] | None = None,
) -> PerplexityResult:
    """Score x_1 .. x_{s-1} of each window (n, s) behind `prompt` (k, d), which stands outside the window.

    prompt: rows, or what `prefix` made of them for this model. Runs on the device of the model's embedding, in the
    model's dtype (or the caller's autocast), `batch` windows at a time; log-softmax in fp32, summed in float64.
    `progress(done, n)` is called after each batch. Raises ValueError if k + s tokens exceed the context, a shape does
    not fit or the model cannot read rows, FloatingPointError if the sum is not finite.
    """
    k = 0 if prompt is None else len(prompt)
    rows = prompt.rows if isinstance(prompt, Prefix) else prompt
    check_fit(model, windows, k, None if rows is None else rows.shape[1])
    if k:
        check_readable(model)
    device = model.get_input_embeddings().weight.device
    n, s = windows.shape
    total = torch.zeros((), dtype=torch.float64)
    with frozen(model), torch.no_grad():
        front = prefix(model, prompt) if isinstance(prompt, Tensor) else prompt
        for start in range(0, n, batch):
            part = windows[start : start + batch].to(device)
            nll = scored_nll(model, part, front)
            total = total.to(nll.device) + nll
            if progress is not None:
                progress(min(start + batch, n), n)
    return PerplexityResult(total.item(), n * (s - 1), n * (s - 1 + k))
