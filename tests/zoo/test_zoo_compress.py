"""Each model of the zoo: compressed on the inputs that its blocks have, stored and exported without a loss."""

import copy
import re

import pytest
import torch
from support.zoo import CLOSE, EVERY, far, logits, refuses, shared, tokenizer, windows
from transformers import AutoModelForCausalLM

import ctp
from ctp.architectures.blocks import decoder_blocks
from ctp.formats import FORMATS
from ctp.formats.artifact import Compressed
from ctp.formats.loaders import refusals
from tools.zoo import config

TEXT = windows(4, 24)


class Calls:
    """What each block was called with last on all windows."""

    def __init__(self, model):
        self.blocks = list(decoder_blocks(model)[1])
        self.inputs, self.arguments = {}, {}
        self.handles = [b.register_forward_pre_hook(self.keep, with_kwargs=True) for b in self.blocks]

    def keep(self, block, args, kwargs):
        hidden = args[0] if args else kwargs["hidden_states"]
        if TEXT.shape in (hidden.shape[:2], hidden.shape[1:3]):  # else a few tokens of it, or a few windows
            self.inputs[block], self.arguments[block] = hidden.clone(), (args, kwargs)

    def remove(self):
        for handle in self.handles:
            handle.remove()
        return self


def check_inputs(model, walked):
    """Every block's inputs in the walk, and what it makes of them, are those of the compressed model itself."""
    outputs = {}
    own = Calls(model)
    handles = [b.register_forward_hook(lambda b, _, out: outputs.update({b: first(out)})) for b in own.blocks]
    logits(model, TEXT)
    own.remove()
    for handle in handles:
        handle.remove()
    for i, block in enumerate(own.blocks):
        assert far(walked.inputs[block], own.inputs[block]) < CLOSE, f"inputs of block {i}"
        args, kwargs = walked.arguments[block]
        with torch.no_grad():
            again = first(block(*args, **kwargs))
        assert far(again, outputs[block]) < CLOSE, f"arguments of block {i}"


def first(out):
    return out[0] if isinstance(out, tuple) else out


def check_exports(name, small, wanted, folder):
    refused = refusals(config(name))
    for format in FORMATS:
        if format in refused:
            with pytest.raises(ValueError, match=re.escape(refused[format])):
                ctp.export(small, folder / format, format)
            assert not (folder / format).exists()
            continue
        ctp.export(small, folder / format, format)
        if format != "hf":
            assert torch.equal(logits(ctp.load(folder / format)[0], TEXT), wanted), format
        if format != "gptq":  # what opens that is another package's: tests/foreign
            theirs = AutoModelForCausalLM.from_pretrained(folder / format, dtype="auto").eval()
            assert far(logits(theirs, TEXT), wanted) < CLOSE, format


def check(name, method, folder):
    """The compressed model and what it gives, or None where compressing is refused as planned."""
    if refuses(name, "compress", lambda: ctp.compress(shared(name), tokenizer(), method, TEXT)):
        return None
    model = copy.deepcopy(shared(name))
    walked = Calls(model)
    small = ctp.compress(model, tokenizer(), method, TEXT)
    check_inputs(model, walked.remove())
    wanted = logits(model, TEXT)
    small.save(folder)
    assert torch.equal(logits(Compressed.open(folder).model(), TEXT), wanted)
    return small, wanted


@EVERY
def test_gptq(name, tmp_path):
    if made := check(name, {"method": "gptq", "bits": 4, "sym": True}, tmp_path / "stored"):
        check_exports(name, *made, tmp_path)


# Both methods walk a model alike, and solve for matrices: one model of each kind of matrix and block does.
@pytest.mark.parametrize("name", ["llama", "opt-projected", "gpt2", "mixtral", "gpt_oss", "deepseek_v3", "jamba"])
def test_sparsegpt(name, tmp_path):
    check(name, {"method": "sparsegpt", "sparsity": 0.5}, tmp_path / "stored")
