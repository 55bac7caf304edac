"""Each model of the zoo in the format gptq, opened by GPTQModel (`make foreign`)."""

import pytest
from safetensors.torch import load_file, save_file
from support.foreign_run import run
from support.zoo import far, logits, refused, tokenizer, windows

import ctp
from ctp.formats.loaders import refusals
from tools.zoo import MODELS, build, config

pytestmark = pytest.mark.slow
HALF = 2e-2  # it computes with each weight rounded to float16, through large random weights


def test_gptqmodel_opens_what_is_not_refused(tmp_path):
    text, wanted = windows(4, 24), {}
    (tmp_path / "models").mkdir()
    names = [n for n in MODELS if "compress" not in refused(n) and "gptq" not in refusals(config(n))]
    for name in names:
        model = build(name)
        small = ctp.compress(model, tokenizer(), {"method": "gptq", "bits": 4, "sym": True}, text)
        notes = ctp.export(small, tmp_path / "all" / name, "gptq")
        if not any("transformers opens no experts" in note for note in notes):
            wanted[name] = logits(model, text)
            (tmp_path / "all" / name).rename(tmp_path / "models" / name)
    save_file({"input_ids": text}, tmp_path / "ids.safetensors")
    run(tmp_path, "gptqmodel", "read_zoo.py", tmp_path / "models", tmp_path / "ids.safetensors", tmp_path / "out")
    found = load_file(tmp_path / "out")
    assert sorted(found) == sorted(wanted)
    assert {n: far(t, wanted[n]) for n, t in found.items() if not far(t, wanted[n]) < HALF} == {}
