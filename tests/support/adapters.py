"""Adapters as people make them: by PEFT itself, with random weights."""

from pathlib import Path

import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model


def save_prompt(model, folder: Path, k: int = 4) -> Path:
    """A PEFT prompt of k rows in `folder`."""
    torch.manual_seed(3)
    width = model.get_input_embeddings().embedding_dim
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=k, token_dim=width)
    get_peft_model(model, config).save_pretrained(str(folder))
    return folder


def save_lora(model, folder: Path, **fields) -> Path:
    """A PEFT LoRA in `folder`, with a B that is not zero."""
    torch.manual_seed(4)
    made = get_peft_model(model, LoraConfig(**{"task_type": "CAUSAL_LM", "r": 3, "lora_dropout": 0.1, **fields}))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    made.save_pretrained(str(folder))
    return folder
