"""Tiny random models of each architecture: random weights, real code paths."""

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

torch.set_num_threads(1)  # threads cost such small models more than they bring, and change sums in the last digit


def tiny_llama(
    vocab: int = 61, hidden: int = 32, layers: int = 2, context: int = 64, seed: int = 0
) -> LlamaForCausalLM:
    """Grouped keys and values, untied head."""
    torch.manual_seed(seed)
    return _spread(LlamaForCausalLM(LlamaConfig(**_grouped(vocab, hidden, layers, context))))


def _grouped(vocab: int, hidden: int, layers: int, context: int) -> dict[str, int]:
    """What the configurations of Llama and Mixtral share."""
    return {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": context,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def tiny_opt(
    vocab: int = 61, hidden: int = 32, layers: int = 2, context: int = 64, seed: int = 0, embed: int | None = None
) -> OPTForCausalLM:
    """Tied head; `embed` is word_embed_proj_dim where it differs from the hidden size, as in OPT-350M."""
    torch.manual_seed(seed)
    config = OPTConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        ffn_dim=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=context,
        word_embed_proj_dim=embed or hidden,
        dropout=0.1,
        bos_token_id=2,
        eos_token_id=2,
        pad_token_id=1,
    )
    return _spread(OPTForCausalLM(config))


def tiny_bloom(vocab: int = 61, hidden: int = 32, layers: int = 2, seed: int = 0) -> BloomForCausalLM:
    """ALiBi, fused query_key_value, tied head."""
    torch.manual_seed(seed)
    config = BloomConfig(vocab_size=vocab, hidden_size=hidden, n_layer=layers, n_head=4, bos_token_id=1, eos_token_id=2)
    return _spread(BloomForCausalLM(config))


def tiny_qwen2(vocab: int = 61, hidden: int = 32, layers: int = 2, seed: int = 0) -> Qwen2ForCausalLM:
    """As Llama, with biases of queries, keys and values that are not 0."""
    torch.manual_seed(seed)
    model = _spread(Qwen2ForCausalLM(Qwen2Config(**_grouped(vocab, hidden, layers, 64))))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                p.normal_()
    return model


def tiny_mixtral(
    vocab: int = 61, hidden: int = 32, layers: int = 2, seed: int = 0, intermediate: int = 64
) -> MixtralForCausalLM:
    """A mixture of four experts, held as 3-D parameters."""
    torch.manual_seed(seed)
    shape = _grouped(vocab, hidden, layers, 64) | {"intermediate_size": intermediate}
    config = MixtralConfig(**shape, num_local_experts=4)
    return _spread(MixtralForCausalLM(config))


_MOE: dict[str, dict] = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8},
    "gpt_oss": {
        "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "deepseek_v3": {
        "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
        "n_shared_experts": 1, "moe_intermediate_size": 16, "q_lora_rank": None, "kv_lora_rank": 16,
        "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16, "num_key_value_heads": 4,
    },
}  # fmt: skip


def tiny_moe(kind: str, vocab: int = 61, hidden: int = 32, layers: int = 2, seed: int = 0, **changes):
    """A mixture of four experts, two a token, whose biases are not 0: one of _MOE."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(kind, **_grouped(vocab, hidden, layers, 64) | _MOE[kind] | changes)
    model = _spread(AutoModelForCausalLM.from_config(config))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 3 or (name.endswith("bias") and "router" not in name):
                p.normal_(std=0.2)
    return model


def _spread(model):
    """Weights five times as large as at initialisation: logits that depend on what is read."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 2 and "norm" not in name:
                p.mul_(5)
    return model.eval()


def random_windows(n: int, s: int, vocab: int = 61, seed: int = 0) -> torch.Tensor:
    """Token windows (n, s), reproducible."""
    return torch.randint(vocab, (n, s), generator=torch.Generator().manual_seed(seed))


PLAIN = {  # architectures whose head is a matrix and whose past is keys and values
    "opt": tiny_opt,
    "opt_projected": lambda: tiny_opt(embed=16),
    "llama": tiny_llama,
    "bloom": tiny_bloom,
    "mixtral": tiny_mixtral,
}
