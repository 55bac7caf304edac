"""Rows of a model's embedding: what a soft prompt starts from, and prompts that are not trained at all."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ctp.cells import Bos, HardPrompt, RandomPrompt, Untrained
from ctp.data.specials import opening_ids, plain_ids
from ctp.machine.random import generator

if TYPE_CHECKING:  # torch itself is needed above
    from transformers import PreTrainedModel
    from transformers import PreTrainedTokenizerBase as Tokenizer


def embedding_rows(model: "PreTrainedModel", ids: Sequence[int]) -> Tensor:
    """The embeddings (k, d) of k token ids, fp32 on the CPU. Raises ValueError for ids beyond the vocabulary.

    d is the width of the embedding, which in some OPT models is not the hidden size.
    """
    embedding = model.get_input_embeddings()
    size = embedding.num_embeddings
    if out := [i for i in ids if not 0 <= i < size]:
        raise ValueError(f"token {out[0]} is not in the model's vocabulary of {size}")
    with torch.no_grad():
        rows = embedding(torch.tensor(list(ids), device=embedding.weight.device))
    return rows.to("cpu", torch.float32, copy=True)


def token_ids(model: "PreTrainedModel", tokenizer: "Tokenizer | None") -> list[int]:
    """The ids of all tokens in order, special ones included, without the rows that pad an embedding.

    All rows without a tokenizer.
    """
    size = model.get_input_embeddings().num_embeddings
    known = range(size) if tokenizer is None else tokenizer.get_vocab().values()
    return sorted({i for i in known if 0 <= i < size})


def distinct_rows(model: "PreTrainedModel", k: int, seed: int | None, tokenizer: "Tokenizer | None" = None) -> Tensor:
    """Embeddings (k, d) of k distinct tokens: drawn by `seed`, or the first k if it is None.

    Raises ValueError if there are too few.
    """
    ids = token_ids(model, tokenizer)
    if k > len(ids):
        raise ValueError(f"k = {k} rows cannot be distinct tokens of a vocabulary of {len(ids)}")
    order = range(k) if seed is None else torch.randperm(len(ids), generator=generator("init", seed))[:k].tolist()
    return embedding_rows(model, [ids[i] for i in order])


def untrained_rows(spec: Untrained, model: "PreTrainedModel", tokenizer: "Tokenizer") -> Tensor:
    """The rows (k, d), fp32 on the CPU, of an untrained prompt. Raises ValueError if there are none."""
    if isinstance(spec, RandomPrompt):
        return distinct_rows(model, spec.k, spec.seed, tokenizer)
    if isinstance(spec, HardPrompt):
        if not plain_ids(tokenizer, spec.text):
            raise ValueError(f"text = {spec.text!r} has no tokens")
        return embedding_rows(model, opening_ids(tokenizer, spec.text))
    if isinstance(spec, Bos):
        if tokenizer.bos_token_id is None:
            raise ValueError("method = 'bos': the model's tokenizer has no beginning-of-text token")
        return embedding_rows(model, [tokenizer.bos_token_id])
    raise TypeError(f"nothing here gives the rows of {spec.method}")
