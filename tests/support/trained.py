"""A byte-level Llama that a session trains in seconds: compression really hurts it, and prompts really help."""

from pathlib import Path

import torch
from support.tinygrid import VOCAB, byte_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from ctp.data.packaged import documents

STEPS, PEAK = 250, 1e-2


def train(folder: Path) -> Path:
    """The model and its tokenizer in `folder`."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, bos_token_id=1, eos_token_id=2,
    ))  # fmt: skip
    text = windows("train", 3000)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK, total_steps=STEPS)
    for batch in torch.randint(len(text), (STEPS, 16), generator=torch.Generator().manual_seed(0)):
        model(input_ids=text[batch], labels=text[batch]).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def windows(split: str, count: int) -> torch.Tensor:
    """The first tokens of the text that the model is trained on: (count, 64)."""
    text = "\n\n".join(documents("pydoc", split))[: 64 * count]
    return torch.tensor(byte_tokenizer()(text, verbose=False)["input_ids"])[: 64 * count].view(count, 64)


def load(folder: Path) -> LlamaForCausalLM:
    """The trained model, fp32, to change at will."""
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def pruned(folder: Path, share: float = 0.5) -> LlamaForCausalLM:
    """The trained model with this share of the weights of every linear, the smallest, set to zero."""
    model = load(folder)
    with torch.no_grad():
        for name, layer in model.named_modules():
            if isinstance(layer, torch.nn.Linear) and ".layers." in name:
                w = layer.weight
                w[w.abs() < w.abs().flatten().quantile(share)] = 0
    return model
