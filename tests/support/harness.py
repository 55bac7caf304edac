"""Requests of lm-eval's harness, and byte tokenizers with the special tokens that they meet."""

import torch
from lm_eval.api.instance import Instance
from tokenizers import processors

from ctp.models.tiny import BOS, EOS, byte_tokenizer

# fp32 on both sides, padded or not, in other orders of summation: sums of up to 20 log-likelihoods of about 6 each.
CLOSE = {"abs": 1e-3, "rel": 1e-5}


def untied(made):
    """The model with a head of its own, random."""
    made.config.tie_word_embeddings = False
    made.lm_head.weight = torch.nn.Parameter(torch.randn_like(made.lm_head.weight))
    return made


def asked(kind, arguments):
    """Requests of one kind, one for each tuple of arguments."""
    return [Instance(kind, {}, a, i) for i, a in enumerate(arguments)]


def framed(before=True, after=True):
    """Bytes, with <bos> and <eos>, which the tokenizer puts around a text where it is told to."""
    made = byte_tokenizer()
    single = " ".join([*["<bos>"] * before, "$A", *["<eos>"] * after])
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[("<bos>", BOS), ("<eos>", EOS)]
    )
    return made


def bare(**special):
    """Bytes with these special tokens, and none put around a text."""
    made = byte_tokenizer(bos=False)
    made.eos_token = None
    made.add_special_tokens(special) if special else None
    return made
