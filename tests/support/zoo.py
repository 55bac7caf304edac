"""What the checks of the zoo share: models made once, the text they read, and what refuses them."""

import re
from functools import cache, lru_cache

import pytest
import torch

from ctp.models.config import config_facts
from ctp.models.tiny import byte_tokenizer
from ctp.prompts.rows import embedding_rows
from tools.zoo import MODELS, VOCAB, build, config

torch.set_num_threads(1)

# Two ways through some dozen sums of 32 to 64 products in fp32, exponentials between them: relative to the largest.
CLOSE = 2e-4
FRONT = [84, 104, 101, 257, 32, 9]  # the tokens that a hard prompt stands for
EVERY = pytest.mark.parametrize("name", MODELS)


@cache
def shared(name):
    """The model, for checks that leave it as it was: some hundred KB for each."""
    return build(name)


@lru_cache
def tokenizer():
    return byte_tokenizer()


@lru_cache
def refused(name):
    """use -> the sentence that planning refuses it with."""
    return config_facts(config(name)).refused


def windows(n, s, seed=1):
    """Token windows (n, s) of bytes."""
    return torch.randint(VOCAB - 2, (n, s), generator=torch.Generator().manual_seed(seed))


def hard_prompt(model):
    """The rows (k, d) that stand for FRONT."""
    return embedding_rows(model, FRONT)


@torch.no_grad()
def logits(model, ids):
    """Of the plain model (b, t, V), without a cache."""
    return model(input_ids=ids, use_cache=False).logits


def behind(model, ids):
    """Logits (b, t, V) at `ids` (b, t) with FRONT really in front of each row."""
    front = torch.tensor(FRONT).expand(len(ids), -1)
    return logits(model, torch.cat([front, ids], 1))[:, len(FRONT) :]


def far(found, wanted):
    """Largest difference, relative to the largest number."""
    return float((found - wanted).abs().max() / wanted.abs().max())


def refuses(name, use, call):
    """Whether planning refuses this use; `call` then raises that very sentence, before it changes the shared model."""
    if use not in refused(name):
        return False
    why = refused(name)[use]
    assert why.startswith("model type ")
    before = {n: t.clone() for n, t in shared(name).state_dict().items()}
    with pytest.raises(ValueError, match=re.escape(why)):
        call()
    assert all(torch.equal(before[n], t) for n, t in shared(name).state_dict().items())
    return True
