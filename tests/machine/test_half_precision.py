"""Half precision where a device has no fast arithmetic for it: float32, on weights rounded as asked."""

import copy
import json
import os
import subprocess
import sys
import warnings

import pytest
import torch
from support.bench import Bench
from support.prompts import S, run, spec
from support.tiny import random_windows, tiny_bloom, tiny_llama, tiny_mixtral, tiny_opt, tiny_qwen2
from support.tinygrid import model_folder
from torch import nn

import ctp
from ctp.cells import GPTQ, LoRA, SparseGPT
from ctp.cells.cell import Compress, Evaluate, Learn
from ctp.cells.runtime import Runtime
from ctp.compression.walk import compress_model
from ctp.evaluation.generation import answer_tokens
from ctp.evaluation.perplexity import perplexity
from ctp.execution import loading
from ctp.formats.artifact import Compressed
from ctp.formats.packed import PackedLinear
from ctp.learning.lora import learn_lora
from ctp.learning.soft_prompt import learn
from ctp.machine import arithmetic, device
from ctp.machine.arithmetic import computed_in, cpu_rates, notice, widen, widened
from ctp.models.load import load_model
from ctp.storage.ref import ref

HALF = [torch.bfloat16, torch.float16]
ON_CPU = Runtime(device="cpu")


@pytest.fixture
def slow(monkeypatch):
    """A CPU without arithmetic for bfloat16."""
    monkeypatch.setattr(arithmetic, "cpu_rates", lambda: {"float32": 1e11, "bfloat16": 1e9})


@pytest.fixture
def fast(monkeypatch):
    """A CPU that multiplies bfloat16 three times as fast as float32; it does so here, however slowly."""
    monkeypatch.setattr(arithmetic, "cpu_rates", lambda: {"float32": 1e11, "bfloat16": 3e11})


def rounded_linears(model, dtype):
    """A float32 model whose linears have been rounded to `dtype`; an embedding that was tied to the head has not."""
    for m in model.modules():
        if isinstance(m, nn.Linear):
            m.weight = nn.Parameter(m.weight.detach().to(dtype).float())
            if m.bias is not None:
                m.bias = nn.Parameter(m.bias.detach().to(dtype).float())
    return model


# ------------------------------------------------------------------- what is decided


def test_it_goes_by_what_was_measured(monkeypatch):
    for bfloat16, wanted in [(0.01, "float32"), (1.2, "float32"), (1.3, "bfloat16"), (4, "bfloat16")]:
        monkeypatch.setattr(arithmetic, "cpu_rates", lambda x=bfloat16: {"float32": 1.0, "bfloat16": x})
        assert computed_in("bfloat16", "cpu") == wanted
        assert bool(notice("bfloat16", "cpu")) == (wanted == "float32")
    assert computed_in("float16", "cpu") == "float32"
    assert computed_in("float32", "cpu") == "float32"
    assert notice("float32", "cpu") == ""


@pytest.mark.parametrize(("ampere", "wanted"), [(True, "bfloat16"), (False, "float32")])
def test_a_gpu_is_asked(monkeypatch, ampere, wanted):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: ampere and not including_emulation)
    assert computed_in("bfloat16", "cuda") == wanted
    assert computed_in("float16", "cuda") == "float16"
    assert "GPU" in notice("bfloat16", "cuda") or ampere


def test_rates_are_measured_once_a_machine(monkeypatch, tmp_path):
    monkeypatch.setenv("CTP_CACHE", str(tmp_path))
    cpu_rates.cache_clear()
    rates = cpu_rates()
    assert rates["float32"] > 1e8  # operations a second of one core: no machine that runs torch is slower
    assert rates["bfloat16"] > 0
    (file,) = (tmp_path / "rates").iterdir()
    file.write_text(json.dumps({"float32": 7, "bfloat16": 8}))
    cpu_rates.cache_clear()
    assert cpu_rates() == {"float32": 7, "bfloat16": 8}
    for wrong in ("{", '{"float32": 0, "bfloat16": 0}', '{"float32": NaN, "bfloat16": 1}', "[" * 9999, "9" * 9999):
        file.write_text(wrong)
        cpu_rates.cache_clear()
        assert cpu_rates()["float32"] > 1e8
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "SSE41")  # other instructions: another machine
    cpu_rates.cache_clear()
    cpu_rates()
    assert len(list((tmp_path / "rates").iterdir())) == 2
    cpu_rates.cache_clear()


def test_without_a_home_for_the_cache_it_is_measured_all_the_same(monkeypatch):
    def nowhere():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr("ctp.machine.arithmetic.cache_dir", nowhere)
    cpu_rates.cache_clear()
    assert cpu_rates()["float32"] > 1e8
    cpu_rates.cache_clear()


