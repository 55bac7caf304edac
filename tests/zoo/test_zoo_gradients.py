"""Each model of the zoo: what is learned from is the gradient of the model's own loss, for every window by itself."""

import pytest
import torch
import torch.nn.functional as F
from support.zoo import EVERY, refuses, shared, tokenizer, windows

import ctp
from ctp.cells import LoRA
from ctp.learning.lora import injected, learn_lora
from ctp.learning.objective import choose
from ctp.prompts.attach import frozen

# Gradients are sums over all windows, whose terms cancel in part: relative to the gradient's length.
EXACT = 1e-3
TEXT = {"dataset": "d", "split": "train", "seq_len": 24}
PROMPT = {"k": 4, "batch": 4, "steps": 1}


def gradients(model, text, parameters, prompt, recompute):
    """(loss, gradient of all parameters) of the objective that learning chooses, `text` (n, s) as one batch."""
    objective = choose(model, text, prompt, recompute)
    with objective.active():
        loss = objective.nll(text, prompt)
        found = torch.autograd.grad(loss, parameters)
    return loss.item(), torch.cat([g.flatten() for g in found])


def plain(model, text, parameters, prompt):
    """The same by the model's own forward pass, a window at a time."""
    total = torch.zeros(())
    for window in text:
        rows = model.get_input_embeddings()(window[:-1])
        given = (
            {"input_ids": window[None, :-1]} if prompt is None else {"inputs_embeds": torch.cat([prompt, rows])[None]}
        )
        scores = model(**given, use_cache=False).logits[0, -len(rows) :]
        total = total + F.cross_entropy(scores, window[1:], reduction="sum")
    return total.item(), torch.cat([g.flatten() for g in torch.autograd.grad(total, parameters)])


def check(model, parameters, prompt):
    text = windows(4, 24)
    wanted, exact = plain(model, text, parameters, prompt)
    for recompute in (False, True):
        loss, found = gradients(model, text, parameters, prompt, recompute)
        assert loss == pytest.approx(wanted, rel=1e-5)
        assert float((found - exact).norm() / exact.norm()) < EXACT


@EVERY
def test_prompt(name):
    model = shared(name)
    if refuses(name, "prompt", lambda: ctp.learn_prompt(model, tokenizer(), windows(20, 24), **PROMPT)):
        return
    width = model.get_input_embeddings().embedding_dim
    prompt = torch.nn.Parameter(0.3 * torch.randn(4, width, generator=torch.Generator().manual_seed(2)))
    with frozen(model):
        check(model, [prompt], prompt)


@EVERY
def test_lora(name):
    model, spec = shared(name), LoRA(r=2, text=TEXT, steps=1, batch=4, dropout=0)
    if refuses(name, "lora", lambda: learn_lora(model, windows(8, 24), windows(2, 24), spec)):
        return
    with injected(model, spec) as trainable:
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for matrix, values in trainable.parameters.items():
                if matrix.endswith("lora_B"):  # 0 at the start, where A has no gradient
                    values.copy_(0.3 * torch.randn(values.shape, generator=generator))
        check(model, list(trainable.parameters.values()), None)
