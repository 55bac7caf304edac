"""Every tensor of a checkpoint made elsewhere is looked at before it is used: what does not fit is refused by name."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.packed import same_weights
from transformers import AutoConfig

from ctp.formats import checkpoint, gptq
from ctp.formats.checkpoint import open_checkpoint
from ctp.formats.export import export

CHECKPOINTS = Path(__file__).parents[1] / "checkpoints"
LINEAR = "model.layers.1.mlp.up_proj"


def changed(folder, kind, field, change, **settings):
    """A copy of a checkpoint with one tensor changed, or removed where the change is None."""
    copy = shutil.copytree(CHECKPOINTS / kind, folder / "copy")
    path = copy / "model.safetensors"
    tensors, name = load_file(path), f"{LINEAR}.{field}" if field else LINEAR
    if change is not None:
        tensors[name] = change(tensors[name].clone()).contiguous()
    elif field:
        del tensors[name]
    save_file(tensors, path, metadata={"format": "pt"})
    if settings:
        config = json.loads((copy / "config.json").read_text())
        config["quantization_config"] |= settings
        (copy / "config.json").write_text(json.dumps(config))
        (copy / "quantize_config.json").unlink(missing_ok=True)
    return copy


def at(index, value):
    def change(tensor):
        tensor.view(-1)[index] = value
        return tensor

    return change


def cut(n):
    return lambda t: t[:n].clone()


def typed(dtype):
    return lambda t: t.to(dtype)


GPTQ, ACT = "gptqmodel-4bit-g32", "gptqmodel-4bit-asym-act-g32-v1"
CT, AWQ = "llmcompressor-4bit-asym-g32", "autoawq-4bit-g32"
NF4, INT8 = "bitsandbytes-nf4-double", "bitsandbytes-int8"
STATE = "weight.quant_state.bitsandbytes__nf4"
WRONG = {
    "a negative group": (GPTQ, "g_idx", at(3, -1), "g_idx holds -1: should be 0 to 1"),
    "a group too many": (ACT, "g_idx", at(3, 2), "g_idx holds 2: should be 0 to 1"),
    "no group numbers": (GPTQ, "g_idx", cut(0), "qweight has 8 words a column of 0 inputs: they are not of 4 bits"),
    "one number short": (GPTQ, "g_idx", cut(63), "of 63 inputs"),
    "all in one group": (GPTQ, "g_idx", torch.zeros_like,
     "g_idx puts 64 inputs into group 0 of 2: should be groups of 32"),
    "numbers with a point": (GPTQ, "g_idx", typed(torch.float32), "g_idx is float32: should be int32 or int64"),
    "zero points of another size": (GPTQ, "qzeros", cut(1), "qzeros has the shape (1, 16): should be (2, 16)"),
    "zero points of another type": (GPTQ, "qzeros", typed(torch.int16), "qzeros is int16: should be int32"),
    "scales of fewer groups": (GPTQ, "scales", cut(1), "scales has the shape (1, 128): should be (2, 128)"),
    "whole scales": (GPTQ, "scales", typed(torch.int32), "scales is int32: should be float16 or bfloat16 or float32"),
    "a scale that is none": (GPTQ, "scales", at(5, float("nan")), "scales holds numbers that are not finite"),
    "an infinite scale": (GPTQ, "scales", at(5, float("inf")), "scales holds numbers that are not finite"),
    "codes of another type": (GPTQ, "qweight", typed(torch.int64), "qweight is int64: should be int32"),
    "flat codes": (GPTQ, "qweight", torch.flatten, "qweight has the shape (1024,): should be (any, any)"),
    "codes of too many inputs": (GPTQ, "qweight", lambda t: torch.cat([t, t]),
     "of 64 inputs: they are not of 4 bits"),
    "packed codes of another type": (CT, "weight_packed", typed(torch.int64), "weight_packed is int64: should be"),
    "packed codes of another size": (CT, "weight_packed", lambda t: t[:, :5], "weight_packed has 5 words a"),
    "a shape of one number": (CT, "weight_shape", cut(1), "weight_shape has the shape (1,): should be (2)"),
    "a shape below zero": (CT, "weight_shape", at(1, -64), "weight_shape holds -64"),
    "scales of another group": (CT, "weight_scale", lambda t: t[:, :1],
     "weight_scale has 1 groups of 64 inputs"),
    "a scale short": (CT, "weight_scale", lambda t: t[:-1], "weight_scale has the shape (127, 2)"),
    "a scale, not finite": (CT, "weight_scale", at(0, float("nan")), "weight_scale holds numbers that are not"),
    "zero points short": (CT, "weight_zero_point", lambda t: t[:-1], "weight_zero_point has the shape"),
    "awq, scales of fewer groups": (AWQ, "scales", cut(1), "scales has the shape (1, 128): should be (2, 128)"),
    "awq, zero points short": (AWQ, "qzeros", lambda t: t[:, :-1], "qzeros has the shape (2, 15): should be (2, 16)"),
    "awq, a scale that is none": (AWQ, "scales", at(9, float("nan")), "scales holds numbers that are not finite"),
    "awq, no zero points": (AWQ, "qzeros", None, "qzeros is missing"),
    "nf4, half the codes": (NF4, "weight", cut(100), "weight has the shape (100, 1): should be (4096, 1)"),
    "nf4, a map too short": (NF4, "weight.quant_map", cut(8), "quant_map has the shape (8,): should be (16)"),
    "nf4, maxima of another type": (NF4, "weight.absmax", typed(torch.float32), "absmax is float32: should be uint8"),
    "nf4, no maxima": (NF4, "weight.nested_absmax", None, "nested_absmax is missing"),
    "nf4, maxima that are none": (NF4, "weight.nested_absmax", at(0, float("nan")), "not finite"),
    "nf4, a state that is no JSON": (NF4, STATE, cut(20), "no bitsandbytes layer"),
    "int8, a scale short": (INT8, "SCB", cut(5), "SCB has the shape (5,): should be (128)"),
    "int8, of another type": (INT8, "weight", typed(torch.int16), "weight is int16: should be int8"),
    "int8, tiled": (INT8, "weight_format", lambda t: t + 1, "weight_format is 1: should be 0"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_tensor_that_does_not_fit_is_named(tmp_path, name):
    kind, field, change, message = WRONG[name]
    with pytest.raises(ValueError, match=rf"^{LINEAR}: no ") as error:
        open_checkpoint(changed(tmp_path, kind, field, change))
    assert message in str(error.value)


SETTINGS = [
    (GPTQ, {"bits": 8}, "inputs: they are not of 8 bits"),
    (GPTQ, {"group_size": 16}, "scales has the shape (4, 64): should be (8, 64)"),
    (GPTQ, {"group_size": -1}, "scales has the shape (4, 64): should be (1, 64)"),
    (GPTQ, {"group_size": "32"}, "group_size = '32': should be a whole number above 0, or -1"),
    (CT, {"quant_method": "fbgemm_fp8"}, "quant_method = 'fbgemm_fp8': allowed: gptq, awq, "),
    (AWQ, {"group_size": 64}, "qzeros has the shape (4, 8): should be (2, 8)"),
    (AWQ, {"version": "gemv"}, "version = 'gemv' of awq: allowed: gemm"),
    (AWQ, {"bits": 3}, "bits = 3 of awq: allowed: 4"),
    (AWQ, {"zero_point": False}, "zero_point = False of awq: allowed: True"),
    (NF4, {"bnb_4bit_quant_type": "nf5"}, "bnb_4bit_quant_type = 'nf5' of bitsandbytes: allowed: nf4, fp4"),
    (NF4, {"load_in_8bit": True}, "load_in_4bit = True and load_in_8bit = True of bitsandbytes: one of them is true"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "settings", "message"), SETTINGS)
def test_settings_that_the_tensors_do_not_have_are_refused(tmp_path, kind, settings, message):
    with pytest.raises(ValueError, match=r".") as error:
        open_checkpoint(changed(tmp_path, kind, "", None, **settings))
    assert message in str(error.value)


@pytest.mark.parametrize("kind", [GPTQ, CT, AWQ, NF4, INT8])
def test_what_is_stored_as_it_is_is_looked_at_too(tmp_path, kind):
    copy = shutil.copytree(CHECKPOINTS / kind, tmp_path / "copy")
    path, whole = copy / "model.safetensors", load_file(CHECKPOINTS / kind / "model.safetensors")
    for change, message in (
        (cut(3), "model.norm.weight: it has the shape (3,): should be (64)"),
        (at(0, float("nan")), "model.norm.weight: it holds numbers that are not finite"),
        (typed(torch.int32), "model.norm.weight: it is int32"),
    ):
        save_file(whole | {"model.norm.weight": change(whole["model.norm.weight"].clone())}, path)
        with pytest.raises(ValueError, match=r"model\.norm") as error:
            open_checkpoint(copy)
        assert message in str(error.value)
    save_file(whole, path)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"intermediate_size": 256}))
    with pytest.raises(ValueError, match=r"its tensors make a weight \((64, 128|128, 64)\), and config.json says"):
        open_checkpoint(copy)


def test_widths_that_differ_from_linear_to_linear_are_those_of_the_settings():
    found = gptq.layers(*_two_widths(dynamic={r"-:c$": {}, r"+:b$": {"bits": 8, "group_size": 32}}))
    layer = {name: x for name, x, _ in found}
    assert (layer["a"].bits, layer["b"].bits) == (4, 8)
    with pytest.raises(ValueError, match="b: no GPTQ layer: qweight has 16 words a column of 64 inputs"):
        list(gptq.layers(*_two_widths(dynamic=None)))


def _two_widths(dynamic):
    tensors = {}
    for name, bits in (("a", 4), ("b", 8)):
        tensors |= {
            f"{name}.qweight": torch.ones(64 * bits // 32, 32, dtype=torch.int32),
            f"{name}.qzeros": torch.ones(2, bits, dtype=torch.int32),
            f"{name}.scales": torch.ones(2, 32).half(),
            f"{name}.g_idx": (torch.arange(64) // 32).int(),
        }
    return tensors, {"bits": 4, "group_size": 32, "dynamic": dynamic}


def test_groups_that_do_not_divide_the_inputs_are_those_of_the_settings():
    """100 inputs in groups of 48: 48, 48 and 4, and not three of about a third."""
    tensors = {
        "w.qweight": torch.ones(25, 32, dtype=torch.int32),
        "w.qzeros": torch.ones(3, 8, dtype=torch.int32),
        "w.scales": torch.tensor([1.0, 2.0, 3.0]).half().unsqueeze(1).expand(3, 32).contiguous(),
    }
    ((_, layer, _),) = gptq.layers(tensors, {"bits": 8, "group_size": 48})
    assert layer.groups().bincount().tolist() == [48, 48, 4]


@pytest.mark.parametrize("kind", [NF4, INT8, AWQ])
def test_they_are_stored_and_exported_as_any_other(tmp_path, kind):
    small = open_checkpoint(CHECKPOINTS / kind)
    small.save(tmp_path / "own")
    assert same_weights(open_checkpoint(tmp_path / "own").model(), small.model())
    assert same_weights(small.model(), small.model(packed=False))
    export(small, tmp_path / "hf", "hf")
    assert "quantization_config" not in AutoConfig.from_pretrained(tmp_path / "hf").to_dict()
    if kind == NF4:
        for format in ("gptq", "compressed-tensors"):
            with pytest.raises(ValueError, match="no form for codes that are not evenly spaced"):
                export(small, tmp_path / format, format)
    if kind == AWQ:
        export(small, tmp_path / "gptq", "gptq")
        assert same_weights(open_checkpoint(tmp_path / "gptq").model(), small.model())


def test_every_method_that_is_read_is_listed(tmp_path):
    copy = changed(tmp_path, GPTQ, "", None, quant_method="hqq")
    with pytest.raises(ValueError, match=f"quant_method = 'hqq': allowed: {', '.join(checkpoint.READERS)}"):
        open_checkpoint(copy)
