"""Where the beginning of text stands: in windows, and in the plan of a grid whose tokenizer lacks it."""

import json

import pytest
import torch
from support.harness import bare, framed
from support.tiny import tiny_llama
from support.tinygrid import VOCAB, grid, model_folder, write_grid
from support.tinytasks import own_task
from transformers import Gemma2Config, Gemma2ForCausalLM, GemmaConfig, LlamaConfig

from ctp import cli
from ctp.architectures import families
from ctp.cells.cell import Evaluate, key
from ctp.cells.inputs import Windows
from ctp.cells.labels import axes
from ctp.data.specials import Specials, opening_ids
from ctp.data.windows import cut_windows
from ctp.models.tiny import BOS, EOS
from ctp.planning import gridfile, gridtext
from ctp.planning.pins import Pins
from ctp.planning.plan import make

DOCUMENTS = ["abcdefghij", "klmnopqrst", "uvwxyz"]


def cut(tokenizer, bos, seq_len=5, **more):
    spec = Windows(dataset="x", split="train", seq_len=seq_len, join="", bos=bos, **more)
    return cut_windows(spec, DOCUMENTS, tokenizer)


@pytest.mark.parametrize(("before", "after"), [(True, True), (True, False), (False, True), (False, False)])
def test_what_stands_around_a_text(before, after):
    tokenizer = framed(before, after)
    found = Specials.of(tokenizer)
    assert found == Specials(BOS, EOS, (BOS,) * before, (EOS,) * after)
    assert opening_ids(tokenizer, "xy") == [BOS] * before + tokenizer("xy", add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("tokenizer", [framed(), framed(False, False)], ids=["added", "not added"])
def test_windows_with_and_without_a_beginning_of_text(tokenizer):
    text = torch.tensor(tokenizer("".join(DOCUMENTS), add_special_tokens=False)["input_ids"])
    each = cut(tokenizer, "each")
    assert each.shape == (6, 5)  # 26 letters, four a window
    assert (each[:, 0] == BOS).all()
    assert torch.equal(each[:, 1:].flatten(), text[:24])
    assert torch.equal(cut(tokenizer, "none").flatten(), text[:25])
    first = [BOS] if tokenizer("a")["input_ids"][0] == BOS else []
    assert cut(tokenizer, "first").flatten().tolist() == [*first, *text.tolist()][:25]
    assert torch.equal(cut(tokenizer, "each", count=2), each[:2])


def test_crops_with_and_without_a_beginning_of_text():
    crops = {bos: cut(framed(), bos, seq_len=9, count=20, sampling="crops") for bos in ("each", "none", "first")}
    assert (crops["each"][:, 0] == BOS).all()
    assert not (crops["each"][:, 1:] >= EOS).any()
    assert not (crops["none"] >= EOS).any()
    assert (crops["first"] == BOS).any()
    assert (crops["first"] == EOS).any()  # as the tokenizer has it


def test_the_default_is_in_no_key():
    text = {"dataset": "t", "split": "test", "seq_len": 16, "revision": "r", "join": ""}
    measures = [{"method": "perplexity", "text": {**text, **bos}} for bos in ({}, {"bos": "first"}, {"bos": "each"})]
    target = {"model": {"name": "m", "revision": "r", "dtype": "float32"}, "compression": "dense"}
    plain, said, each = (Evaluate(target=target, measure=m) for m in measures)
    assert key(plain) == key(said) != key(each)
    assert "bos" not in plain.model_dump()["measure"]["text"]
    assert Evaluate.model_validate(each.model_dump()) == each
    assert (axes(plain).get("bos"), axes(each)["bos"]) == (None, "each")


def test_without_the_token_windows_are_refused():
    with pytest.raises(ValueError, match="bos = 'each': the tokenizer has no beginning-of-text token"):
        cut(bare(eos_token="<eos>"), "each")


# ------------------------------------------------------------------------ the plan


def folder(path, tokenizer):
    model_folder(path)
    tiny_llama(vocab=VOCAB + 3).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def problems(path, content):
    with pytest.raises(gridtext.GridError) as e:
        planned(path, content)
    return e.value.problems


def planned(path, content):
    pins = Pins()
    return make(gridfile.load(str(write_grid(path / "g.yaml", content)), [], pins), pins)


def test_a_grid_that_asks_for_a_token_that_is_not_there(tmp_path):
    model = folder(tmp_path / "m", bare(eos_token="<eos>"))
    content = grid(model)
    for place in (content["calibration"], content["recovery"]["text"], content["measures"]["text"]):
        place["bos"] = "each"
    content["recovery"] = [content["recovery"], "bos"]
    said = "the tokenizer of m has no beginning-of-text token"
    places = ("calibration.bos = 'each'", "measures.text.bos = 'each'", "recovery.method = 'bos'")
    assert sorted(problems(tmp_path, content)) == [f"{tmp_path / 'g.yaml'}: {place}: {said}" for place in places]


def test_a_task_needs_one_of_both_tokens(tmp_path):
    model = folder(tmp_path / "m", bare())
    content = grid(model, measures={"method": "task", "name": own_task(tmp_path / "sums")})
    said = "measures.name = 'sums': the tokenizer of m has neither a beginning-of-text nor an end-of-text token"
    assert problems(tmp_path, content) == [f"{tmp_path / 'g.yaml'}: {said}, and a task needs one of them"]
    bare(bos_token="<bos>").save_pretrained(model)
    assert planned(tmp_path, content).nodes


def test_validation_begins_like_the_text(tmp_path):
    model = folder(tmp_path / "m", framed())
    content = grid(model)
    content["recovery"]["text"]["bos"] = "each"
    learn = next(n.cell for n in planned(tmp_path, content).nodes.values() if n.cell.kind == "learn")
    assert learn.recovery.validation.bos == "each"


def test_a_model_that_needs_it_in_every_window(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = Gemma2Config(vocab_size=VOCAB + 1, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                          num_attention_heads=2, num_key_value_heads=1, head_dim=8)  # fmt: skip
    Gemma2ForCausalLM(config).save_pretrained(tmp_path / "g")
    framed().save_pretrained(tmp_path / "g")
    content = grid(tmp_path / "g", compression="dense", sources="all")
    del content["calibration"]
    write_grid(tmp_path / "g.yaml", content)
    assert cli.main(["grid", "g.yaml", "--plan"]) == 0
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("warning: ")]
    assert line.startswith("warning: g needs the beginning-of-text token in front of every window")
    assert cli.main(["grid", "g.yaml", "--plan", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["warnings"] == [line.removeprefix("warning: ")]
    content["measures"]["text"]["bos"] = content["recovery"]["text"]["bos"] = "each"
    write_grid(tmp_path / "g.yaml", content)
    assert cli.main(["grid", "g.yaml", "--plan"]) == 0
    assert "warning" not in capsys.readouterr().out
    assert families.needs_bos(GemmaConfig())
    assert not families.needs_bos(LlamaConfig())
