"""Learning through weights that stay packed: the same numbers from less memory."""

import pytest
import torch
from support.tiny import random_windows, tiny_bloom, tiny_llama, tiny_opt
from torch import nn

from ctp.cells import GPTQ, SparseGPT
from ctp.compression.walk import compress_model
from ctp.formats.artifact import Compressed
from ctp.learning.objective import choose
from ctp.prompts.attach import frozen, scored_logits

METHODS = [GPTQ(bits=4, group_size=8, act_order=True), SparseGPT(sparsity=0.5, bits=3), SparseGPT(sparsity=0.5)]


@pytest.mark.parametrize("make", [tiny_llama, tiny_opt, tiny_bloom])
@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.label)
def test_logits_and_gradient_are_those_of_the_unpacked_model(make, method):
    model, windows = make(), random_windows(3, 12)
    small = Compressed.of(model, compress_model(model, random_windows(4, 16), method), None)
    dense, packed = small.model(), small.model(packed=True)
    assert not any(isinstance(m, nn.Linear) for n, m in packed.named_modules() if "head" not in n)
    assert torch.equal(scored_logits(packed, windows), scored_logits(dense, windows))
    gradients = []
    for each in (dense, packed):
        prompt = nn.Parameter(each.get_input_embeddings().weight[:5].detach().clone())
        with frozen(each), torch.autocast("cpu", torch.bfloat16):
            ours = choose(each, windows, prompt)
            with ours.active():
                ours.nll(windows, prompt).backward()
        gradients.append(prompt.grad)
    assert torch.equal(*gradients)


def test_it_takes_the_packed_bytes():
    model = tiny_llama(hidden=64)
    small = Compressed.of(model, compress_model(model, random_windows(4, 16), GPTQ(bits=4)), None)
    sizes = [sum(t.nbytes for t in (*m.parameters(), *m.buffers())) for m in (small.model(), small.model(packed=True))]
    stats = small.stats()
    assert sizes[0] - sizes[1] == pytest.approx(stats["dense_bytes"] - stats["packed_bytes"], rel=0.01)
