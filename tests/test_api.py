"""ctp from Python: the README's lines run as they stand, and what is loaded is what was made."""

import re
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from support.bench import Bench
from support.packed import same_weights
from support.tiny import tiny_llama
from support.tinygrid import VOCAB, byte_tokenizer, model_folder
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import ctp
from ctp import store as ctp_store
from ctp.cells.cell import Compress, Evaluate, Learn, key
from ctp.data.packaged import documents
from ctp.prompts.files import load_prompt
from ctp.storage.ref import ref
from ctp.storage.store import Store

README = Path(__file__).parents[1] / "README.md"


def block(heading: str) -> str:
    """The first Python block under a heading of the README."""
    section = README.read_text().split(f"## {heading}\n", 1)[1]
    return re.search(r"```python\n(.*?)```", section, re.S).group(1)


def texts() -> list[str]:
    return documents("pydoc", "train")[:60]


def test_the_readmes_ten_lines(tmp_path, monkeypatch, capsys) -> None:
    """As they stand, with a model and a text of that name in the working directory."""
    monkeypatch.chdir(tmp_path)
    model_folder(tmp_path / "my-model", hidden=64, context=128)
    (tmp_path / "my-text.txt").write_text("\n\n".join(texts()))
    code = block("In Python")
    lines = [line for line in code.splitlines() if line.strip() and not line.startswith(("import", "from"))]
    assert len(lines) <= 10
    names: dict = {}
    exec(code, names)
    assert capsys.readouterr().out.strip()
    stored = load_prompt(tmp_path / "my-prompt")
    assert stored.shape == (16, 64)
    assert sum(f.stat().st_size for f in (tmp_path / "my-small-model").glob("compressed.*")) < 64 * 1000


def test_what_is_compressed_is_loaded_bit_for_bit(tmp_path) -> None:
    model = tiny_llama(vocab=VOCAB, hidden=64)
    small = ctp.compress(model, byte_tokenizer(), {"method": "gptq", "bits": 3}, texts(), count=4, seq_len=24)
    small.save(tmp_path / "small")
    loaded, tokenizer = ctp.load(tmp_path / "small", device="cpu")
    assert same_weights(loaded, model)
    assert tokenizer("abc")["input_ids"] == byte_tokenizer()("abc")["input_ids"]
    for format in ("hf", "compressed-tensors", "gptq"):
        ctp.export(small, tmp_path / format, format)
        assert same_weights(ctp.load(tmp_path / format, device="cpu")[0], model)


def test_a_learned_prompt_helps_and_is_attached(tmp_path) -> None:
    model = tiny_llama(vocab=VOCAB, hidden=64, context=128)
    model.save_pretrained(tmp_path / "base")
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(tmp_path / "base")
    prompt = ctp.learn_prompt(model, tokenizer, texts(), k=4, seq_len=24, steps=30, lr=0.1, device="cpu")
    assert prompt.best_val_loss < prompt.history[0]["val_loss"]
    prompt.save(tmp_path / "prompt", str(tmp_path / "base"))
    ids = torch.tensor([tokenizer("hello")["input_ids"]])
    with torch.no_grad():
        alone = model(ids).logits
        expected = PeftModel.from_pretrained(model, tmp_path / "prompt")(ids).logits[:, 4:]
        for loaded, _ in (
            ctp.load(tmp_path / "prompt", device="cpu"),
            ctp.load(tmp_path / "base", prompt=tmp_path / "prompt", device="cpu"),
            ctp.load(tmp_path / "base", prompt=prompt.embeddings, device="cpu"),
        ):
            got = loaded(ids).logits
            # The same numbers; PEFT's mask makes transformers choose another attention kernel.
            assert torch.allclose(got, expected, rtol=1e-4, atol=1e-4)
            assert not torch.allclose(got, alone, atol=1e-2)


def test_a_lora_adapter_is_loaded_with_its_base(tmp_path) -> None:
    model_folder(tmp_path / "base")
    tuned = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"),
        LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], init_lora_weights=False),
    )
    tuned.save_pretrained(tmp_path / "lora")
    loaded, _ = ctp.load(tmp_path / "lora", device="cpu")
    ids = torch.arange(8)[None]
    assert torch.equal(loaded(ids).logits, tuned.eval()(ids).logits)


