"""The harness's model with a prompt in front of whatever it reads, and with tokenizers that the harness cannot use."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ctp.common.messages import shown
from ctp.data.specials import Specials
from ctp.data.taskfiles import INSTALL
from ctp.prompts.attach import check_readable, context_of, token_logits
from ctp.prompts.attached import attach_prompt
from ctp.prompts.opening import Opening
from ctp.prompts.prefix import Prefix, prefix, stretched

try:
    from lm_eval.models.huggingface import HFLM
except ImportError as e:
    raise ImportError(INSTALL) from e


class SoftPromptLM(HFLM):
    """The harness's Hugging Face model, with the k rows of `prompt` (k, d) in front of whatever it reads.

    They stand behind the padding of a batch, before the tokenizer's BOS. The context is k tokens shorter: longer texts
    lose their beginning, as in the harness. Without a prompt it is HFLM. rows: called with the number of
    sequences read so far. `cut` counts the log-likelihood requests that lost their beginning. text: that of a hard
    prompt: requests then stand behind it as one text (see `Opening`).

    Beyond the harness: an answer that makes one token with the end of its context is encoded by itself; what a
    tokenizer puts behind a text is left out; an empty context is the prefix token; a tokenizer may lack an end of text.

    Raises ValueError if the model cannot read rows, the prompt leaves no room for two tokens, the tokenizer has neither
    BOS nor EOS, or an answer is empty.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompt: Tensor | None = None,
        *,
        batch: int = 1,
        rows: Callable[[int], None] | None = None,
        text: str = "",
    ) -> None:
        self._prompt, self._report, self._rows, self.cut = prompt, rows, 0, 0
        self._prefixes: dict[bool, Prefix] = {}
        self._after = list(Specials.of(tokenizer).after)
        if prompt is not None:
            check_readable(model)
        if stretched(model.config, context_of(model) or 0):  # positions would depend on the longest text of a batch
            batch = 1
        tokenizer = _with_padding(copy.deepcopy(tokenizer))  # the harness sets its padding
        # "causal": the decoder half of an encoder-decoder model would else read the answer without its context.
        super().__init__(pretrained=model, backend="causal", tokenizer=tokenizer, batch_size=batch)
        self._opening = Opening.of_requests(model, tokenizer, text, self.prefix_token_id) if text else None
        if self.max_length < 2:
            raise ValueError(f"{self._k} prompt rows leave no room in a context of {super().max_length} tokens")

    @property
    def _k(self) -> int:
        return 0 if self._prompt is None else len(self._prompt)

    @property
    def max_length(self) -> int:
        """Tokens that fit behind the prompt."""
        return int(super().max_length) - self._k

    @property
    def eot_token_id(self) -> int:
        """The end of text, or what stands in its place."""
        return int(self.prefix_token_id if self.tokenizer.eos_token_id is None else self.tokenizer.eos_token_id)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options: Any) -> list[int]:
        """The tokens of a text that goes on: nothing that the tokenizer puts behind it."""
        ids = list(super().tok_encode(string, add_special_tokens, **options))
        n = len(self._after)
        return ids[:-n] if n and add_special_tokens is not False and ids[-n:] == self._after else ids

    def tok_batch_encode(self, strings: list[str], *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        """(ids, mask), each (b, longest), padded on the left: of texts that go on, and have a token at least."""
        ids, mask = super().tok_batch_encode(strings, *args, **options)
        n = len(self._after)
        if n and bool((ids[:, -n:] == torch.tensor(self._after)).all()):
            ids, mask = ids[:, :-n], mask[:, :-n]
        if ids.shape[1] == 0:
            ids, mask = (torch.zeros((len(strings), 1), dtype=torch.long) for _ in range(2))
        empty = mask.sum(-1) == 0
        ids[empty, -1], mask[empty, -1] = self.prefix_token_id, 1
        return ids, mask

    def loglikelihood(self, requests: list[Any], **options: Any) -> list[tuple[float, bool]]:
        """As the harness. Raises ValueError for an answer without text."""
        if any(r.args == ("", "") for r in requests):
            raise ValueError("a context and its answer are both empty")
        return super().loglikelihood(requests, **options)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        front, answer = super()._encode_pair(context, continuation)
        if not answer:
            rest = context[len(context.rstrip()) :] + continuation
            if not rest:
                raise ValueError(f"an answer to {shown(context)} is empty")
            answer = self._within(rest)
        return front or [self.prefix_token_id], answer

    def _within(self, text: str) -> list[int]:
        """The tokens of `text` within a line: SentencePiece puts a space before the first word of a text."""
        front, whole = (self.tok_encode(t, add_special_tokens=False) for t in ("\n", f"\n{text}"))
        alone = self.tok_encode(text, add_special_tokens=False)
        return whole[len(front) :] if whole[: len(front)] == front and len(whole) > len(front) else alone

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """Logits (b, t, V) of the tokens `inps` (b, t), padded on the right."""
        if self._prompt is None:
            logits = super()._model_call(inps, attn_mask, labels)
        else:
            with torch.no_grad():
                logits = _joined([(chosen, self._logits(ids, rows)) for chosen, ids, rows in self._parts(inps)])
        self._count(len(inps))
        return logits

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **options: Any) -> Tensor:
        """Tokens (b, at most max_length) that begin with `context` (b, t), padded on the left."""
        made, mask = [], options.pop("attention_mask", None)
        for chosen, ids, rows in self._parts(context, mask):
            masked = {} if mask is None else {"attention_mask": mask[chosen]}
            with nullcontext() if rows is None else attach_prompt(self.model, rows):
                made.append((chosen, super()._model_generate(ids, max_length, stop, **masked, **options)))
        longest = max(tokens.shape[1] for _, tokens in made)
        pad = self.tokenizer.pad_token_id
        tokens = _joined([(chosen, F.pad(t, (0, longest - t.shape[1]), value=pad)) for chosen, t in made])
        self._count(len(context))
        return tokens

    def _parts(self, ids: Tensor, mask: Tensor | None = None) -> list[tuple[Tensor, Tensor, Tensor | None]]:
        """(which rows of `ids`, those rows, the prompt in front of them), for all rows."""
        every = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
        if self._opening is None or self._prompt is None:
            return [(every, ids, self._prompt)]
        begins, swapped = self._opening.split(ids, mask)
        parts = [(begins, swapped[begins], self._opening.rows), (~begins, ids[~begins], self._prompt)]
        return [part for part in parts if len(part[1])]

    def _logits(self, ids: Tensor, rows: Tensor | None) -> Tensor:
        if rows is None:
            return token_logits(self.model, ids)
        memo = rows is self._prompt
        if memo not in self._prefixes:
            self._prefixes[memo] = prefix(self.model, rows)
        return token_logits(self.model, ids, self._prefixes[memo])

    def _loglikelihood_tokens(self, requests: list[Any], **options: Any) -> list[tuple[float, bool]]:
        self.cut += sum(len(context) + len(answer) > self.max_length + 1 for _, context, answer in requests)
        return super()._loglikelihood_tokens(requests, **options)

    def _count(self, rows: int) -> None:
        self._rows += rows
        if self._report is not None:
            self._report(self._rows)


def _joined(parts: list[tuple[Tensor, Tensor]]) -> Tensor:
    """One batch from the results of its parts: (which of its rows, their results) each."""
    chosen, first = parts[0]
    if len(parts) == 1:
        return first
    whole = first.new_empty((len(chosen), *first.shape[1:]))
    for chosen, part in parts:
        whole[chosen.to(whole.device)] = part
    return whole


def _with_padding(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer with a token to pad with: the harness would add one that the embedding does not have.

    Raises ValueError if it has neither BOS nor EOS.
    """
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has neither a beginning-of-text nor an end-of-text token: a task needs one")
    if tokenizer.pad_token_id is None and tokenizer.unk_token is None and tokenizer.eos_token is None:
        tokenizer.pad_token = tokenizer.bos_token
    return tokenizer
