"""What tests share: see the names."""

import torch
from lm_eval.api.instance import Instance

# fp32 on both sides, padded or not, in other orders of summation: sums of up to 20 log-likelihoods of about 6 each.
CLOSE = {"abs": 1e-3, "rel": 1e-5}


def untied(made):
    made.config.tie_word_embeddings = False
    made.lm_head.weight = torch.nn.Parameter(torch.randn_like(made.lm_head.weight))
    return made


def asked(kind, arguments):
    return [Instance(kind, {}, a, i) for i, a in enumerate(arguments)]
