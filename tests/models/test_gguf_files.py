"""GGUF files as models and as checkpoints: what gguf and transformers make of them, bit for bit."""

import shutil

import numpy as np
import pytest
import torch
from support.bench import Bench
from support.changing import fails
from support.ggufs import write_gguf
from support.packed import same_weights
from support.tinygrid import VOCAB
from transformers import AutoModelForCausalLM

import ctp
from ctp.cells.cell import Compress, Evaluate, Learn
from ctp.common.files import Changed
from ctp.formats import gguf
from ctp.formats.checkpoint import open_checkpoint
from ctp.models import sources
from ctp.models.load import load_model
from ctp.storage.ref import ref

IDS = torch.randint(VOCAB, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny-q4.gguf")


@pytest.mark.parametrize("quant", gguf.FORMATS)
def test_a_block_is_what_gguf_makes_of_it(quant):
    """Random bytes: every code, and scales of any size."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

    kind = GGMLQuantizationType[quant]
    _, octets = GGML_QUANT_SIZES[kind]
    blocks = np.random.default_rng(0).integers(0, 256, (6, 3 * octets), dtype=np.uint8)
    how = gguf.FORMATS[quant]
    for at in {start for start, stop in how.unit | how.one if stop - start == 2}:  # float16 numbers that are finite
        for block in range(3):
            blocks[:, block * octets + at : block * octets + at + 2] = (0x11 * block, 0x2C + block)
    layer = gguf.read(blocks, quant)
    assert torch.equal(layer.dense(torch.float32), torch.from_numpy(dequantize(blocks, kind)))
    assert layer.bits == gguf.FORMATS[quant].bits


@pytest.mark.parametrize("quant", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_a_file_is_a_model_and_a_checkpoint(tmp_path, quant):
    file = write_gguf(tmp_path / f"{quant}.gguf", quant)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32)
    small = open_checkpoint(file)
    assert small.stats()["linears"] == 14
    assert small.stats()["bits_per_weight"] < 10.5
    with torch.no_grad():
        expected = theirs.eval()(IDS).logits
        assert torch.equal(small.model()(IDS).logits, expected)
        assert torch.equal(small.model(packed=True)(IDS).logits, expected)
        assert torch.equal(ctp.load(file)[0](IDS).logits, expected)
    ctp.export(file, tmp_path / "hf", "hf")
    assert same_weights(ctp.load(tmp_path / "hf")[0], small.model())
    if quant in ("Q4_0", "Q8_0"):
        ctp.export(file, tmp_path / "gptq", "gptq")
        assert same_weights(open_checkpoint(tmp_path / "gptq").model(), small.model())
    else:
        with pytest.raises(ValueError, match="export hf"):
            ctp.export(file, tmp_path / "gptq", "gptq")


def test_in_a_grid(tmp_path, file):
    """The file as the model, and as a compression of it: dense, it is the same model."""
    checkpoint = {"method": "checkpoint", "path": str(file)}
    bench = Bench(tmp_path, file, compression=["dense", checkpoint], sources=None, calibration=None)
    assert {c.model.name for c in bench.all(Compress)} == {"tiny-q4"}
    for cell in bench.cells:
        bench.execute(cell)
    plain = [c for c in bench.all(Evaluate) if c.recovery is None]
    assert len({bench.store.manifest(ref(c))["metrics"]["ppl"] for c in plain}) == 1
    assert len(bench.all(Learn)) == 2


def test_a_file_that_changed_is_not_read(tmp_path, file):
    copy = shutil.copy(file, tmp_path / "copy.gguf")
    bench = Bench(tmp_path, copy, compression=["dense"], sources=None, calibration=None)
    copy.write_bytes(copy.read_bytes()[:-1] + b"\x01")
    fails(bench, bench.all(Compress)[0], "the model")
    _, revision, _ = sources.locate(str(file))
    with pytest.raises(Changed):
        load_model(f"gguf:{copy}", revision)


def test_half_a_file_is_refused(tmp_path, file):
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(file.read_bytes()[:3000])
    with pytest.raises(ValueError, match=r"broken.gguf cannot be read as a GGUF model"):
        ctp.load(broken)
    lacking = write_gguf(tmp_path / "lacking.gguf", without="model.layers.1.mlp.up_proj.weight")
    with pytest.raises(ValueError, match=r"lacking.gguf are incomplete: model.layers.1.mlp.up_proj.weight missing"):
        open_checkpoint(lacking)