def test_what_a_process_has_set_does_not_count(monkeypatch, tmp_path):
    monkeypatch.setenv("CTP_CACHE", str(tmp_path))
    cpu_rates.cache_clear()
    torch.set_default_device("meta")  # where products take no time at all
    try:
        with torch.autocast("cpu", torch.bfloat16):
            assert cpu_rates()["float32"] < 1e13
    finally:
        torch.set_default_device(None)
        cpu_rates.cache_clear()


def test_an_interrupted_widening_is_undone(slow):
    model = tiny_llama().bfloat16()
    model(random_windows(1, 4), labels=random_windows(1, 4)).loss.backward()

    def interrupted(fn, recurse=True):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.lm_head, "_apply", interrupted)
        with pytest.raises(KeyboardInterrupt), widened(model):
            pass
    with widened(model):
        assert model.dtype == torch.float32
    assert {p.dtype for p in model.parameters()} == {p.grad.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.skipif(not torch.cpu._is_avx2_supported(), reason="the variables mean something on x86 with AVX2 only")
def test_without_instructions_for_bfloat16_it_is_found_slow(tmp_path):
    """oneDNN still says that it supports bfloat16 on some of these machines: only a measurement tells."""
    env = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "CTP_CACHE": str(tmp_path)}
    code = "from ctp.machine.arithmetic import computed_in; print(computed_in('bfloat16', 'cpu'))"
    told = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "float32"


def test_a_device_is_one_that_is_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert (device.pick("auto"), device.pick("cpu")) == ("cpu", "cpu")
    for wrong, why in [("cuda", "no GPU"), ("tpu", "allowed")]:
        with pytest.raises(ValueError, match=why):
            device.pick(wrong)


# -------------------------------------------------------------------------- models


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("make", [tiny_llama, tiny_opt, tiny_bloom])  # heads of their own, and tied ones
def test_a_model_is_held_in_float32_for_a_while(slow, make, dtype):
    model = make().to(dtype)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    dtypes = [t.dtype for t in (*model.parameters(), *model.buffers())]
    head = model.get_output_embeddings().weight
    with widened(model):
        assert model.dtype == torch.float32
        assert model.get_output_embeddings().weight is head  # tied as before
        assert all(torch.equal(t, before[n].to(t.dtype)) for n, t in model.state_dict().items())
        windows = random_windows(2, 8)
        assert torch.equal(model(windows).logits, copy.deepcopy(model).float()(windows).logits)
    assert [t.dtype for t in (*model.parameters(), *model.buffers())] == dtypes
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_a_model_that_its_device_computes_fast_stays_as_it_is(fast):
    model = tiny_llama().bfloat16()
    assert widen(model) == ""
    assert model.dtype == torch.bfloat16
    assert widen(tiny_llama()) == ""


def test_packed_weights_keep_their_type(slow):
    model = tiny_llama().bfloat16()
    small = Compressed.of(model, compress_model(model, random_windows(4, 16), GPTQ(bits=4)), None)
    packed, dense = small.model(packed=True), small.model()
    scales = [m.scale.clone() for m in packed.modules() if isinstance(m, PackedLinear)]
    for each in (packed, dense):
        assert "bfloat16" in widen(each)
    found = [m.scale for m in packed.modules() if isinstance(m, PackedLinear)]
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(found, scales, strict=True))
    windows = random_windows(2, 8)
    assert packed(windows).logits.dtype == torch.float32
    assert torch.equal(packed(windows).logits, dense(windows).logits)


# ---------------------------------------------------------------------- compressing


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("method", [GPTQ(bits=3), SparseGPT(sparsity=0.5), SparseGPT(sparsity=0.5, bits=4)])
def test_compression_runs_in_float32_and_stores_the_models_own_type(slow, method, dtype):
    model = tiny_llama().to(dtype)
    wide = copy.deepcopy(model).float()
    others = {n: t.clone() for n, t in model.state_dict().items() if ".layers." not in n}
    layers = compress_model(model, random_windows(8, 16), method)
    assert model.dtype == dtype
    assert all(torch.equal(t, others[n]) for n, t in model.state_dict().items() if n in others)
    small = Compressed.of(model, layers, None)  # raises where unpacking does not give the very weights
    assert small.config.dtype == dtype
    plain = compress_model(wide, random_windows(8, 16), method)
    for name, layer in layers.items():
        weight = model.get_parameter(f"{name}.weight")
        assert torch.equal(layer.dense(dtype), weight)
        # The same forward passes and Hessians for the first block: the same mask, and codes but for rounded scales.
        if ".0.self_attn.q_proj" in name and layer.mask is not None:
            assert torch.equal(layer.mask, plain[name].mask)
        spread = plain[name].dense(torch.float32).std()
        assert (weight.float() - plain[name].dense(torch.float32)).abs().mean() < 0.1 * spread


