"""Texts that begin with a special token, behind a hard prompt: the token stands once, in front of the prompt."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from ctp.data.specials import Specials, plain_ids
from ctp.prompts.rows import embedding_rows


@dataclass(frozen=True, eq=False)
class Opening:
    """Ids that begin with the token `first`, read behind a hard prompt: first + prompt + the other ids.

    `rows` (k, d) are all that stands before the prompt's last token, or None; that token, `last`, takes the place of
    `first`. So shapes stay, and each id is predicted from what really stands before it.
    """

    first: int
    last: int
    rows: Tensor | None

    @classmethod
    def of_windows(cls, model: PreTrainedModel, tokenizer: Tokenizer, text: str) -> "Opening | None":
        """For token windows; None if the tokenizer has no BOS, or puts several tokens before a text."""
        known = Specials.of(tokenizer)
        first = known.before[0] if known.before else known.bos
        if first is None or len(known.before) > 1:
            return None
        return cls._of(model, first, [first, *plain_ids(tokenizer, text)])

    @classmethod
    def of_requests(cls, model: PreTrainedModel, tokenizer: Tokenizer, text: str, empty: int) -> "Opening | None":
        """For a task's requests, which begin as the tokenizer begins a text, or with `empty` after no context."""
        before = Specials.of(tokenizer).before
        if len(before) > 1:
            return None
        return cls._of(model, before[0] if before else empty, [*before, *plain_ids(tokenizer, text)])

    @classmethod
    def _of(cls, model: PreTrainedModel, first: int, ids: list[int]) -> "Opening":
        return cls(first, ids[-1], embedding_rows(model, ids[:-1]) if ids[1:] else None)

    def split(self, ids: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(which rows of `ids` (b, t) begin with `first`: bool (b,), ids with `last` in its place there).

        mask (b, t): 0 where padding stands before a row.
        """
        start = torch.zeros(len(ids), dtype=torch.long) if mask is None else mask.long().argmax(-1)
        start = start.to(ids.device)[:, None]
        begins = ids.gather(1, start)[:, 0] == self.first
        return begins, torch.where(begins[:, None], ids.scatter(1, start, self.last), ids)
