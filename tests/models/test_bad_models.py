"""Broken models, adapters and texts are told in one line when a grid is planned; pickles are never opened."""

import json
import os
import pickle
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.adapters import save_prompt
from support.badinput import refused  # noqa: F401  (a fixture)
from support.tiny import tiny_llama
from support.tinygrid import VOCAB, grid, model_folder
from tokenizers import Tokenizer

from ctp.models import sources
from ctp.models.load import check_usable, load_model
from ctp.storage.ref import identity, ref
from ctp.storage.remote import StoreError
from ctp.storage.store import Store


class Canary:
    """An object whose unpickling makes a folder: who opens it is found out."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture
def canary(tmp_path):
    """The bytes of a pickle that does something; nothing of the test may have done it."""
    yield pickle.dumps({"weight": Canary(tmp_path / "sang")}, protocol=2)
    assert not (tmp_path / "sang").exists()


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """A whole llama, an OPT, and a wider llama."""
    root = tmp_path_factory.mktemp("originals")
    return {
        "llama": model_folder(root / "llama"),
        "opt": model_folder(root / "opt", "opt"),
        "wide": model_folder(root / "wide", hidden=64),
    }


@pytest.fixture
def broken(originals, tmp_path):
    """A copy of the llama to break."""
    return shutil.copytree(originals["llama"], tmp_path / "broken")


def config(folder, **changes):
    said = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(said | changes))


def cut(folder, last):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:last])


def index(folder, name):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))


def without(folder, name):
    """All weights but one."""
    tensors = {n: t.clone() for n, t in load_file(folder / "model.safetensors").items() if n != name}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def shards(folder, change):
    """Two shards and their index; change: what is then done to what it maps."""
    tensors = {n: t.clone() for n, t in load_file(folder / "model.safetensors").items()}
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    mapped = {n: f"model-0000{1 + (i % 2)}-of-00002.safetensors" for i, n in enumerate(names)}
    for file in set(mapped.values()):
        save_file({n: tensors[n] for n in names if mapped[n] == file}, folder / file, metadata={"format": "pt"})
    change(mapped)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": mapped}))


def auto_map(folder, file, **changes):
    said = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(said | changes))
    (folder / "code.py").write_text("raise SystemExit('code of a model was run')")


def more_tokens(folder):
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens(["<one>", "<two>"])
    tokenizer.save(str(folder / "tokenizer.json"))


BROKEN = {
    "no config": (lambda f, o: (f / "config.json").unlink(), "is a folder without config.json"),
    "empty config": (lambda f, o: (f / "config.json").write_text(""), "config.json is no JSON: Expecting value"),
    "config is no JSON": (lambda f, o: (f / "config.json").write_text("{x"),
     "config.json is no JSON: Expecting property"),
    "config is a list": (lambda f, o: (f / "config.json").write_text("[1]"), "no JSON object but a list"),
    "config is null": (lambda f, o: (f / "config.json").write_text("null"), "no JSON object but a NoneType"),
    "config is no text": (lambda f, o: (f / "config.json").write_bytes(b"\xff\xfe"), "config.json is no JSON: 'utf-8'"),
    "config of nothing": (lambda f, o: (f / "config.json").write_text("{}"), "Should have a `model_type` key"),
    "unknown architecture": (lambda f, o: config(f, model_type="nope"), "has model type `nope`"),
    "no causal model": (lambda f, o: config(f, model_type="t5"), "model_type = 't5' is no causal language model"),
    "size below zero": (lambda f, o: config(f, hidden_size=-1), "The hidden size (-1) is not a multiple"),
    "size in words": (lambda f, o: config(f, hidden_size="big"), "'hidden_size' expected int, got str (value: 'big')"),
    "a huge size": (lambda f, o: config(f, hidden_size=10**12), "1000000000000), and the weight is"),
    "many layers": (lambda f, o: config(f, num_hidden_layers=10**7), "num_hidden_layers = 10000000: should be a whole"),
    "no layers": (lambda f, o: config(f, num_hidden_layers=0), "num_hidden_layers = 0: should be a whole number"),
    "no heads": (lambda f, o: config(f, num_attention_heads=0), "cannot be used: ZeroDivisionError"),
    "no context": (lambda f, o: config(f, max_position_embeddings=-5),
     "max_position_embeddings = -5: should be above 0"),
    "unknown dtype": (lambda f, o: config(f, dtype="float7"), "has no attribute 'float7'"),
    "quantized": (lambda f, o: config(f, quantization_config={"quant_method": "gptq"}), "is quantized already"),
    "quantized somehow": (lambda f, o: config(f, quantization_config="x"), "cannot be used"),
    "a kernel from the hub": (lambda f, o: config(f, attn_implementation="evil/kernel"), "cannot be used"),
    "config of OPT": (lambda f, o: shutil.copy(o["opt"] / "config.json", f), "the weights are another model's"),
    "config of another size": (lambda f, o: shutil.copy(o["wide"] / "config.json", f),
     "(257, 64), and the weight is (257, 32)"),
    "a layer too few": (lambda f, o: config(f, num_hidden_layers=3),
     "a block model.layers.2, of which there is no weight"),
    "other vocabulary": (lambda f, o: config(f, vocab_size=300), "(300, 32), and the weight is (257, 32)"),
    "truncated weights": (lambda f, o: cut(f, -100), "is damaged: 142,188 bytes, and its header tells of 142,288"),
    "truncated header": (lambda f, o: cut(f, 200), "is no safetensors file, or a part of one: 200 bytes"),
    "empty weights": (lambda f, o: cut(f, 0), "is no safetensors file, or a part of one: 0 bytes"),
    "no weights": (lambda f, o: (f / "model.safetensors").unlink(), "holds no .safetensors file"),
    "weights of another name": (lambda f, o: (f / "model.safetensors").rename(f / "w.safetensors"), "holds neither"),
    "weights are a folder": (lambda f, o: [(f / "model.safetensors").unlink(), (f / "model.safetensors").mkdir()],
     "is no file"),
    "a dead link": (lambda f, o: [(f / "model.safetensors").unlink(), (f / "model.safetensors").symlink_to("x")],
     "is no file"),
    "index of a file elsewhere": (lambda f, o: index(f, "../llama.safetensors"),
     "names '../llama.safetensors': should be"),
    "index of a pickle": (lambda f, o: index(f, "weights.bin"), "names 'weights.bin': should be a .safetensors file"),
    "index of what is not there": (lambda f, o: index(f, "b.safetensors"), "lacks b.safetensors, which"),
    "a head that lacks": (lambda f, o: without(f, "lm_head.weight"),
                          "are incomplete: lm_head.weight missing"),
    "a norm that lacks": (lambda f, o: without(f, "model.norm.weight"),
                          "are incomplete: model.norm.weight missing"),
    "index without a tensor": (lambda f, o: shards(f, lambda m: m.pop("lm_head.weight")),
                               "holds lm_head.weight, which is nowhere as model.safetensors.index.json says"),
    "index of another shard": (lambda f, o: shards(f, lambda m: m.update({"lm_head.weight": min(m.values())
                                                   if m["lm_head.weight"] == max(m.values()) else max(m.values())})),
                               "holds lm_head.weight, which is in model-0000"),
    "a shard that lacks": (lambda f, o: [shards(f, lambda m: None), (f / "model-00002-of-00002.safetensors").unlink()],
                           "lacks model-00002-of-00002.safetensors, which model.safetensors.index.json names"),
    "code for its configuration": (lambda f, o: auto_map(f, "config.json",
                                                  model_type="own", auto_map={"AutoConfig": "code.X"}),
                                   "it needs Python code that comes with it (auto_map in config.json)"),
    "code for its tokenizer": (lambda f, o: auto_map(f, "tokenizer_config.json", tokenizer_class="Own",
                                                     auto_map={"AutoTokenizer": ["code.X", None]}),
                               "it needs Python code that comes with it (auto_map in tokenizer_config.json)"),
    "no tokenizer": (lambda f, o: [(f / n).unlink() for n in ("tokenizer.json", "tokenizer_config.json")],
                     "the tokenizer of"),
    "tokenizer is no JSON": (lambda f, o: (f / "tokenizer.json").write_text("x"), "the tokenizer of"),
    "tokenizer of nothing": (lambda f, o: (f / "tokenizer.json").write_text("{}"), "the tokenizer of"),
    "tokenizer of another model": (lambda f, o: more_tokens(f),
     "has tokens up to 258, and the model's embedding 257 rows"),
    "an adapter beside it": (lambda f, o: (f / "adapter_config.json").write_text("{}"),
     "holds an adapter beside the model"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_model_is_told_before_anything_runs(refused, broken, originals, name):
    act, said = BROKEN[name]
    act(broken, originals)
    line = refused(grid(broken))
    assert line.startswith(f"models = '{broken}': ")
    assert said in line


@pytest.mark.parametrize("architecture", ["llama", "opt", "bloom", "mixtral"])
def test_whole_models_are_whole(tmp_path, architecture):
    """Tied heads are in no file, and experts have other names there."""
    for name in ("one", "shards"):
        model = model_folder(tmp_path / name, architecture)
        if name == "shards":
            shards(model, lambda mapped: None)
        _, revision, location = sources.locate(str(model))
        check_usable(location, revision, VOCAB)


def test_a_weight_that_lacks_is_never_made_up(broken):
    tensors = load_file(broken / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    _, revision, location = sources.locate(str(broken))
    with pytest.raises(ValueError, match=r"are incomplete: model\.layers\.1\.mlp\.up_proj\.weight missing"):
        load_model(location, revision)


# --------------------------------------------------------------------------- pickles


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.safetensors", "model.pkl"])
def test_a_pickled_model_is_refused_unopened(refused, broken, canary, name):
    (broken / "model.safetensors").unlink()
    (broken / name).write_bytes(canary)
    line = refused(grid(broken))
    assert "ctp loads no pickled weights" in line or "is no safetensors file" in line


def test_a_pickle_beside_safetensors_stays_closed(broken, canary):
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "tokenizer.pkl", "model.ckpt"):
        (broken / name).write_bytes(canary)
    _, revision, location = sources.locate(str(broken))
    model, _ = load_model(location, revision)
    assert model.config.vocab_size == VOCAB


def test_torchs_own_format_under_a_safe_name_is_refused(refused, broken, tmp_path):
    torch.save({"weight": Canary(tmp_path / "sang")}, broken / "model.safetensors")
    assert "is no safetensors file" in refused(grid(broken))
    assert not (tmp_path / "sang").exists()


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.safetensors"])
def test_a_pickled_adapter_is_refused_unopened(refused, originals, tmp_path, canary, name):
    folder = save_prompt(tiny_llama(vocab=VOCAB), tmp_path / "adapter")
    (folder / "adapter_model.safetensors").unlink()
    (folder / name).write_bytes(canary)
    line = refused(grid(originals["llama"], recovery={"method": "adapter", "path": str(folder)}))
    assert "ctp loads no pickled weights" in line or "is no safetensors file" in line


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_a_pickled_checkpoint_is_refused_unopened(refused, broken, originals, canary, name):
    (broken / "model.safetensors").unlink()
    (broken / name).write_bytes(canary)
    line = refused(grid(originals["llama"], compression={"method": "checkpoint", "path": str(broken)}, sources="all"))
    assert "ctp loads no pickled weights" in line or "is no safetensors file" in line


def test_a_pickle_in_the_store_is_refused_unopened(originals, tmp_path, canary):
    from support.gridfiles import load
    from support.tinygrid import write_grid

    _, plan = load(write_grid(tmp_path / "g.yaml", grid(originals["llama"])))
    cell = next(c for c in plan.cells() if c.kind == "compress" and c.compression.label == "gptq-3bit")
    store = Store(str(tmp_path / "store"))
    with store.publish(
        ref(cell), identity(cell)
    ) as draft:  # as one who may write the store would put it there, hashes and all
        for name in ("compressed.safetensors", "rest.safetensors"):
            (draft.path / name).write_bytes(canary)
    from ctp.formats.artifact import Compressed

    with pytest.raises(ValueError, match="is missing or damaged"):
        Compressed.open(store.fetch(ref(cell)))
    file = next((tmp_path / "store").glob("compress/*/rest.safetensors"))
    file.write_bytes(canary + b"x")
    with pytest.raises(StoreError, match=f"has {len(canary) + 1} bytes, not the {len(canary)} that its manifest says"):
        Store(str(tmp_path / "store")).fetch(ref(cell))


# ----------------------------------------------------------------- adapters and texts


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (lambda f: (f / "adapter_config.json").write_text("nope"), "is no adapter's configuration"),
        (lambda f: (f / "adapter_config.json").write_text("[]"), "is no adapter's configuration"),
        (lambda f: (f / "adapter_config.json").unlink(), "it has no adapter_config.json"),
        (lambda f: (f / "adapter_model.safetensors").unlink(), "it has no adapter_model.safetensors"),
        (lambda f: (f / "adapter_model.safetensors").write_bytes(b""),
         "is no safetensors file, or a part of one: 0 bytes"),
        (lambda f: (f / "adapter_model.safetensors").write_bytes((f / "adapter_model.safetensors").read_bytes()[:-4]),
         "is damaged"),
    ],
)  # fmt: skip
def test_a_broken_adapter(refused, originals, tmp_path, act, said):
    folder = save_prompt(tiny_llama(vocab=VOCAB), tmp_path / "adapter")
    act(folder)
    assert said in refused(grid(originals["llama"], recovery={"method": "adapter", "path": str(folder)}))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("own.txt", b"", "own.txt is empty: there is no text in it"),
        ("own.txt", b" \n\n ", "own.txt is empty"),
        ("own.txt", b"caf\xe9 au lait", "own.txt: byte 3 is 0xe9: not UTF-8 text"),
        ("own.txt", "text".encode("utf-16"), "own.txt: byte 0 is 0xff: not UTF-8 text"),
        ("own.jsonl", b"", "own.jsonl is empty"),
        ("own.jsonl", b"no json\n", 'own.jsonl, line 1: no row {"text": '),
        ("own.jsonl", b"\n[1]\n", "own.jsonl, line 2: no row"),
        ("own.jsonl", b'{"txt": "a"}\n', "own.jsonl, line 1: no row"),
        ("own.jsonl", b'{"text": 3}\n', "own.jsonl, line 1: 'text' is no text"),
        ("own.jsonl", b"[" * 100_000 + b"\n", "own.jsonl, line 1: no row"),
        ("own.csv", b"a,b\n", "is neither .jsonl nor .txt"),
    ],
)
def test_a_broken_text(refused, originals, tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    whole = grid(originals["llama"], datasets={"own": {"path": str(tmp_path / name)}})
    whole["calibration"]["dataset"] = "own"
    assert said in refused(whole)


def test_a_text_is_looked_at_to_its_end_while_planning(tmp_path):
    from ctp.data.documents import locate_text
    from ctp.data.texts import parse_corpus

    corpus = parse_corpus("own", {"path": str(tmp_path)})
    file = tmp_path / "train.jsonl"
    file.write_bytes(b'{"text": "a"}\n' * 100_000 + b'{"text": "\xff"}\n')
    with pytest.raises(ValueError, match=r"train\.jsonl, line 100001: not UTF-8 text"):
        locate_text(corpus, "train")


def test_looking_at_a_model_is_cheap(broken):
    _, revision, location = sources.locate(str(broken))
    check_usable(location, revision, VOCAB)
    begun = time.process_time()
    for _ in range(20):
        check_usable(location, revision, VOCAB)
    assert time.process_time() - begun < 0.5  # remembered: 20 small files are looked for