# ------------------------------------------------------------------------- learning


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_bfloat16_model_learns_as_the_same_numbers_in_float32(slow, precision):
    model = tiny_llama().bfloat16()
    wide = copy.deepcopy(model).float()
    found, exact = run(model, precision=precision), run(wide, precision="fp32")
    assert torch.equal(found.embeddings, exact.embeddings)
    assert found.history == exact.history
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_float16_model_learns_on_a_cpu(precision):
    """In float32: no loss scale is needed."""
    model = tiny_llama().half()
    found = run(model, precision=precision)
    assert found.best_val_loss < found.history[0]["val_loss"]
    assert {p.dtype for p in model.parameters()} == {torch.float16}
    if precision == "fp16":
        assert torch.equal(found.embeddings, run(tiny_llama().half().float(), precision="fp32").embeddings)


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
@pytest.mark.parametrize("make", [tiny_llama, tiny_opt])
def test_weights_are_rounded_as_asked(slow, make, precision, dtype):
    found = run(make(), precision=precision)
    assert torch.equal(found.embeddings, run(rounded_linears(make(), dtype), precision="fp32").embeddings)
    assert not torch.equal(found.embeddings, run(make(), precision="fp32").embeddings)


def test_it_differs_from_native_arithmetic_by_rounding(monkeypatch):
    """bfloat16 has 8 binary digits: activations that are rounded to them move the loss by some thousandths."""
    losses = []
    for rate in (1e9, 3e11):
        monkeypatch.setattr(arithmetic, "cpu_rates", lambda rate=rate: {"float32": 1e11, "bfloat16": rate})
        losses.append(run(tiny_llama(), precision="bf16").best_val_loss)
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


@pytest.mark.parametrize("make", [tiny_llama, tiny_opt, tiny_qwen2])
def test_packed_weights_and_biases_are_rounded_too(slow, make):
    model = make()
    small = Compressed.of(model, compress_model(model, random_windows(4, 16), GPTQ(bits=4)), None)
    windows = random_windows(8, S, seed=1)
    found = [learn(small.model(packed=p), windows, windows[:4], spec(precision="bf16"), runtime=ON_CPU).embeddings
             for p in (False, True)]  # fmt: skip
    assert torch.equal(*found)


@pytest.mark.parametrize(("dtype", "precision"), [(torch.bfloat16, "fp16"), (torch.float16, "bf16")])
def test_a_model_of_one_type_learns_in_the_other(fast, dtype, precision):
    """On a CPU that computes one of the two only."""
    model = tiny_llama().to(dtype)
    found = run(model, precision=precision)
    assert found.best_val_loss < found.history[0]["val_loss"]
    assert {p.dtype for p in model.parameters()} == {dtype}


def test_experts_are_rounded_too(slow):
    """They are no linears, but parameters of three dimensions."""
    rounded = rounded_linears(tiny_mixtral(), torch.bfloat16)
    for p in rounded.parameters():
        if p.ndim == 3:
            p.data = p.data.bfloat16().float()
    model = tiny_mixtral()
    found = run(model, precision="bf16")
    assert torch.equal(found.embeddings, run(rounded, precision="fp32").embeddings)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), tiny_mixtral().parameters(), strict=True))


def test_lora_learns_in_float32(slow):
    text = {"dataset": "given", "split": "train", "seq_len": S}
    lora = LoRA(text=text, steps=4, validate_every=2, r=2, alpha=4, batch=2, precision="bf16")
    windows = random_windows(8, S, seed=1)
    model = tiny_llama().bfloat16()
    wide = copy.deepcopy(model).float()
    found = learn_lora(model, windows, windows[:4], lora, runtime=ON_CPU)
    exact = learn_lora(wide, windows, windows[:4], lora.model_copy(update={"precision": "fp32"}), runtime=ON_CPU)
    assert all(torch.equal(t, exact.weights[n]) for n, t in found.weights.items())
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


# ------------------------------------------------------------------ a grid, and Python


@pytest.fixture
def bench(tmp_path, slow):
    folder = model_folder(tmp_path / "tiny-llama")
    models_ = {"name": str(folder), "dtype": "bfloat16"}
    return Bench(tmp_path / "grid", folder, models=models_)


