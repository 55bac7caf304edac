"""A tiny Llama as llama.cpp's tools write it: their names, their order of rows, their block formats."""

from pathlib import Path

import gguf
import numpy as np
from gguf.quants import quantize
from support.tiny import tiny_llama
from support.tinygrid import VOCAB, byte_tokenizer

NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def write_gguf(path: Path, quant: str = "Q4_0", without: str = "") -> Path:
    """Hidden size 64, two layers, byte tokens; linears of the blocks in the format `quant`."""
    model = tiny_llama(vocab=VOCAB, hidden=64)
    writer, config = gguf.GGUFWriter(path, "llama"), model.config
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(VOCAB)
    tokens = byte_tokenizer().convert_ids_to_tokens(range(VOCAB))
    tokens[-2] = tokens[0] + tokens[1]  # transformers asks for a merge, gguf for one at least
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_merges([f"{tokens[0]} {tokens[1]}"])
    writer.add_eos_token_id(VOCAB - 1)
    writer.add_bos_token_id(VOCAB - 1)
    for name, tensor in model.state_dict().items():
        module, _, _ = name.rpartition(".")
        if name == without:
            continue
        values = tensor.numpy()
        if module in WHOLE:
            writer.add_tensor(f"{WHOLE[module]}.weight", values)
            continue
        _, _, block, own = module.split(".", 3)
        heads = {"self_attn.q_proj": 4, "self_attn.k_proj": 2}.get(own)
        if heads:  # rows as llama.cpp's rotation wants them
            values = values.reshape(heads, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        as_gguf = f"blk.{block}.{NAMES[own]}.weight"
        if values.ndim == 1:
            writer.add_tensor(as_gguf, values)
        else:
            kind = gguf.GGMLQuantizationType[quant]
            writer.add_tensor(as_gguf, quantize(np.ascontiguousarray(values), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
