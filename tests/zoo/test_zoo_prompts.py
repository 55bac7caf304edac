"""Each model of the zoo: a prompt of the embeddings of some tokens is these tokens really in front."""

import pytest
import torch
from lm_eval.api.instance import Instance
from support.zoo import CLOSE, EVERY, FRONT, behind, far, hard_prompt, refuses, shared, tokenizer, windows

from ctp.evaluation.harness import SoftPromptLM
from ctp.evaluation.perplexity import perplexity
from ctp.prompts.attached import attach_prompt

ASKED = [("Once upon a time", " there was"), ("A", " b")]


@EVERY
def test_perplexity(name):
    model, text = shared(name), windows(3, 24)
    rows = hard_prompt(model)
    if refuses(name, "prompt", lambda: perplexity(model, text, rows)):
        return
    wanted = behind(model, text[:, :-1]).double().log_softmax(-1).gather(2, text[:, 1:, None])
    assert perplexity(model, text, rows, batch=2).nll_sum == pytest.approx(-wanted.sum().item(), rel=CLOSE)


@EVERY
def test_attached_model(name):
    model, text = shared(name), windows(3, 24)
    for use in ("prompt", "generate"):  # an attached model is one that generates
        if refuses(name, use, lambda: attach_prompt(model, hard_prompt(model))):
            return
    handle = attach_prompt(model, hard_prompt(model))
    try:
        with torch.no_grad():
            found = model(input_ids=text).logits
    finally:
        handle.remove()
    assert far(found, behind(model, text)) < CLOSE


@EVERY
def test_task(name):
    model, words = shared(name), tokenizer()
    rows = hard_prompt(model)
    requests = [Instance("loglikelihood", {}, arguments, i) for i, arguments in enumerate(ASKED)]

    def score():
        lm = SoftPromptLM(model, words, rows, batch=2)
        return [found for found, _ in lm.loglikelihood(requests, disable_tqdm=True)]

    if refuses(name, "prompt", score):
        return
    wanted = []
    for context, answer in ASKED:
        ids, whole = (torch.tensor([words(t)["input_ids"]]) for t in (context, context + answer))
        answered = whole[:, ids.shape[1] :]
        scores = behind(model, whole[:, :-1])[:, ids.shape[1] - 1 :].double().log_softmax(-1)
        wanted.append(scores.gather(2, answered[:, :, None]).sum().item())
    assert score() == pytest.approx(wanted, rel=5 * CLOSE)
    assert len(FRONT) == len(rows)
