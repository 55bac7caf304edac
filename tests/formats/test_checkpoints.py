"""Other tools' checkpoints: what ctp writes, the real libraries open; what they write, ctp opens."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.bench import Bench
from support.packed import SPECS, assert_opens, same_weights
from support.tiny import random_windows
from support.tinygrid import ARCHITECTURES, VOCAB, byte_tokenizer, model_folder
from transformers import AutoModelForCausalLM

import ctp
from ctp.cells import GPTQ, Solver, SparseGPT
from ctp.cells.cell import Compress, Evaluate, Learn
from ctp.cells.labels import slug
from ctp.compression.walk import compress_model
from ctp.evaluation.perplexity import perplexity
from ctp.execution import loading
from ctp.formats import compressed_tensors, gptq
from ctp.formats.artifact import Compressed
from ctp.formats.checkpoint import open_checkpoint
from ctp.formats.export import export
from ctp.formats.layer import Layer
from ctp.formats.pack import from_words, pack, to_words
from ctp.models import files, sources
from ctp.models.config import model_facts
from ctp.planning.gridtext import GridError
from ctp.storage.ref import ref

CHECKPOINTS = sorted(p.parent for p in (Path(__file__).parents[1] / "checkpoints").glob("*/logits.safetensors"))


def compressed(spec: Solver, architecture: str = "llama", dtype: torch.dtype = torch.float32) -> Compressed:
    """A tiny model compressed by the real solver; every linear fills whole words at any width."""
    model = ARCHITECTURES[architecture](vocab=VOCAB, hidden=64).to(dtype)
    model.config.dtype = dtype
    layers = compress_model(model, random_windows(8, 24, VOCAB), spec)
    return Compressed.of(model, layers, byte_tokenizer())


def ppl(model, seed: int = 5) -> float:
    return perplexity(model, random_windows(4, 24, VOCAB, seed)).ppl


# ------------------------------------------------------------------------ bit streams


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([1, 2, 3, 4, 8]), st.integers(0, 5), st.integers(1, 70), st.integers(0, 2**31))
def test_words_are_those_of_compressed_tensors(bits: int, rows: int, n: int, seed: int) -> None:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    values = torch.randint(2**bits, (rows, n), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    words = to_words(values, bits)
    assert torch.equal(from_words(words, bits, n), values)
    if rows:
        signed = (values.short() - 2 ** (bits - 1)).to(torch.int8)
        assert torch.equal(words, pack_to_int32(signed, bits))


def test_a_gptq_weight_lies_where_autogptq_looks_for_it() -> None:
    """Read as AutoGPTQ's documentation of the format says, one weight at a time."""
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(16, (8, 32), generator=generator, dtype=torch.uint8)
    zero = torch.randint(16, (8, 2), generator=generator, dtype=torch.uint8)
    layer = Layer((8, 32), bits=4, codes=codes, scale=torch.rand(8, 2, generator=generator).half(), zero=zero)
    stored = {n.removeprefix("w."): t for n, t in gptq.write("w", layer, sym=False).items()}
    for i in range(32):
        for o in range(8):
            code = stored["qweight"][i // 8, o].item() >> 4 * (i % 8) & 15
            g = stored["g_idx"][i]
            z = stored["qzeros"][g, o // 8].item() >> 4 * (o % 8) & 15
            assert (code - z) * stored["scales"][g, o].float() == layer.dense(torch.float32)[o, i]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("ordered", [True, False])
def test_gptq_layers_come_back(bits: int, sym: bool, ordered: bool) -> None:
    generator = torch.Generator().manual_seed(bits)
    size = (32, 64)
    layer = Layer(
        size,
        bits=bits,
        codes=torch.randint(2**bits, size, generator=generator, dtype=torch.uint8),
        scale=torch.rand(32, 4, generator=generator).half(),
        zero=None if sym else torch.randint(2**bits, (32, 4), generator=generator, dtype=torch.uint8),
        g_idx=None if ordered else (torch.randperm(64, generator=generator) // 16).int(),
    )
    config = gptq.settings(bits, 16, sym, not ordered)
    assert config["checkpoint_format"] == ("gptq" if sym else "gptq_v2")
    ((name, back, parts),) = gptq.layers(gptq.write("a.b", layer, sym), config)
    assert name == "a.b"
    assert parts == {"a.b.qweight", "a.b.qzeros", "a.b.scales", "a.b.g_idx"}
    assert torch.equal(back.dense(torch.float32), layer.dense(torch.float32))
    assert (back.zero is None) == sym
    assert (back.g_idx is None) == ordered


# ------------------------------------------------------------------------------ export


@pytest.mark.parametrize("architecture", ["llama", "opt", "bloom"])
@pytest.mark.parametrize("name", SPECS)
def test_exports_open_elsewhere_with_the_same_perplexity(tmp_path, architecture, name) -> None:
    """transformers alone opens hf and compressed-tensors; in float32 nothing is rounded, so nothing may differ."""
    model = compressed(SPECS[name], architecture)
    expected = ppl(model.model())
    for format in ("hf", "compressed-tensors"):
        notes = export(model, tmp_path / format, format)
        opened = AutoModelForCausalLM.from_pretrained(tmp_path / format)
        assert ppl(opened) == pytest.approx(expected, rel=1e-6)
        assert any("no mask" in n for n in notes) == (name == "joint" and format != "hf")
    for format in ("gptq", "compressed-tensors"):
        if format == "gptq":
            export(model, tmp_path / format, format)
        assert same_weights(open_checkpoint(tmp_path / format).model(), model.model())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_exports(tmp_path, dtype) -> None:
    """Loaders round scales to the model's dtype: they must be such numbers already, or 3 bits lose 3 % here."""
    model = compressed(SPECS["4bit"], dtype=dtype)
    export(model, tmp_path / "x", "compressed-tensors")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "x")
    assert opened.dtype == dtype
    assert ppl(opened) == pytest.approx(ppl(model.model()), rel=1e-6)


def test_what_a_format_cannot_hold_is_refused_in_words(tmp_path) -> None:
    sparse = compressed(SparseGPT(sparsity=0.5))
    for format in ("gptq", "compressed-tensors"):
        with pytest.raises(ValueError, match="no form for pruned weights that are not quantized"):
            export(sparse, tmp_path / format, format)
    ordered = compressed(GPTQ(bits=4, group_size=16, act_order=True))
    with pytest.raises(ValueError, match="static_groups: true, or export to gptq"):
        export(ordered, tmp_path / "b", "compressed-tensors")
    export(ordered, tmp_path / "gptq", "gptq")
    assert same_weights(open_checkpoint(tmp_path / "gptq").model(), ordered.model())
    with pytest.raises(ValueError, match="is not empty"):
        export(ordered, tmp_path / "gptq", "hf")
    with pytest.raises(ValueError, match="awq"):
        export(ordered, tmp_path / "c", "awq")
    assert [p.name for p in tmp_path.iterdir()] == ["gptq"]  # nothing half written is left


def test_a_group_as_wide_as_the_inputs_is_a_group(tmp_path) -> None:
    model = compressed(GPTQ(bits=4, group_size=64))  # one group in attention, two in the MLP's last linear
    for format in ("gptq", "compressed-tensors"):
        export(model, tmp_path / format, format)
        assert same_weights(open_checkpoint(tmp_path / format).model(), model.model())
    assert ppl(AutoModelForCausalLM.from_pretrained(tmp_path / format)) == pytest.approx(ppl(model.model()), rel=1e-6)


def test_asymmetric_channels_of_4_bits_are_written_as_groups_for_gptq(tmp_path) -> None:
    """GPTQModel's CPU kernel opens them, its own too, as noise; the same scales in groups it reads."""
    model = compressed(GPTQ(bits=4))
    notes = export(model, tmp_path / "x", "gptq")
    assert any("64 inputs at a time" in n for n in notes)
    assert json.loads((tmp_path / "x" / "config.json").read_text())["quantization_config"]["group_size"] == 64
    assert same_weights(open_checkpoint(tmp_path / "x").model(), model.model())
    notes = export(compressed(GPTQ(bits=4, sym=True)), tmp_path / "sym", "gptq")
    assert notes == []
    assert json.loads((tmp_path / "sym" / "config.json").read_text())["quantization_config"]["group_size"] == -1


def test_only_the_blocks_linears_are_exported_quantized(tmp_path) -> None:
    """Loaders would look for an embedding's or a head's ordinary weight, and start it at random."""
    model = compressed(SPECS["4bit"])
    table = model.rest.pop("model.embed_tokens.weight")
    layer = Layer(tuple(table.shape), bits=8, codes=table.new_zeros(table.shape, dtype=torch.uint8),
                  scale=torch.ones(len(table), 1).half())  # fmt: skip
    odd = replace(model, packed=model.packed | pack({"model.embed_tokens": layer}))
    for format in ("gptq", "compressed-tensors"):
        with pytest.raises(ValueError, match=r"model.embed_tokens is no nn.Linear of a decoder block"):
            export(odd, tmp_path / format, format)


def test_ctps_own_folder_is_a_checkpoint_too(tmp_path) -> None:
    model = compressed(SPECS["joint"])
    model.save(tmp_path / "own")
    assert same_weights(open_checkpoint(tmp_path / "own").model(), model.model())
    path = tmp_path / "own" / "rest.safetensors"
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ValueError, match=r"rest.safetensors is missing or damaged"):
        open_checkpoint(tmp_path / "own")


def test_a_linear_that_does_not_fill_words_is_refused(tmp_path) -> None:
    model = ARCHITECTURES["llama"](vocab=VOCAB, hidden=32)  # keys have 16 outputs: of 3 bits, a word and a half
    small = Compressed.of(model, compress_model(model, random_windows(8, 24, VOCAB), GPTQ(bits=3)), byte_tokenizer())
    with pytest.raises(ValueError, match=r"k_proj: 16 outputs of 3 bits do not fill whole 32-bit words"):
        export(small, tmp_path / "a", "gptq")
    export(small, tmp_path / "b", "compressed-tensors")  # pads instead
    assert same_weights(open_checkpoint(tmp_path / "b").model(), small.model())


# ------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("folder", CHECKPOINTS, ids=lambda p: p.name)
def test_checkpoints_of_the_real_libraries_give_their_weights_and_logits(folder) -> None:
    """Written, and their logits computed, by GPTQModel and llm-compressor themselves (README there)."""
    assert_opens(folder)


def test_there_are_checkpoints_of_every_library() -> None:
    assert {p.name.split("-")[0] for p in CHECKPOINTS} == {"autoawq", "bitsandbytes", "gptqmodel", "llmcompressor"}


def test_a_pruned_folder_is_a_checkpoint(tmp_path) -> None:
    model = compressed(SparseGPT(sparsity=0.6))
    export(model, tmp_path / "pruned", "hf")
    back = open_checkpoint(tmp_path / "pruned")
    assert set(back.packed) == set(model.packed)
    assert all(torch.equal(back.packed[n], model.packed[n]) for n in model.packed)
    assert same_weights(back.model(), model.model())


def test_names_without_the_heads_prefix_and_idle_biases(tmp_path) -> None:
    """As the oldest AutoGPTQ wrote Llama: a zero bias for every linear, an inverse frequency for every block."""
    model = compressed(SPECS["4bit-sym"])
    export(model, tmp_path / "x", "gptq")
    tensors = load_file(tmp_path / "x" / "model.safetensors")
    linears = [n.removesuffix(".qweight") for n in tensors if n.endswith(".qweight")]
    tensors |= {f"{n}.bias": torch.zeros(tensors[f"{n}.scales"].shape[1]).half() for n in linears}
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    (tmp_path / "x" / "model.safetensors").unlink()
    config = json.loads((tmp_path / "x" / "config.json").read_text())
    del config["quantization_config"]  # quantize_config.json alone, as AutoGPTQ had it
    (tmp_path / "x" / "config.json").write_text(json.dumps(config))
    named = tmp_path / "x" / "gptq_model-4bit-16g.safetensors"
    save_file({n.removeprefix("model."): t for n, t in tensors.items()}, named)
    assert same_weights(open_checkpoint(tmp_path / "x").model(), model.model())
    tensors[f"{linears[0]}.bias"] += 1
    save_file(tensors, named)
    with pytest.raises(ValueError, match=r"not the weights of this LlamaForCausalLM: unexpected .*bias"):
        open_checkpoint(tmp_path / "x").model()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_method": "hqq"}, "quant_method = 'hqq': allowed: gptq, awq, bitsandbytes, compressed-tensors"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format = 'marlin': allowed: gptq, gptq_v2"),
        ({"checkpoint_format": None, "format": "marlin"}, "checkpoint_format = 'marlin'"),
        ({"bits": 5}, "bits = 5: allowed: 2, 3, 4, 8"),
    ],
)
def test_a_foreign_format_is_refused(tmp_path, change, message) -> None:
    export(compressed(SPECS["4bit-sym"]), tmp_path / "x", "gptq")
    path = tmp_path / "x" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= change
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        open_checkpoint(tmp_path / "x")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("strategy", "block", "strategy = 'block' of compressed-tensors: allowed: group, channel, tensor"),
        ("num_bits", 6, "num_bits = 6 of compressed-tensors: allowed: 2, 3, 4, 8"),
        ("type", "float", "integer weights only"),
    ],
)
def test_what_compressed_tensors_can_say_and_ctp_not_read_is_refused(field, value, message) -> None:
    config = compressed_tensors.settings(4, 16, True, [])
    compressed_tensors.check(config)
    config["config_groups"]["group_0"]["weights"][field] = value
    with pytest.raises(ValueError, match=message):
        compressed_tensors.check(config)
    with pytest.raises(ValueError, match="transform_config"):
        compressed_tensors.check(
            {**compressed_tensors.settings(4, 16, True, []), "transform_config": {"config_groups": {"a": 1}}}
        )
    with pytest.raises(ValueError, match="format = marlin-24 of compressed-tensors: allowed: pack-quantized"):
        compressed_tensors.check({"format": "marlin-24", "config_groups": {"a": {"weights": {}}}})


