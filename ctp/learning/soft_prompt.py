"""Learning a soft prompt through a compressed model: Eq. (1) of the paper.

    min over E in R^{k x d} of  sum_{t=1..n} -log p(x_t | e_1 .. e_k, x_0 .. x_{t-1})

The model is frozen; the prompt E, kept in spec.dtype, is all that has a gradient.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Unpack

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ctp.cells import SoftPrompt
from ctp.learning.run import Trainable
from ctp.learning.train import How
from ctp.learning.train import train as minimise
from ctp.prompts.files import LearnedPrompt
from ctp.prompts.rows import distinct_rows, embedding_rows

PROMPT = "prompt"  # its name among the trainable parameters


def learn(
    model: PreTrainedModel,
    train: Tensor,
    validation: Tensor,
    spec: SoftPrompt,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    **how: Unpack[How],
) -> LearnedPrompt:
    """Learn `spec.k` rows in front of the windows of `train` (n, s); keep the step with the lowest validation loss.

    The model moves to runtime.device (unless accelerate has spread it out) and is otherwise left as it was.
    how, errors: see `ctp.learning.train.train`.
    """

    def in_front() -> AbstractContextManager[Trainable]:
        rows = initial_prompt(model, spec, tokenizer)
        device = model.get_input_embeddings().weight.device
        prompt = torch.nn.Parameter(rows.to(device, getattr(torch, spec.dtype), copy=True))
        return nullcontext(Trainable(model, {PROMPT: prompt}, prompt))

    state = minimise(model, in_front, train, validation, spec, **how)
    return LearnedPrompt(state.best[PROMPT].to(torch.float32), **state.outcome())


def initial_prompt(
    model: PreTrainedModel, spec: SoftPrompt, tokenizer: PreTrainedTokenizerBase | None = None
) -> Tensor:
    """The k rows (k, d), fp32 on the CPU, that learning starts from: embeddings of k tokens.

    random_rows: distinct tokens drawn by spec.seed (the paper's text). first_rows: the first k tokens (its code). text:
    the tokens of spec.init_text, repeated or cut to k. Raises ValueError if there are too few.
    """
    if spec.init != "text":
        return distinct_rows(model, spec.k, spec.seed if spec.init == "random_rows" else None, tokenizer)
    if tokenizer is None or spec.init_text is None:
        raise ValueError("init 'text' needs the model's tokenizer")
    tokens = tokenizer(spec.init_text, add_special_tokens=False)["input_ids"]
    if not tokens:
        raise ValueError(f"init_text = {spec.init_text!r} has no tokens")
    return embedding_rows(model, [tokens[i % len(tokens)] for i in range(spec.k)])
