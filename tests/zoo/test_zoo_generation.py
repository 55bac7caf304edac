"""Each model of the zoo: generating behind a prompt is generating behind the tokens that it stands for."""

import torch
from support.zoo import CLOSE, EVERY, FRONT, far, hard_prompt, logits, refuses, shared, windows

from ctp.recover.prompted import attach_prompt
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
    for cached in (True, False):
        tokens, scores = behind_prompt(cached)
        for row, start in enumerate((0, PADDING)):
            whole = torch.cat([torch.tensor(FRONT), ids[row, start:], tokens[row]])[None]
            wanted = logits(model, whole[:, :-1])[0, -NEW:]
            assert far(scores[row], wanted) < CLOSE, f"cached = {cached}, row {row}"
            assert torch.equal(wanted.argmax(-1), tokens[row])
