"""What a model's configuration says: its `Facts`, without reading weights."""

import hashlib
import json
from dataclasses import asdict
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ctp.architectures import families
from ctp.architectures.context import context_length
from ctp.common.files import cache_dir, write_json
from ctp.common.messages import brief
from ctp.machine.arithmetic import dtype_name
from ctp.models import files as model_files
from ctp.models.hf import LOCAL, quiet, skeleton
from ctp.models.sources import UNPINNED, Facts, check_pinned, known_models, model_folder


@lru_cache
def model_facts(location: str, revision: str) -> Facts:
    """Read from the configuration alone (no weights), remembered per machine; of the known models without a network.

    Raises ValueError, in one sentence, where the configuration is not to be had or not understood.
    """
    commit, known = known_models().get(location.removeprefix("hub:"), ("", None))
    if known is not None and location.startswith(("hub:", "package:")) and revision in (commit, UNPINNED):
        return known
    memo = cache_dir() / "facts" / _rules() / f"{revision.replace(':', '-')}.json"
    if memo.exists() and (remembered := Facts.read(json.loads(memo.read_text()))):
        return remembered
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    folder, _ = model_folder(location, revision, weights=False)
    model_files.check_config(folder)
    if any(folder.glob("*.safetensors")):
        model_files.check_files(folder, named=False)
    try:
        with quiet():
            config = AutoConfig.from_pretrained(folder, **LOCAL)
            if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
                raise ValueError(f"model_type = {config.model_type!r} is no causal language model of transformers")
            found = config_facts(config)
    except Exception as e:  # whatever a configuration that fits no model makes transformers and torch raise
        why = model_files.needs_code(folder) or brief(e)
        raise ValueError(f"the configuration of {location} cannot be used: {why}") from e
    check_pinned(location, revision)
    write_json(memo, asdict(found))
    return found


@lru_cache
def _rules() -> str:
    """Twelve digits that change with what Facts are read by: this code and transformers."""
    code = [f for at in ("architectures", "models") for f in sorted((Path(__file__).parents[1] / at).glob("*.py"))]
    read = b"".join(f.read_bytes() for f in code) + version("transformers").encode()
    return hashlib.sha256(read).hexdigest()[:12]


def config_facts(config: Any) -> Facts:
    """The Facts of a transformers configuration; dtype float32 where it says none."""
    import torch

    from ctp.architectures.blocks import decoder_blocks, unfit
    from ctp.architectures.chain import foreseen
    from ctp.architectures.experts import split
    from ctp.architectures.linears import linears, matrix

    model, idle = skeleton(config).eval(), frozenset[str]()
    refused, why = families.refusals(model.config), unfit(model)  # a class may make a decoder of its configuration
    try:
        prefix, blocks = decoder_blocks(model)
        if not why:
            why, idle = foreseen(model)
    except ValueError as e:  # `why` says so
        prefix, blocks = "", torch.nn.ModuleList()
        refused.setdefault("lora", str(e))
    if why:
        refused["compress"] = why
    with split(blocks):
        weights = [matrix(m) for n, m in linears(blocks, prefix).items() if n not in idle]
    embedding = model.get_input_embeddings()
    if why := families.no_projections(config, blocks):
        refused.setdefault("lora", why)
    return Facts(
        dtype=dtype_name(config.dtype or torch.float32),
        context=context_length(config),
        parameters=sum(p.numel() for p in model.parameters()),
        layers=len(blocks) or getattr(config.get_text_config(), "num_hidden_layers", 0),
        linear_parameters=sum(w.numel() for w in weights),
        in_features=tuple(sorted({w.shape[1] for w in weights})),
        vocab=embedding.num_embeddings,
        width=embedding.embedding_dim,
        refused=refused,
        needs_bos=families.needs_bos(config),
    )
