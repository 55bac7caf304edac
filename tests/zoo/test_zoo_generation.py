"""Each model of the zoo: generating behind a prompt is generating behind the tokens that it stands for, in a batch with
padding on the left, with a cache and without; and the same as by a forward pass of each text alone.

A model whose positions depend on the longest text of a batch (longrope) reads shorter ones otherwise than alone, with a
prompt or without: of these the longest is compared.
"""

import torch
from support.zoo import CLOSE, EVERY, FRONT, far, hard_prompt, logits, refuses, shared, windows

from ctp.prompts.attached import attach_prompt
from ctp.prompts.prefix import stretched
from tools.zoo import WINDOW

NEW = WINDOW + 4  # more than sliding attention sees
PADDING = 3


def generated(model, ids, mask, cached):
    """(tokens (b, NEW), their logits (b, NEW, V))."""
    made = model.generate(
        input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=NEW, eos_token_id=None, pad_token_id=0,
        use_cache=cached, return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    return made.sequences[:, ids.shape[1] :], torch.stack(made.logits, 1)


@EVERY
def test_generation(name):
    model, ids = shared(name), windows(2, 9)
    mask = torch.ones_like(ids)
    mask[1, :PADDING] = 0

    def behind_prompt(cached):
        handle = attach_prompt(model, hard_prompt(model))
        try:
            return generated(model, ids, mask, cached)
        finally:
            handle.remove()

    if refuses(name, "generate", lambda: behind_prompt(True)):
        return
    text = torch.stack([with_front(ids[0], 0), with_front(ids[1], PADDING)])
    longer = torch.cat([mask, mask.new_ones(2, len(FRONT))], 1)
    for cached in (True, False):
        tokens, scores = behind_prompt(cached)
        same, wanted = generated(model, text, longer, cached)
        assert far(scores, wanted) < CLOSE, f"cached = {cached}"
        assert torch.equal(tokens, same)
    if stretched(model.config, 1000):
        whole = torch.cat([text, tokens], 1)[:1]
        alone = [logits(model, whole[:, : i - NEW])[0, -1] for i in range(NEW)]
        assert far(scores[0], torch.stack(alone)) < CLOSE
        return
    for row, start in enumerate((0, PADDING)):
        whole = torch.cat([text[row, start:], tokens[row, :-1]])[None]
        assert far(scores[row], logits(model, whole)[0, -NEW:]) < CLOSE, f"row {row} alone"


def with_front(ids, padding):
    """The tokens with FRONT behind their padding."""
    return torch.cat([ids[:padding], torch.tensor(FRONT), ids[padding:]])