def test_a_checkpoint_that_is_not_whole_is_refused(tmp_path) -> None:
    export(compressed(SPECS["4bit"]), tmp_path / "x", "gptq")
    path = tmp_path / "x" / "model.safetensors"
    tensors = load_file(path)
    gone = "model.layers.1.mlp.up_proj"
    save_file({n: t for n, t in tensors.items() if n != f"{gone}.qzeros"}, path)
    with pytest.raises(ValueError, match=rf"{gone}: no GPTQ layer: .*qzeros"):
        open_checkpoint(tmp_path / "x")
    save_file({n: t for n, t in tensors.items() if not n.startswith(gone)}, path)
    with pytest.raises(ValueError, match=rf"missing \['{gone}.weight'\]"):
        open_checkpoint(tmp_path / "x").model()
    save_file({**tensors, f"{gone}.qweight": tensors[f"{gone}.qweight"][:4]}, path)
    with pytest.raises(ValueError, match=gone):
        open_checkpoint(tmp_path / "x").model()
    dense = ARCHITECTURES["llama"](vocab=VOCAB)
    dense.save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match="holds no quantized and no pruned weights"):
        open_checkpoint(tmp_path / "dense", tokenizer=byte_tokenizer())
    path.rename(tmp_path / "x" / "model-00001-of-00001.safetensors")
    (tmp_path / "x" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../../etc/passwd"}}))
    with pytest.raises(ValueError, match=r"names '../../etc/passwd': should be a .safetensors file"):
        open_checkpoint(tmp_path / "x")


def sharded(folder, seed):
    """A pruned Llama in many shards, with their index."""
    model = pruned(seed)
    model.save_pretrained(folder, max_shard_size="40KB")
    byte_tokenizer().save_pretrained(folder)
    return model


def pruned(seed):
    model = ARCHITECTURES["llama"](vocab=VOCAB, seed=seed)
    for module in model.model.layers.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data[:, ::2] = 0
    return model


def test_a_file_beside_shards_is_read_alike_by_everything(tmp_path) -> None:
    """`model.safetensors` counts, as for transformers; what is passed over is named."""
    folder = tmp_path / "both"
    sharded(folder, seed=2)
    new = pruned(seed=1)
    new.save_pretrained(tmp_path / "new")
    shutil.copy(tmp_path / "new" / "model.safetensors", folder)
    assert same_weights(AutoModelForCausalLM.from_pretrained(folder), new)
    with pytest.warns(UserWarning, match=r"model.safetensors is read.*not model-00001-of-0.*remove what is not"):
        assert same_weights(open_checkpoint(folder).model(), new)
    with pytest.warns(UserWarning, match="model-00001"):
        assert same_weights(ctp.load(folder)[0], new)
    assert files.weight_files(folder) == [folder / "model.safetensors"]
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    tall = ARCHITECTURES["llama"](vocab=VOCAB, layers=3)
    tall.save_pretrained(tmp_path / "tall")
    shutil.copy(tmp_path / "tall" / "model.safetensors", folder)  # the shards have two layers
    _, revision, location = sources.locate(str(folder))
    assert model_facts(location, revision).layers == 3


def test_two_files_of_one_tensor_are_refused(tmp_path) -> None:
    export(compressed(SPECS["4bit"]), tmp_path / "x", "gptq")
    path = tmp_path / "x" / "model.safetensors"
    shutil.copy(path, tmp_path / "x" / "gptq_model-4bit.safetensors")
    path.rename(tmp_path / "x" / "old.safetensors")
    with pytest.raises(ValueError, match=r"old.safetensors holds .*, and another .safetensors file too"):
        open_checkpoint(tmp_path / "x")


def test_zero_points_of_version_1_survive_borrows() -> None:
    """Lowered by whole words, a zero point of 0 borrows from its neighbour; raising by whole words gives it back."""
    zero = torch.tensor([[0, 5, 0, 15, 8, 1, 0, 7]], dtype=torch.uint8)
    codes = torch.arange(8 * 8, dtype=torch.uint8).view(8, 8) % 16
    layer = Layer((8, 8), bits=4, codes=codes, scale=torch.ones(8, 1).half(), zero=zero.T.contiguous())
    tensors = gptq.write("w", layer, sym=False)
    tensors["w.qzeros"] = tensors["w.qzeros"] - 0x11111111
    ((_, back, _),) = gptq.layers(tensors, {"bits": 4, "checkpoint_format": "gptq"})
    assert torch.equal(back.dense(torch.float32), layer.dense(torch.float32))


def test_old_checkpoints_of_compressed_tensors_may_have_reordered_groups() -> None:
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(16, (4, 32), generator=generator, dtype=torch.uint8)
    layer = Layer((4, 32), bits=4, codes=codes, scale=torch.rand(4, 2, generator=generator).half())
    g_idx = (torch.randperm(32, generator=generator) // 16).int()
    tensors = {**compressed_tensors.write("w", layer, sym=True), "w.weight_g_idx": g_idx}
    ((_, back, _),) = compressed_tensors.layers(tensors, compressed_tensors.settings(4, 16, True, []))
    assert torch.equal(back.groups(), g_idx.long())


# ---------------------------------------------------------------------------- in a grid


def test_a_checkpoint_is_a_compression_of_a_grid(tmp_path) -> None:
    """Source and target of prompts; its perplexity is that of the model it was exported from."""
    base = model_folder(tmp_path / "base", hidden=64)
    model = ARCHITECTURES["llama"](vocab=VOCAB, hidden=64)
    layers = compress_model(model, random_windows(8, 24, VOCAB), SPECS["4bit"])
    small = Compressed.of(model, layers, byte_tokenizer())
    export(small, tmp_path / "small-gptq", "gptq")
    method = {"method": "checkpoint", "path": str(tmp_path / "small-gptq")}
    bench = Bench(tmp_path, base, compression=["dense", method], sources=None, calibration=None)
    for cell in bench.cells:
        bench.execute(cell)
    (stored,) = [c for c in bench.all(Compress) if c.compression.method == "checkpoint"]
    assert slug(stored) == "base_checkpoint-small-gptq"
    metrics = bench.store.manifest(ref(stored))["metrics"]
    assert metrics["bits_per_weight"] == pytest.approx(small.stats()["bits_per_weight"])
    assert same_weights(loading.open_model(stored, bench.store, bench.runtime, "cpu")[0], model)
    plain = next(c for c in bench.all(Evaluate) if c.recovery is None and c.target == stored)
    ids = loading.token_windows(plain.measure.text, byte_tokenizer(), bench.runtime)
    expected = perplexity(model, ids).ppl
    assert bench.store.manifest(ref(plain))["metrics"]["ppl"] == pytest.approx(expected, rel=1e-6)
    assert len([c for c in bench.all(Learn) if c.source == stored]) == 1


def test_mistakes_about_checkpoints_are_told_while_planning(tmp_path) -> None:
    base = model_folder(tmp_path / "base", hidden=64)

    def problem(path, **fields) -> str:
        method = {"method": "checkpoint", "path": str(path), **fields}
        with pytest.raises(GridError) as error:
            Bench(tmp_path, base, compression=[method], sources=None, calibration=None)
        return str(error.value)

    assert f"path = '{tmp_path}/nothing': there is no folder" in problem(tmp_path / "nothing")
    other = model_folder(tmp_path / "other", hidden=32)
    assert "not a compressed base, which has" in problem(other)
    config = json.loads((base / "config.json").read_text())
    awq = model_folder(tmp_path / "awq", hidden=64)
    (awq / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "hqq"}}))
    assert "quant_method = 'hqq': allowed: gptq, awq, bitsandbytes, compressed-tensors" in problem(awq)
    assert "packaged model" in problem("smollm2-135m")
    assert "revision = 'sha256:0': other is sha256:" in problem(other, revision="sha256:0")
