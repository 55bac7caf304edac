"""Answers to questions, with or without a soft prompt in front: the paper's case studies (figures 1, 7 and 8)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ctp.data.specials import opening_ids, plain_ids
from ctp.prompts.attach import check_context, frozen
from ctp.prompts.attached import attach_prompt, reads_padded
from ctp.prompts.prefix import stretched

GRAM = 4  # tokens of what counts as a repetition


def answer_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: list[str],
    prompt: Tensor | None = None,
    new_tokens: int = 64,
    batch: int = 4,
    progress: Callable[[int, int], None] | None = None,
    before: str = "",
) -> list[list[int]]:
    """The model's answer to each question behind `prompt` (k, d), as token ids without the end of text.

    Greedy, `new_tokens` at most, `batch` questions at a time, padded on the left: rounding apart, the answers are those
    of one at a time. Of the checkpoint's settings for generating only the ends of text count. before: the text of a
    hard prompt, to which questions are attached by a space, without a second BOS. Raises ValueError if there is no
    question, one is empty, or one does not fit the context with k prompt rows and `new_tokens`.
    """
    read = [_read(tokenizer, question, before) for question in questions]
    _check_questions(model, questions, read, 0 if prompt is None else len(prompt), new_tokens, batch)
    longest = max(map(len, read)) + new_tokens + (0 if prompt is None else len(prompt))
    padded = reads_padded(model) and not stretched(model.config, longest)  # the longest of a batch would stretch all
    batch = batch if len({len(ids) for ids in read}) == 1 or padded else 1
    ends = _ends(model, tokenizer)
    out: list[list[int]] = []
    attached = nullcontext() if prompt is None else attach_prompt(model, prompt)
    with frozen(model), _plainly(model), attached:
        for start in range(0, len(read), batch):
            ids, mask = _padded(read[start : start + batch], ends[0] if ends else 0)
            device = model.get_input_embeddings().weight.device
            made = model.generate(
                input_ids=ids.to(device), attention_mask=mask.to(device), do_sample=False, num_beams=1,
                max_new_tokens=new_tokens, eos_token_id=ends or None, pad_token_id=ends[0] if ends else None,
            )  # fmt: skip
            out += [_until(row, ends) for row in made[:, ids.shape[1] :].tolist()]
            if progress is not None:
                progress(len(out), len(read))
    return out


def repeated_4grams(rows: list[list[int]]) -> float | None:
    """Of all runs of four tokens, the fraction that occurred earlier in its row. None if no row has four tokens."""
    grams = [[tuple(row[i : i + GRAM]) for i in range(len(row) - GRAM + 1)] for row in rows]
    total = sum(map(len, grams))
    return 1 - sum(len(set(g)) for g in grams) / total if total else None


def _read(tokenizer: PreTrainedTokenizerBase, question: str, before: str) -> list[int]:
    if not before:
        return list(tokenizer(question, verbose=False)["input_ids"])
    front, whole = (opening_ids(tokenizer, t) for t in (before, f"{before} {question}"))
    return whole[len(front) :] if whole[: len(front)] == front else plain_ids(tokenizer, question)


def plain_text(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _check_questions(
    model: PreTrainedModel, questions: list[str], read: list[list[int]], k: int, new_tokens: int, batch: int
) -> None:
    for name, value in {"number of questions": len(questions), "new_tokens": new_tokens, "batch": batch}.items():
        if value < 1:
            raise ValueError(f"{name} = {value}, allowed: 1 and more")
    for question, ids in zip(questions, read, strict=True):
        if not ids:
            raise ValueError(f"the question {question!r} has no tokens: the model needs at least one to go on from")
        short = question if len(question) <= 60 else question[:60] + "…"
        sizes = f"the question {short!r}: {k} prompt rows + {len(ids)} tokens + {new_tokens} new ones"
        check_context(model, k + len(ids) + new_tokens, sizes)


def _ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end an answer: the checkpoint's, which may be several, and the tokenizer's."""
    given = model.generation_config.eos_token_id
    ends = [*(given if isinstance(given, list) else [given]), tokenizer.eos_token_id]
    return list(dict.fromkeys(end for end in ends if end is not None))


def _padded(rows: list[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    """(ids, mask), each (b, longest): rows with padding on the left, mask 0 there."""
    left = partial(pad_sequence, batch_first=True, padding_side="left")
    ids = left([torch.tensor(row) for row in rows], padding_value=pad)
    return ids, left([torch.ones(len(row), dtype=torch.long) for row in rows])


def _until(row: list[int], ends: list[int]) -> list[int]:
    return row[: next((i for i, token in enumerate(row) if token in ends), len(row))]


@contextmanager
def _plainly(model: PreTrainedModel) -> Iterator[None]:
    """Without the checkpoint's settings for generating, which `generate` takes as defaults."""
    before = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = before