GPTQ4 = {"method": "gptq", "bits": 4, "group_size": 16}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, t: ctp.compress(m, t, {"method": "gptq", "bits": 5}, []), r"spec.bits = 5: should be 2, 3, 4 or 8"),
        (lambda m, t: ctp.compress(m, t, {"method": "dense"}, texts()), "calibrated methods only: gptq, sparsegpt"),
        (lambda m, t: ctp.compress(m, t, {"method": "gptq", "bits": 4}, "one text"), "texts: a list of documents"),
        (lambda m, t: ctp.compress(m, t, {"method": "gptq", "bits": 4}, ["short"]), "0 windows of 64"),
        (lambda m, t: ctp.learn_prompt(m, t, texts(), k=4, stepz=3), "stepz: unknown key .*; did you mean 'steps'"),
        (lambda m, t: ctp.learn_prompt(m, t, texts()), r"k = 100: leaves no room .* context of 64"),
        (lambda m, t: ctp.learn_prompt(m, t, ["word " * 60], seq_len=60, k=1), "10 are needed to hold one back"),
        (lambda m, t: ctp.load("/nowhere"), "there is no folder '/nowhere'"),
        (lambda m, t: ctp.load("someone/nothing"), "'someone/nothing' is no folder, the hub cannot be reached"),
        (lambda m, t: ctp.compress(m, None, GPTQ4, texts()), "tokenizer: a NoneType"),
        (lambda m, t: ctp.compress(torch.nn.Linear(2, 2), t, GPTQ4, texts()), "model: a Linear"),
        (lambda m, t: ctp.compress(m, t, GPTQ4, texts(), seq_len=-1), "texts.seq_len = -1: should be"),
        (lambda m, t: ctp.compress(m, t, GPTQ4, texts(), seq_len=65), "windows of 65 tokens .* context of 64"),
        (lambda m, t: ctp.compress(m, t, GPTQ4, texts(), count=-1), "count = -1"),
        (lambda m, t: ctp.compress(m, t, GPTQ4, torch.full((2, 9), 300)), "token ids 300..300"),
        (lambda m, t: ctp.learn_prompt(m, t, texts(), k="4"), "k = '4': should be a whole number"),
        (lambda m, t: ctp.learn_prompt(m, t, texts(), k=4, steps="5"), "settings.steps = '5'"),
        (lambda m, t: ctp.learn_prompt(m, t, texts(), k=4, device="gpu"), "device = 'gpu': allowed"),
        (lambda m, t: ctp.learn_prompt(m, t, texts(), k=4, text={}), "give the documents as texts"),
        (lambda m, t: ctp.export(m, "/tmp/x", "hf"), "a LlamaForCausalLM is neither"),
        (lambda m, t: ctp.attach_prompt(m, torch.full((2, 32), torch.nan)), "finite"),
        (lambda m, t: ctp.load("abcdef", store="memory://empty"), "no artifact in memory://empty"),
    ],
)  # fmt: skip
def test_mistakes_are_told_in_one_sentence(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call(tiny_llama(vocab=VOCAB), byte_tokenizer())


def test_a_wrapped_model_is_not_compressed() -> None:
    model, tokenizer = tiny_llama(vocab=VOCAB), byte_tokenizer()
    handle = ctp.attach_prompt(model, torch.zeros(2, 32))
    for call in (ctp.compress, ctp.learn_prompt):
        with pytest.raises(ValueError, match=r"soft prompt attached: remove\(\) it first"):
            call(model, tokenizer, *([GPTQ4] if call is ctp.compress else []), texts())
    handle.remove()
    tuned = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="model: a PeftModel"):
        ctp.compress(tuned, tokenizer, GPTQ4, texts())


