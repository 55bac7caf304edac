"""A soft prompt attached to a Hugging Face causal LM, which is then called, and generates, as before.

The k rows stand between the left padding and the first token of every input. The caller's tokens, mask, positions,
labels and logits do not count them; caches, hidden states and attentions have k positions more.
"""

import inspect
import itertools
from functools import partial, update_wrapper
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.generation.configuration_utils import GenerationConfig, GenerationMode

from ctp.architectures import families
from ctp.machine.memory import ran_out
from ctp.prompts.agreement import body_states, mostly, read, spread_tokens
from ctp.prompts.attach import check_context, check_readable, check_shape, frozen
from ctp.prompts.files import LearnedPrompt
from ctp.prompts.prefix import stretched, with_prompt

IGNORED = -100  # the label that transformers' losses leave out
HANDLE = "_attached_prompt"  # a model's attribute, its handle
MARK = "_soft_prompt"  # a cache's: number of the handle whose prompt it holds, tokens of the call that put it there
MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE, GenerationMode.BEAM_SEARCH, GenerationMode.BEAM_SAMPLE)
# `generate` calls the second when every setting is resolved and nothing is computed yet, the third for a paged cache.
# Replaced on the instance, not hooked: PEFT and accelerate call `model.forward` itself, which bypasses hooks.
REPLACED = ("forward", "_prepare_cache_for_generation", "generate_batch")
PADDING = 3  # tokens of it that are tried
_numbers = itertools.count(1)
_padded: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()


def reads_padded(model: PreTrainedModel) -> bool:
    """Does the model read, and go on from, text behind masked padding as it reads the text alone? Tried once a model.

    It does not where positions are counted without the mask.
    """
    if model not in _padded:
        with frozen(model), torch.no_grad():
            try:
                _padded[model] = _tried_padded(model)
            except Exception as e:  # no mask, or other arguments than these
                if ran_out(e):
                    raise
                _padded[model] = False
    return _padded[model]


def _tried_padded(model: PreTrainedModel) -> bool:
    ids = spread_tokens(model)
    mask = torch.cat([torch.zeros_like(ids[:, :PADDING]), torch.ones_like(ids)], dim=1)
    padded = {"input_ids": torch.cat([ids[:, :PADDING], ids], dim=1), "attention_mask": mask}
    if "position_ids" in inspect.signature(model.forward).parameters:
        padded["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    wanted = body_states(model, input_ids=ids, use_cache=False)
    if not mostly(model, body_states(model, **padded, use_cache=False)[:, PADDING:], wanted):
        return False
    cache = read(model, **{n: t[:, :-1] for n, t in padded.items()}, use_cache=True).get("past_key_values")
    if not isinstance(cache, DynamicCache):
        return True
    step = {n: t if n == "attention_mask" else t[:, -1:] for n, t in padded.items()}
    return mostly(model, body_states(model, **step, past_key_values=cache, use_cache=True), wanted[:, -1:])


def attach_prompt(model: PreTrainedModel, prompt: Tensor | LearnedPrompt) -> "AttachedPrompt":
    """Put the prompt, rows (k, d) or what `learn` gave, in front of all that `model` reads, until `remove()`.

    `model(input_ids, attention_mask=…, labels=…)` gives the logits of the given tokens, and the mean loss over the
    labels but each row's first. `model.generate` works greedily, by sampling and by beams, with left padding, with and
    without a cache; `max_length` counts tokens only. `save_pretrained` saves the model without the prompt.

    Raises ValueError if the prompt does not fit, or one is attached already. The model then raises it for what cannot
    work: `inputs_embeds`, a mask that is not (b, tokens), a cache that is not dynamic or was filled without this
    prompt, `generate` from a filled cache, assisted decoding, k + tokens beyond the context.
    """
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"a prompt is attached to a transformers.PreTrainedModel, not to a {type(model).__name__}")
    if hasattr(model, HANDLE):
        raise ValueError("the model has a prompt already: remove() that one first")
    families.check(model.config, "generate")
    lacking = [n for n in families.ATTACHED if n not in inspect.signature(model.forward).parameters]
    if lacking or not all(hasattr(model, name) for name in REPLACED):
        raise ValueError(f"{type(model).__name__} cannot have a prompt attached: it does not generate, or its forward "
                         f"lacks one of {', '.join(families.ATTACHED)}")  # fmt: skip
    check_readable(model)
    if isinstance(prompt, LearnedPrompt):
        prompt = prompt.embeddings
    check_shape(model, prompt)
    if not prompt.is_floating_point() or not bool(torch.isfinite(prompt).all()):
        raise ValueError("a prompt's rows must be finite floating-point numbers")
    return AttachedPrompt(model, prompt)


