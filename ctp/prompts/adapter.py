"""PEFT adapters, soft prompts and LoRA, applied to a model and taken off again."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ctp.models.adapters import ADAPTER, CONFIG, AdapterFacts, _tensors, adapter_facts

if TYPE_CHECKING:  # torch and transformers take seconds
    from torch import Tensor
    from transformers import PreTrainedModel


@contextmanager
def applied(model: "PreTrainedModel", folder: str | Path) -> "Iterator[Tensor | None]":
    """The model with the adapter: yields a soft prompt (k, d) in fp32, to be put in front, or None with LoRA injected.

    LoRA is taken off on the way out: the same modules, flags and weights as before. Inside, the model is in evaluation
    mode and frozen. Raises ValueError if the adapter does not fit the model.
    """
    from ctp.prompts.attach import frozen

    facts = adapter_facts(folder)
    if facts.kind == "prompt":
        yield prompt_rows(folder, facts)
        return
    with frozen(model), _lora(model, Path(folder)):
        yield None


def prompt_rows(folder: str | Path, facts: AdapterFacts) -> "Tensor":
    """The prompt (k, d) of an adapter in fp32. Raises ValueError if its configuration says other sizes."""
    from ctp.prompts.files import load_prompt

    prompt = load_prompt(folder)
    if tuple(prompt.shape) != (facts.k, facts.width):
        raise ValueError(f"{ADAPTER} holds a prompt {tuple(prompt.shape)}; {CONFIG} says {facts.k} x {facts.width}")
    return prompt


def attach_adapter(model: "PreTrainedModel", folder: str | Path) -> Any:
    """The model with the adapter for good: itself with a soft prompt attached, or a PeftModel around it with LoRA.

    Raises ValueError as `applied` does.
    """
    from peft import PeftModel

    from ctp.prompts.attached import attach_prompt

    with applied(model, folder) as prompt:
        pass  # it fits
    if prompt is not None:
        attach_prompt(model, prompt)
        return model
    return PeftModel.from_pretrained(model, str(folder), torch_device=str(model.device))


@contextmanager
def _lora(model: "PreTrainedModel", folder: Path) -> Iterator[None]:
    from peft import PeftModel, get_peft_model_state_dict

    stored = _tensors(folder)
    if other := sorted(name for name in stored if "lora_" not in name):  # PEFT would write it into the model's own
        raise ValueError(f"{ADAPTER} in {folder} holds {other[0]}, allowed: LoRA's tensors only")
    with restored(model):
        try:
            injected = PeftModel.from_pretrained(model, str(folder), torch_device=str(model.device))
        except (ValueError, RuntimeError) as e:  # no such layer, or a layer of another size
            raise ValueError(f"the LoRA in {folder} does not fit the model: {' '.join(str(e).split())}") from e
        # PEFT itself passes over tensors without a layer, and layers without a tensor: half an adapter, silently.
        odd = sorted(stored.keys() ^ get_peft_model_state_dict(injected, save_embedding_layers=False).keys())
        if odd:
            raise ValueError(f"the LoRA in {folder} does not fit the model: {odd[0]} and {len(odd) - 1} more tensors "
                             "are only in one of them")  # fmt: skip
        yield


@contextmanager
def restored(model: "PreTrainedModel") -> Iterator[None]:
    """Every module gets back its children and loses new attributes: more than PEFT's unload, and on failure too."""
    before = [(module, dict(module._modules), set(vars(module))) for module in model.modules()]
    try:
        yield
    finally:
        for module, children, names in before:
            module._modules.clear()
            module._modules.update(children)
            for name in set(vars(module)) - names:
                delattr(module, name)
