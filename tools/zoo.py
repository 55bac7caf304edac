"""Tiny random models of every architecture that ctp is checked on: a line each in `MODELS`.

The line has what differs from `COMMON`. Weights are large enough that logits depend on the whole text, so that a check
of one property by comparing logits can fail.
"""

import math
from dataclasses import dataclass, field
from typing import Any

VOCAB = 258  # ctp.models.tiny' byte tokenizer: 256 bytes, <eos>, <bos>
CONTEXT = 128  # tokens
WINDOW = 8  # tokens that sliding attention sees; a multiple of all chunks and local windows in the table
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "eos_token_id": 256,
    "bos_token_id": 257,
    "pad_token_id": None,
    "head_dim": 8,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_shared_experts": 1,
    "shared_expert_intermediate_size": 32,
    "first_k_dense_replace": 1,  # the first block has no experts
    "n_group": 1,
    "topk_group": 1,
}
LINEAR = ["linear_attention", "full_attention", "linear_attention"]
SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
LATENT: dict[str, Any] = {
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}
MAMBA2: dict[str, Any] = {
    "mamba_d_state": 8,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 8,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + i / 8 for i in range(4)],
    "long_factor": [2.0 + i for i in range(4)],
    "original_max_position_embeddings": 24,
    "factor": 4.0,
}


@dataclass(frozen=True)
class Model:
    """A line of the table. settings: of the configuration, above COMMON."""

    name: str
    type: str
    settings: dict[str, Any] = field(default_factory=dict)


def _m(name: str, type: str = "", **settings: Any) -> Model:
    return Model(name, type or name, settings)