class AttachedPrompt:
    """A prompt in front of a model, made by `attach_prompt`; `remove` takes it off."""

    def __init__(self, model: PreTrainedModel, prompt: Tensor) -> None:
        self._model, self._prompt, self._k, self._number = model, prompt, len(prompt), next(_numbers)
        self._padded = reads_padded(model)  # tried while the model is still called as its class says
        self._plain, self._plain_cache, _ = (getattr(model, name) for name in REPLACED)
        self._before = {name: vars(model).get(name) for name in (*REPLACED, HANDLE)}
        self._parameters = tuple(inspect.signature(self._plain).parameters)
        for name, ours in zip(REPLACED, (self._forward, self._prepare_cache, self._refuse_batch), strict=True):
            # `generate` reads forward's signature. A partial: a deep copy of the model gets a handle of its own.
            setattr(model, name, update_wrapper(partial(ours), getattr(model, name)))
        setattr(model, HANDLE, self)

    def __enter__(self) -> "AttachedPrompt":
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Give the model back as it was; a second call does nothing."""
        if getattr(self._model, HANDLE, None) is not self:
            return
        for name, before in self._before.items():
            if before is None:
                delattr(self._model, name)
            else:
                setattr(self._model, name, before)

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        given = dict(zip(self._parameters, args, strict=False)) | kwargs
        filled = self._check(given)
        output = self._plain(**self._prompted(given, filled))
        for part in output.values() if isinstance(output, dict) else output:
            if isinstance(part, Cache) and not filled:
                setattr(part, MARK, (self._number, given["input_ids"].shape[1]))
        return output

    def _prepare_cache(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], mode: Any, *args: Any
    ) -> Any:
        """Refuse what cannot work before anything is computed; then as the model does."""
        tokens, length = generation_config.max_length, self._k + generation_config.max_length
        check_context(self._model, length, f"{self._k} prompt rows + input and new tokens ({tokens})")
        if mode not in MODES or generation_config.is_assistant:
            allowed = ", ".join(m.value for m in MODES)
            raise ValueError(f"{mode.value} does not work behind a soft prompt; allowed: {allowed}")
        if generation_config.cache_implementation not in (None, "dynamic"):
            given = f"cache_implementation = {generation_config.cache_implementation!r}"
            raise ValueError(f"{given} does not work behind a soft prompt; allowed: 'dynamic', or use_cache=False")
        cache, mask = model_kwargs.get("past_key_values"), model_kwargs.get("attention_mask")
        if cache is not None and cache.get_seq_length():
            raise ValueError("generate cannot go on from a filled cache behind a soft prompt: give all tokens")
        config, begun = self._model.config, self._k if mask is None else self._k + int(mask.sum(-1).max())
        if stretched(config, length) and not stretched(config, begun):
            generation_config.use_cache = False  # what is cached was rotated by other angles than what follows
        return self._plain_cache(generation_config, model_kwargs, mode, *args)

    def _refuse_batch(self, *args: Any, **kwargs: Any) -> Any:
        raise ValueError("continuous batching (a paged cache) does not work behind a soft prompt: use generate")

    def _prompted(self, given: dict[str, Any], filled: int) -> dict[str, Any]:
        """The arguments of the plain forward pass."""
        given = dict(given)
        mask, positions = given.get("attention_mask"), given.get("position_ids")
        padding = None
        if mask is not None:
            first = getattr(given["past_key_values"], MARK)[1] if filled else mask.shape[1]
            # No further than the first call reached: a long padding may have been read in several (chunked prefill).
            padding = (mask.cumsum(-1) == 0).sum(-1, keepdim=True).clamp(max=first)
            if not filled and bool(padding.any()) and not self._padded:
                raise ValueError(f"{type(self._model).__name__} does not read padded text as it reads the text alone: "
                                 "give it rows of one length behind a soft prompt")  # fmt: skip
            mask = given["attention_mask"] = _insert(mask.new_ones(len(mask), self._k), mask, padding)
        if positions is not None and "position_ids" in self._parameters:
            positions = positions.expand(len(given["input_ids"]), -1) + self._k
            front = torch.arange(self._k, device=positions.device).expand(len(positions), -1)
            given["position_ids"] = positions if filled else _insert(front, positions, padding)
        elif mask is not None and padding is not None and bool(padding.any()) and "position_ids" in self._parameters:
            # BLOOM's positions come from the mask. Without padding a model's own are right, wherever they begin.
            given["position_ids"] = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, filled:]
        return given if filled else given | self._beginning(given, padding)

    def _beginning(self, given: dict[str, Any], padding: Tensor | None) -> dict[str, Any]:
        """The arguments that differ at the beginning, where the prompt itself is read."""
        ids, labels = given["input_ids"], given.get("labels")
        rows = with_prompt(self._model, ids, self._prompt)
        new = {"input_ids": None, "inputs_embeds": _insert(rows[:, : self._k], rows[:, self._k :], padding)}
        tokens = ids.shape[1]
        new["logits_to_keep"] = min(given.get("logits_to_keep") or tokens, tokens)
        if labels is not None and padding is not None:  # without padding the loss leaves the first label out itself
            new["labels"] = labels.scatter(1, padding.clamp(max=tokens - 1).to(labels.device), IGNORED)
        return new

    def _check(self, given: dict[str, Any]) -> int:
        """How many positions the cache holds, the prompt's included. Raises ValueError for what cannot work."""
        ids, mask, cache = given.get("input_ids"), given.get("attention_mask"), given.get("past_key_values")
        if given.get("inputs_embeds") is not None or ids is None or ids.dim() != 2 or ids.shape[1] == 0:
            raise ValueError("behind a soft prompt the model takes input_ids (b, tokens > 0) and no inputs_embeds")
        if "cache" in given or not isinstance(cache, DynamicCache | None):
            kind = "a paged cache" if "cache" in given else f"a {type(cache).__name__}"
            raise ValueError(f"{kind} does not work behind a soft prompt; allowed: DynamicCache")
        filled = 0 if cache is None else cache.get_seq_length()
        if filled and getattr(cache, MARK, (None,))[0] != self._number:
            raise ValueError("past_key_values was filled without this soft prompt: start again from an empty cache")
        if not isinstance(given.get("logits_to_keep", 0), int):
            raise ValueError("logits_to_keep must be a number of tokens behind a soft prompt, not positions or a mask")
        tokens = filled + ids.shape[1] - (self._k if filled else 0)
        if mask is not None and (not isinstance(mask, Tensor) or tuple(mask.shape) != (len(ids), tokens)):
            shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            wanted = f"({len(ids)}, {tokens})"
            raise ValueError(f"attention_mask {shape}: must be {wanted}, what is cached included, no prompt")
        check_context(self._model, self._k + tokens, f"{self._k} prompt rows + {tokens} tokens")
        return filled


def _insert(front: Tensor, back: Tensor, padding: Tensor | None) -> Tensor:
    """`front` (b, k, …) put into `back` (b, n, …) behind its first `padding` (b, 1) positions: (b, k + n, …)."""
    rows = torch.cat([front, back], dim=1)
    if padding is None:
        return rows
    k, place = front.shape[1], torch.arange(rows.shape[1], device=rows.device)
    start = padding.to(rows.device)
    source = torch.where(place < start, place + k, torch.where(place < start + k, place - start, place))
    return rows[torch.arange(len(rows), device=rows.device)[:, None], source]