def test_every_kind_of_cell_says_what_it_was_computed_in(bench):
    for cell in bench.cells:
        bench.execute(cell)
        assert bench.store.manifest(ref(cell))["computed_in"] == "float32"
    source = next(c for c in bench.all(Compress) if c.compression.label == "gptq-3bit")
    assert Compressed.open(bench.store.fetch(ref(source))).config.dtype == torch.bfloat16
    model, _ = loading.load_compressed(source, bench.store, bench.runtime, "cpu")
    assert model.dtype == torch.float32
    stored, _ = loading.open_model(source, bench.store, bench.runtime, "cpu")
    assert stored.dtype == torch.bfloat16  # as an export is to have it
    assert all(torch.equal(t, model.state_dict()[n].to(t.dtype)) for n, t in stored.state_dict().items())
    bare = next(c for c in bench.all(Evaluate) if c.target == source and c.recovery is None)
    tokenizer = loading.load_compressed(source, bench.store, bench.runtime, "cpu")[1]
    ids = loading.token_windows(bare.measure.text, tokenizer, bench.runtime)
    assert bench.store.manifest(ref(bare))["metrics"]["ppl"] == pytest.approx(
        perplexity(stored.float(), ids).ppl, rel=1e-6
    )
    loading.forget()


def test_native_arithmetic_is_recorded_too(bench, fast):
    cell = bench.all(Compress)[1]
    bench.execute(cell)
    assert bench.store.manifest(ref(cell))["computed_in"] == "bfloat16"
    loading.forget()


def test_a_precision_is_recorded_as_computed(tmp_path, slow):
    bench = Bench(tmp_path / "grid", model_folder(tmp_path / "tiny-llama"))
    learned = next(c for c in bench.cells if isinstance(c, Learn))
    half = learned.model_copy(update={"recovery": learned.recovery.model_copy(update={"precision": "bf16"})})
    for cell in (learned.source, half):
        bench.execute(cell)
    assert bench.store.manifest(ref(half))["computed_in"] == "float32"
    loading.forget()


def test_python_warns_and_loads_in_float32(slow, tmp_path):
    folder = model_folder(tmp_path / "tiny-llama")
    model, tokenizer = load_model(str(folder), "", "bfloat16")
    for save in (model.save_pretrained, tokenizer.save_pretrained):
        save(tmp_path / "half")
    with pytest.warns(UserWarning, match="no fast bfloat16: computing in float32") as told:
        loaded, _ = ctp.load(tmp_path / "half", device="cpu")
    assert told[0].filename == __file__  # at the line that called ctp
    assert loaded.dtype == torch.float32
    assert all(torch.equal(t, model.state_dict()[n].float()) for n, t in loaded.state_dict().items())
    texts = random_windows(40, S)
    with pytest.warns(UserWarning, match="no fast bfloat16"):
        ctp.compress(model, tokenizer, {"method": "gptq", "bits": 4}, texts)
    with pytest.warns(UserWarning, match="no fast float16"):
        ctp.learn_prompt(loaded, tokenizer, texts, k=2, steps=2, precision="fp16", device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ctp.load(folder, device="cpu")  # float32: nothing to say


def test_a_loaded_model_compresses_to_the_type_that_it_was_stored_in(slow, tmp_path):
    folder = model_folder(tmp_path / "tiny-llama")
    model, tokenizer = load_model(str(folder), "", "bfloat16")
    for save in (model.save_pretrained, tokenizer.save_pretrained):
        save(tmp_path / "half")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded, _ = ctp.load(tmp_path / "half", device="cpu")
        found, exact = (ctp.compress(m, tokenizer, {"method": "gptq", "bits": 4}, random_windows(40, S))
                        for m in (loaded, model))  # fmt: skip
    assert found.config.dtype == torch.bfloat16
    assert all(torch.equal(t, exact.packed[n]) for n, t in found.packed.items())
    assert all(torch.equal(t, exact.rest[n]) and t.dtype == exact.rest[n].dtype for n, t in found.rest.items())
    assert loaded.dtype == torch.float32  # as its device computes it
    assert torch.equal(loaded.get_input_embeddings().weight, model.get_input_embeddings().weight.float())


def test_text_is_sampled_in_float32(slow, tmp_path):
    folder = model_folder(tmp_path / "tiny-llama")
    model, tokenizer = load_model(str(folder), "", "bfloat16")
    wide = copy.deepcopy(model).float()
    widen(model)
    asked = ["one", "another question"]
    assert answer_tokens(model, tokenizer, asked, new_tokens=6) == answer_tokens(wide, tokenizer, asked, new_tokens=6)