MODELS: dict[str, Model] = {
    m.name: m
    for m in (
        _m("llama"),
        _m("llama-tied", "llama", tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
        _m("mistral", sliding_window=WINDOW),
        _m("ministral", layer_types=SLIDING, sliding_window=WINDOW),
        _m("ministral3"),
        _m("qwen2"),
        _m("qwen2-sliding", "qwen2", use_sliding_window=True, sliding_window=WINDOW, layer_types=SLIDING),
        _m("qwen3", head_dim=16),
        _m("gemma"),
        _m("gemma2", sliding_window=WINDOW, query_pre_attn_scalar=8),
        _m("gemma3", "gemma3_text", sliding_window=WINDOW, query_pre_attn_scalar=8, layer_types=SLIDING),
        _m("gemma3n", "gemma3n_text", num_hidden_layers=4, hidden_size_per_layer_input=32,
           vocab_size_per_layer_input=VOCAB, laurel_rank=32, altup_num_inputs=2, num_kv_shared_layers=0,
           layer_types=[*SLIDING, "full_attention"], sliding_window=WINDOW, activation_sparsity_pattern=[0.0] * 4),
        _m("gemma3-vision", "gemma3", text_config={"sliding_window": WINDOW, "query_pre_attn_scalar": 8,
           "layer_types": SLIDING}, vision_config={"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
           "num_attention_heads": 2, "image_size": 28, "patch_size": 14}, mm_tokens_per_image=1),
        _m("vaultgemma", sliding_window=WINDOW, query_pre_attn_scalar=8, layer_types=SLIDING),
        _m("phi", rope_parameters={**ROPE, "partial_rotary_factor": 0.5}),
        _m("phi3"),
        _m("phi3-longrope", "phi3", rope_parameters=LONGROPE, original_max_position_embeddings=24),
        _m("phimoe"),
        _m("opt", ffn_dim=64, dropout=0.0),
        _m("opt-projected", "opt", ffn_dim=64, dropout=0.0, word_embed_proj_dim=16, do_layer_norm_before=False),
        _m("bloom"),
        _m("falcon-rotary", "falcon", multi_query=True, parallel_attn=True, new_decoder_architecture=False),
        _m("falcon-alibi", "falcon", alibi=True, multi_query=False, parallel_attn=False, bias=True),
        _m("falcon-grouped", "falcon", new_decoder_architecture=True, num_kv_heads=2),
        _m("mpt", max_seq_len=CONTEXT, expansion_ratio=2),
        _m("gpt2"),
        _m("gpt_bigcode"),
        _m("gpt_neo", num_hidden_layers=4, attention_types=[[["global", "local"], 2]], window_size=WINDOW),
        _m("gpt_neox"),
        _m("gptj", rotary_dim=4, tie_word_embeddings=False),
        _m("codegen", rotary_dim=4, tie_word_embeddings=False),
        _m("xglm", ffn_dim=64, dropout=0.0),
        _m("biogpt"),
        _m("olmo"),
        _m("olmo2"),
        _m("olmo3", layer_types=SLIDING, sliding_window=WINDOW),
        _m("olmoe"),
        _m("granite", embedding_multiplier=2.0, logits_scaling=2.0, residual_multiplier=0.5, attention_multiplier=0.3),
        _m("granitemoe"),
        _m("cohere", logit_scale=0.5),
        _m("cohere2", logit_scale=0.5, layer_types=SLIDING, sliding_window=WINDOW),
        _m("smollm3", no_rope_layers=[1, 1, 0]),
        _m("starcoder2"),
        _m("stablelm"),
        _m("mixtral"),
        _m("qwen2_moe"),
        _m("qwen3_moe"),
        _m("gpt_oss", sliding_window=WINDOW, layer_types=SLIDING, rope_parameters=ROPE),
        _m("deepseek_v2", **LATENT, num_key_value_heads=4),
        _m("deepseek_v3", **LATENT, num_key_value_heads=4),
        _m("glm"),
        _m("glm4"),
        _m("glm4_moe"),
        _m("ernie4_5"),
        _m("ernie4_5_moe", moe_num_experts=4, moe_k=2, moe_num_shared_experts=1),
        _m("exaone4", layer_types=SLIDING, sliding_window=WINDOW, sliding_window_pattern=2),
        _m("nemotron"),
        _m("persimmon"),
        _m("llama4", "llama4_text", intermediate_size_mlp=64, moe_layers=[1],
           layer_types=["chunked_attention", "full_attention", "chunked_attention"], no_rope_layers=[1, 0, 1],
           attention_chunk_size=WINDOW),
        _m("helium"),
        _m("seed_oss"),
        _m("arcee"),
        _m("apertus"),
        _m("hunyuan", "hunyuan_v1_dense"),
        _m("dots1", layer_types=SLIDING, sliding_window=WINDOW),
        _m("modernbert-decoder", pad_token_id=0, local_attention=WINDOW, layer_types=SLIDING),
        _m("mamba", state_size=8),
        _m("mamba2", state_size=8, num_heads=8, head_dim=8, n_groups=1, chunk_size=8, expand=2),
        _m("falcon_mamba", state_size=8),
        _m("rwkv", attention_hidden_size=32),
        _m("xlstm", num_heads=4, num_blocks=3, chunk_size=8),
        _m("recurrent_gemma", num_key_value_heads=1, lru_width=32, attention_window_size=WINDOW),
        _m("jamba", attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1,
           mamba_d_state=8, mamba_dt_rank=32),
        _m("zamba2", num_hidden_layers=4, layers_block_type=["linear_attention", "hybrid"] * 2, num_mem_blocks=1,
           num_key_value_heads=4, mamba_d_state=8, n_mamba_heads=8, mamba_ngroups=1, chunk_size=8, use_mem_rope=True,
           adapter_rank=4),
        _m("bamba", **MAMBA2, attn_layer_indices=[1]),
        _m("falcon_h1", **MAMBA2, mamba_d_ssm=64),
        _m("granitemoehybrid", **MAMBA2, shared_intermediate_size=32, layer_types=LINEAR),
        _m("lfm2", layer_types=["conv", "full_attention", "conv"], block_auto_adjust_ff_dim=False),
        _m("nemotron_h", layers_block_type=["linear_attention", "full_attention", "mlp"], mamba_num_heads=8,
           mamba_head_dim=8, n_groups=1, ssm_state_size=8, chunk_size=8),
        _m("qwen3_next", layer_types=LINEAR, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8,
           linear_value_head_dim=8),
    )
}  # fmt: skip


def config(name: str) -> Any:
    """The transformers configuration of one of MODELS."""
    from transformers import AutoConfig

    model = MODELS[name]
    kind = type(AutoConfig.for_model(model.type))
    common = {n: v for n, v in COMMON.items() if n not in model.settings and _known(kind, n)}
    settings = dict(model.settings)
    for inner in ("text_config", "vision_config"):
        if inner in settings:
            settings[inner] = (COMMON if inner == "text_config" else {}) | settings[inner]
    return kind(**common, **settings)


def _known(kind: Any, name: str) -> bool:
    import inspect

    return name in inspect.signature(kind.__init__).parameters or name in getattr(kind, "attribute_map", {})


def build(name: str, seed: int = 0, **changes: Any) -> Any:
    """The model, float32, in evaluation mode, its weights large. changes: of the configuration."""
    import torch
    from transformers import AutoModelForCausalLM

    settings = config(name)
    for key, value in changes.items():
        setattr(settings.get_text_config(), key, value)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(settings, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter, values in model.named_parameters():
            noise = torch.randn(values.shape, generator=generator)
            if values.dim() < 2:
                values.add_(noise, alpha=0.05)
            elif "embed" in parameter or "wte" in parameter:
                values.add_(noise, alpha=0.3)
            else:
                values.add_(noise, alpha=1.2 / math.sqrt(values.shape[-1]))
    return model
