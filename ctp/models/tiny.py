"""Tiny random models by name: every architecture of the paper on any machine, without a hub or a package.

A name stands for a recipe (configuration, seed, VERSION); the recipe's digest is the revision. Nothing has been learned
in them: they exercise a study from end to end, and their numbers mean nothing beyond that.
"""

import hashlib
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ctp.common.files import cache_dir, fill

if TYPE_CHECKING:
    from torch import Generator, Tensor
    from transformers import PreTrainedTokenizerFast


SCHEME = "tiny:"
VERSION = 1  # of what makes weights and tokenizer from a recipe: raise it when either changes
VOCAB = 258  # bytes, <eos>, <bos>
EOS, BOS = 256, 257
GAIN = 2.0  # of a linear: blocks outweigh the embedding, so that logits depend on more than the last token
EMBEDDING_STD = 0.1
SPREAD = 0.05  # standard deviation of biases, and of norms around 1


RECIPES = json.loads(Path(__file__).with_name("tiny_models.json").read_text())  # name -> seed, config
NAMES = tuple(RECIPES)


def recipe(name: str) -> dict[str, Any]:
    """All that the weights and the tokenizer of a tiny model follow from, as JSON values."""
    tokens = {"vocab_size": VOCAB, "bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": None}
    scales = {"gain": GAIN, "embedding_std": EMBEDDING_STD, "spread": SPREAD}
    return {"version": VERSION, **RECIPES[name], "config": {**RECIPES[name]["config"], **tokens}, "scales": scales}


def locate(name: str) -> tuple[str, str, str]:
    """(name, revision, location) of one of NAMES: the digest of its recipe, the same on every machine."""
    text = json.dumps(recipe(name), sort_keys=True)
    return name, f"sha256:{hashlib.sha256(text.encode()).hexdigest()}", SCHEME + name


def folder(location: str, revision: str) -> Path:
    """The Hugging Face folder of a location that `locate` gave, made in the cache on first use.

    Raises ValueError where this version of ctp makes another revision.
    """
    name = location.removeprefix(SCHEME)
    if name not in RECIPES:
        raise ValueError(f"there is no tiny model {name!r}, allowed: {', '.join(NAMES)}")
    if (here := locate(name)[1]) != revision:
        raise ValueError(f"revision = {revision!r}: this version of ctp makes {name} as {here}")
    return fill(cache_dir() / "models" / revision.replace(":", "-"), lambda target: _make(name, target))


def byte_tokenizer(bos: bool = True) -> "PreTrainedTokenizerFast":
    """One token a byte (ids 0 .. 255) and <eos>; with `bos` also <bos>, put in front of every text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = {"eos_token": "<eos>"} | ({"bos_token": "<bos>"} if bos else {})
    entries = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *special.values()]
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(entries)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", BOS)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def _make(name: str, target: Path) -> None:
    """Save the model (float32) and its tokenizer into the empty folder `target`."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from ctp.models.hf import quiet

    known = recipe(name)
    with quiet(), torch.no_grad(), torch.random.fork_rng(devices=[]):  # initialising draws from the caller's numbers
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**known["config"]), dtype=torch.float32)
        generator = torch.Generator().manual_seed(known["seed"])
        for parameter, values in sorted(model.named_parameters()):
            values.copy_(_drawn(parameter, values, generator))
        model.save_pretrained(target)
    byte_tokenizer().save_pretrained(target)


def _drawn(name: str, like: "Tensor", generator: "Generator") -> "Tensor":
    """Random values of the parameter's shape, uniform: a sum and products of exact fractions, on every processor alike
    (a normal distribution's logarithms are not).
    """
    import torch

    if like.dim() == 2:
        mean, std = 0.0, EMBEDDING_STD if "embed" in name else GAIN / math.sqrt(like.shape[1])
    else:
        mean, std = 0.0 if name.endswith("bias") else 1.0, SPREAD  # a bias, or the weight of a norm
    return (torch.rand(like.shape, generator=generator) - 0.5) * (math.sqrt(12) * std) + mean