def test_what_was_compressed_is_a_copy() -> None:
    """Training the model on, or a second one opened from it, does not reach into what is saved."""
    model = tiny_llama(vocab=VOCAB)
    small = ctp.compress(model, byte_tokenizer(), GPTQ4, texts(), count=4, seq_len=24)
    before = {n: t.clone() for n, t in small.rest.items()}
    one, other = small.model(), small.model()
    for each in (model, one):
        each.get_input_embeddings().weight.data.zero_()
    assert all(torch.equal(small.rest[n], t) for n, t in before.items())
    assert other.get_input_embeddings().weight.any()
    assert repr(small).startswith("<llama, 14 linears of 5.31 bits a weight: 3.01x smaller")


def test_defaults_for_generating_survive_whatever_they_are(tmp_path) -> None:
    """Published models say temperature without do_sample, which transformers itself refuses to save."""
    model = tiny_llama(vocab=VOCAB)
    model.generation_config = GenerationConfig(temperature=0.9, top_p=0.6, eos_token_id=2)
    small = ctp.compress(model, byte_tokenizer(), GPTQ4, texts(), count=4, seq_len=24)
    small.save(tmp_path / "small")
    for format in ("hf", "gptq"):
        ctp.export(tmp_path / "small", tmp_path / format, format)
    for folder in ("small", "hf", "gptq"):
        loaded, _ = ctp.load(tmp_path / folder, device="cpu")
        assert (loaded.generation_config.temperature, loaded.generation_config.top_p) == (0.9, 0.6)


def test_a_head_tied_by_hand_is_kept(tmp_path) -> None:
    model = tiny_llama(vocab=VOCAB)
    model.lm_head.weight = model.model.embed_tokens.weight  # and the configuration says that they are two
    ctp.compress(model, byte_tokenizer(), GPTQ4, texts(), count=4, seq_len=24).save(tmp_path / "small")
    assert same_weights(ctp.load(tmp_path / "small", device="cpu")[0], model)


def test_a_prompt_finds_its_model(tmp_path, monkeypatch) -> None:
    model, tokenizer = tiny_llama(vocab=VOCAB), byte_tokenizer()
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    prompt = ctp.learn_prompt(model, tokenizer, texts(), k=2, seq_len=24, steps=1, device="cpu")
    prompt.save(tmp_path / "prompt", "base")  # relative to the folder beside it, wherever one stands
    ctp.compress(model, tokenizer, GPTQ4, texts(), count=4, seq_len=24).save(tmp_path / "small")
    prompt.save(tmp_path / "small", str(tmp_path / "small"))  # in the model's own folder
    ids = torch.arange(8)[None]
    for what, plain in (("prompt", ctp.load(tmp_path / "base")[0]), ("small", model)):
        loaded, _ = ctp.load(tmp_path / what, device="cpu")
        with pytest.raises(ValueError, match="has a prompt already"):
            ctp.attach_prompt(loaded, prompt)
        ctp.attach_prompt(plain, prompt)
        assert torch.equal(loaded(ids).logits, plain(ids).logits)
        plain._attached_prompt.remove()
    assert {"load", "compress", "learn_prompt"} <= set(dir(ctp))


# ------------------------------------------------------------------------- the store


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stored")
    bench = Bench(folder, model_folder(folder / "tiny", hidden=64))
    for cell in bench.cells:
        bench.execute(cell)
    return bench


def test_models_and_prompts_are_loaded_by_key(bench) -> None:
    learn = bench.all(Learn)[0]
    store = bench.store.uri
    for cell in bench.all(Compress):
        model, _ = ctp.load(key(cell)[:12], store=store, device="cpu")
        ids = torch.arange(20)[None]
        alone = model(ids).logits
        if cell == learn.source:
            prompted, tokenizer = ctp.load(key(learn), store=store, device="cpu")
            got = prompted(ids).logits
            assert got.shape == alone.shape
            assert not torch.equal(got, alone)
            batch = tokenizer(["a b", "a longer one"], return_tensors="pt", padding=True)
            out = prompted.generate(**batch, max_new_tokens=4, min_new_tokens=4, do_sample=False)
            one = tokenizer(["a b"], return_tensors="pt")
            single = prompted.generate(**one, max_new_tokens=4, min_new_tokens=4, do_sample=False)
            assert out[0, -4:].tolist() == single[0, -4:].tolist()


