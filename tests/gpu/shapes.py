"""Models of LLaMA-7B's width with random weights, made on the GPU."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

WIDTH, INNER, VOCAB = 4096, 11008, 32000


def llama(layers: int = 2, dtype: torch.dtype = torch.float16, kv_heads: int = 32):
    return _on_gpu(LlamaForCausalLM, LlamaConfig(
        num_hidden_layers=layers, num_key_value_heads=kv_heads, max_position_embeddings=2048, dtype=dtype
    ))  # fmt: skip


def qwen3(layers: int = 2, dtype: torch.dtype = torch.bfloat16):
    """Grouped heads, norms of queries and keys: a block that is not LLaMA's."""
    return _on_gpu(Qwen3ForCausalLM, Qwen3Config(
        vocab_size=VOCAB, hidden_size=2048, intermediate_size=6144, num_hidden_layers=layers, num_attention_heads=16,
        num_key_value_heads=8, head_dim=128, dtype=dtype,
    ))  # fmt: skip


def _on_gpu(kind, config):
    torch.manual_seed(0)
    torch.set_default_dtype(config.dtype)
    try:
        with torch.device("cuda"):
            return kind(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(torch.float32)


def windows(n: int, s: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(VOCAB, (n, s), generator=torch.Generator().manual_seed(seed))
