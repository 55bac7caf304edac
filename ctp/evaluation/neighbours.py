"""The vocabulary words nearest to each row of a soft prompt, by cosine (the paper's appendix D and figure 9)."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase

CHUNK = 2**22  # fp32 numbers that one step may copy, of the table or of cosines: 16 MiB
BINS = 100  # of the histogram: 0.02 each, from -1 to 1
PAPER_BOUND = 0.16  # "the cosine similarity for nearly all comparisons falls below 0.16"


def neighbours(prompt: Tensor, table: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """(cosines, ids), each (k, top) and on the CPU: the rows of `table` (V, d) nearest to each of `prompt` (k, d).

    Cosines in fp32, greatest first; the table is read in chunks. Its rows of zeros (padding) are left out. Raises
    ValueError if the prompt has a row of zeros, a shape does not fit, numbers are not finite, or the table has fewer
    than `top` rows.
    """
    rows = _directions(prompt, table)
    length = max(1, CHUNK // max(rows.shape))
    best = torch.full((len(rows), 0), 0.0, device=table.device)
    ids = torch.full((len(rows), 0), 0, device=table.device)
    for start in range(0, len(table), length):
        part = table[start : start + length].detach().float()
        known = torch.linalg.vector_norm(part, dim=1).nonzero()[:, 0]
        cosines = rows @ F.normalize(part[known], dim=1).T
        best = torch.cat([best, cosines], dim=1)
        ids = torch.cat([ids, (known + start).expand(len(rows), -1)], dim=1)
        best, place = best.topk(min(top, best.shape[1]), dim=1)
        ids = ids.gather(1, place)
    if not 0 < top <= best.shape[1]:
        raise ValueError(f"top = {top}, allowed: 1 to {best.shape[1]}, the rows of the table that are not zero")
    if not bool(torch.isfinite(best).all()):
        raise ValueError("the table has rows that are not finite numbers")
    return best.clamp(-1, 1).cpu(), ids.cpu()


def _directions(prompt: Tensor, table: Tensor) -> Tensor:
    """The prompt's rows (k, d) in fp32 beside the table, at length 1."""
    if prompt.dim() != 2 or len(prompt) == 0 or table.dim() != 2 or prompt.shape[1] != table.shape[1]:
        raise ValueError(f"prompt {tuple(prompt.shape)} and table {tuple(table.shape)}: must be (k, d) and (V, d)")
    rows = prompt.detach().to(table.device, torch.float32)
    norms = torch.linalg.vector_norm(rows, dim=1)
    for row, norm in enumerate(norms.tolist()):
        if norm == 0:
            raise ValueError(f"row {row} of the prompt is zero: it has no direction, and no neighbours")
    if not bool(torch.isfinite(norms).all()):
        raise ValueError("a prompt's rows must be finite numbers")
    return F.normalize(rows, dim=1)


def histogram(cosines: Tensor) -> dict[str, list[Any]]:
    """edges (101) and counts (100) of all cosines, in bins of 0.02."""
    edges = [round(2 * i / BINS - 1, 2) for i in range(BINS + 1)]
    counts, _ = np.histogram(cosines.double().numpy(), bins=edges)
    return {"edges": edges, "counts": counts.tolist()}


def nearest_words(cosines: Tensor, ids: Tensor, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """The nearest word of each row, as text and as a token (None beyond the tokenizer's vocabulary)."""
    nearest = zip(ids[:, 0].tolist(), cosines[:, 0].tolist(), strict=True)
    return [
        {
            "row": row,
            "word": tokenizer.decode([i]),
            "token": tokenizer.convert_ids_to_tokens(i) if i < len(tokenizer) else None,
            "id": i,
            "cosine": cosine,
        }
        for row, (i, cosine) in enumerate(nearest)
    ]


def summary(cosines: Tensor, ids: Tensor) -> dict[str, float]:
    """The metrics of what `neighbours` gave."""
    return {
        "rows": len(cosines),
        "max_cosine": cosines.max().item(),
        "mean_nearest_cosine": cosines[:, 0].double().mean().item(),
        f"fraction_below_{PAPER_BOUND}": (cosines.double() < PAPER_BOUND).double().mean().item(),
        "distinct_nearest": len(set(ids[:, 0].tolist())),
    }