def test_a_changed_base_model_is_noticed(tmp_path) -> None:
    folder = model_folder(tmp_path / "tiny")
    own = Bench(tmp_path, folder, compression=["dense"], sources=None, recovery=None)
    (dense,) = own.all(Compress)
    own.execute(dense)
    ctp.load(key(dense), store=own.store.uri)
    model_folder(folder, seed=1)
    with pytest.raises(ValueError, match="is no longer the one of tiny_dense"):
        ctp.load(key(dense), store=own.store.uri)


def test_ls_tells_true_ratios(bench, capsys) -> None:
    assert ctp_store.main(["--store", bench.store.uri, "ls", "--kind", "compress"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["key", "kind", "size", "model", "linears", "bits/weight", "artifact"]
    joint = next(c for c in bench.all(Compress) if c.compression.label == "sparsegpt-50-4bit")
    line = next(x for x in lines if x.startswith(key(joint)[:12])).split()
    folder = bench.store.fetch(ref(joint))
    from ctp.formats.artifact import Compressed

    small = Compressed.open(folder)
    packed = sum(t.numel() * t.element_size() for t in small.packed.values())
    rest = sum(t.numel() * t.element_size() for t in small.rest.values())
    weights = sum(layer.shape[0] * layer.shape[1] for _, layer in small.layers())
    parameters = weights + sum(t.numel() for t in small.rest.values())
    assert line[4] == f"{2 * parameters / (packed + rest):.2f}x"
    assert line[5] == f"{2 * weights / packed:.2f}x"
    assert line[6] == f"{8 * packed / weights:.2f}"
    assert len([x for x in lines if " compress " in x]) == 3


def test_export_from_the_command_line(bench, tmp_path, capsys) -> None:
    def run(cell, format, name):
        return ctp_store.main(
            ["--store", bench.store.uri, "export", key(cell)[:12], str(tmp_path / name), "--format", format]
        )

    gptq = next(c for c in bench.all(Compress) if c.compression.label == "gptq-3bit")
    for format in ("hf", "compressed-tensors", "gptq"):
        assert run(gptq, format, format) == 0
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "compressed-tensors")
    assert torch.equal(
        opened(torch.arange(9)[None]).logits,
        ctp.load(key(gptq), store=bench.store.uri)[0](torch.arange(9)[None]).logits,
    )
    assert AutoTokenizer.from_pretrained(tmp_path / "gptq")("abc")["input_ids"]
    learn = bench.all(Learn)[0]
    assert run(learn, "peft", "peft") == 0
    assert PeftModel.from_pretrained(opened, tmp_path / "peft").get_prompt(1).shape == (1, 4, 64)
    dense = bench.all(Compress)[0]
    assert run(dense, "hf", "dense") == 0
    capsys.readouterr()
    for cell, format, message in [
        (gptq, "hf", "is not empty"),
        (dense, "gptq", "--format gptq: for tiny_dense allowed: hf"),
        (learn, "hf", "allowed: peft"),
        (bench.all(Evaluate)[0], "hf", "it is an evaluation"),
    ]:
        assert run(cell, format, "hf" if message == "is not empty" else "other") == 2
        assert message in capsys.readouterr().err
    assert ctp_store.main(["--store", bench.store.uri, "export", "zz", str(tmp_path / "q"), "--format", "hf"]) == 2
    assert "no key" in capsys.readouterr().err


def test_a_damaged_artifact_is_not_exported(bench, tmp_path, capsys) -> None:
    import shutil

    copy = tmp_path / "store"
    shutil.copytree(bench.store.folders.root, copy)
    cell = bench.all(Compress)[1]
    path = Path(Store(str(copy)).folder(ref(cell))) / "compressed.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    command = ["--store", str(copy), "export", key(cell), str(tmp_path / "out"), "--format", "hf"]
    assert ctp_store.main(command) == 3
    assert "its bytes have changed" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
