"""Models that exist by name alone: the same on every machine, and fit for a study."""

import copy

import pytest
import torch
from mlflow.utils.validation import _validate_metric
from support.measured import loaded
from support.tinygrid import grid, write_grid

from ctp.cells import GPTQ
from ctp.cells.cell import Evaluate
from ctp.cells.runtime import Runtime
from ctp.compression.walk import compress_model
from ctp.execution import execute
from ctp.models import sources, tiny
from ctp.models.config import model_facts
from ctp.models.load import load_model
from ctp.planning import gridfile, plan
from ctp.planning.pins import Pins
from ctp.storage.ref import ref
from ctp.storage.store import Store

NAMES = tiny.NAMES
REVISIONS = {
    "tiny-opt-1": "8c9b953a9d0b30a1",
    "tiny-opt-2": "44f0803a391f56ca",
    "tiny-opt-3": "1302e9196c484d7b",
    "tiny-llama": "51f01ce7cf432cfb",
    "tiny-bloom": "224fcb8e87e3dfb2",
}
LOGITS = {  # in float64
    "tiny-opt-1": [1.243627, 0.946394, 1.192845, -0.746391],
    "tiny-opt-2": [-0.454001, -0.791074, 0.409171, -0.601871],
    "tiny-opt-3": [1.011845, 0.613652, 1.762782, -0.674508],
    "tiny-llama": [0.087512, 2.035707, 0.066907, 3.236400],
    "tiny-bloom": [2.315149, -0.032153, 0.330729, -2.741072],
}


@pytest.mark.parametrize("name", NAMES)
def test_revision_and_logits_are_pinned(name):
    """A recipe whose weights change must change its VERSION: results under the old revision are of the old weights."""
    _, revision, location = sources.locate(name)
    assert (revision.removeprefix("sha256:")[:16], location) == (REVISIONS[name], f"tiny:{name}")
    model, tokenizer = load_model(location, revision)
    ids = tokenizer("Compress, then prompt.", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = model.double()(ids).logits[0, -1, :4]
    # The weights are the same bits everywhere, and in float64 a processor's order of summation is not seen in six
    # digits: norms and softmax, which two of the architectures compute in float32, move them by 2e-7.
    assert logits.tolist() == pytest.approx(LOGITS[name], abs=2e-6)


def test_weights_are_the_same_bits_after_other_random_numbers(tmp_path):
    for number, folder in enumerate(("a", "b")):
        (tmp_path / folder).mkdir()
        torch.manual_seed(number)
        before = torch.get_rng_state()
        tiny._make("tiny-bloom", tmp_path / folder)
        assert torch.equal(torch.get_rng_state(), before)
    a, b = ((tmp_path / folder / "model.safetensors").read_bytes() for folder in ("a", "b"))
    assert a == b


def test_they_differ_and_are_made_once(monkeypatch):
    assert len({sources.locate(name)[1] for name in NAMES}) == len(NAMES)
    first = tiny.folder(*reversed(sources.locate("tiny-opt-1")[1:]))
    monkeypatch.setattr(tiny, "_make", None)
    assert tiny.folder(*reversed(sources.locate("tiny-opt-1")[1:])) == first


@pytest.mark.parametrize("name", NAMES)
def test_logits_depend_on_what_was_read_before(name):
    model, tokenizer = loaded(name)
    ids = tokenizer("Pruning and quantizing make a model worse.", return_tensors="pt")["input_ids"]
    other = ids.clone()
    other[0, 3] += 1
    with torch.no_grad():
        a, b = model(ids).logits[0], model(other).logits[0]
    assert torch.equal(a[:3], b[:3])
    # 39 tokens later still by a few percent of what logits vary by; rounding would be a ten-thousandth of that.
    assert (a[-1] - b[-1]).abs().mean() > 0.01 * a.std()
    assert (a.argmax(-1) == ids[0]).float().mean() < 0.5  # no model that only says its last token again


@pytest.mark.parametrize("name", NAMES)
def test_facts(name):
    _, revision, location = sources.locate(name)
    facts = model_facts(location, revision)
    model, _ = loaded(name)
    assert facts.context is None if name == "tiny-bloom" else facts.context >= 2048
    assert (facts.dtype, facts.width) == ("float32", model.get_input_embeddings().embedding_dim)
    assert facts.parameters == sum(p.numel() for p in model.parameters())
    assert 64 in facts.in_features or 128 in facts.in_features
    assert not facts.refused


def test_the_tokenizer_is_bytes_behind_a_beginning():
    _, tokenizer = loaded("tiny-llama")
    text = "Größe: 5 µm\n"
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id == 257
    assert len(ids) == 1 + len(text.encode())
    assert tokenizer.decode(ids[1:]) == text
    assert tokenizer.eos_token_id == 256
    assert len(tokenizer) == tiny.VOCAB
    assert tokenizer("", add_special_tokens=False)["input_ids"] == []


def test_compression_changes_them():
    model, _ = loaded("tiny-opt-1")
    dense = copy.deepcopy(model)
    windows = torch.randint(256, (8, 32), generator=torch.Generator().manual_seed(0))
    compress_model(model, windows, GPTQ(bits=2))
    with torch.no_grad():
        assert (model(windows).logits - dense(windows).logits).abs().mean() > 0.05


def test_a_grid_with_every_measure_here_on_a_tiny_model_by_name(tmp_path):
    pins, store = Pins(), Store(str(tmp_path / "store"))
    measures = [
        {"method": "perplexity", "text": {"dataset": "pydoc", "split": "test", "seq_len": 24, "count": 4}},
        {"method": "latency", "seq_len": 30, "new_tokens": 2, "warmup": 0, "repeats": 2},
        {"method": "generation", "questions": "Why?\nWhere?", "new_tokens": 4},
        {"method": "neighbours", "top": 3},
    ]
    content = grid("tiny-bloom", compression=["dense", {"method": "gptq", "bits": 3}], measures=measures)
    made = plan.make(gridfile.load(str(write_grid(tmp_path / "g.yaml", content)), [], pins), pins)
    runtime = Runtime(device="cpu", locations=pins.locations, checkpoint_seconds=0.0)
    for cell in made.cells():
        execute.execute(cell, store, runtime, lambda numbers: None)
    manifests = [
        (c.measure.method, c.recovery, store.manifest(ref(c))) for c in made.cells() if isinstance(c, Evaluate)
    ]
    of = {method: [m["metrics"] for name, _, m in manifests if name == method] for method, _, _ in manifests}
    assert len({numbers["ppl"] for numbers in of["perplexity"]}) == 4  # two targets, with and without the prompt
    assert sorted(numbers["prompt_tokens"] for numbers in of["latency"]) == [0, 0, 4, 4]
    assert [numbers["questions"] for numbers in of["generation"]] == [2] * 4
    assert [numbers["rows"] for numbers in of["neighbours"]] == [4] * 2
    files = {"latency": "latency.json", "generation": "answers.json", "neighbours": "neighbours.json"}
    for method, _, manifest in manifests:
        assert files.get(method, "result.json") in manifest["files"]
        assert ("machine_detail" in manifest) == (method == "latency")
        for name, value in manifest["metrics"].items():
            _validate_metric(name, value, 0, 0)  # what MLflow takes


def test_what_is_not_there_says_so():
    with pytest.raises(ValueError, match=r"^there is no tiny model 'tiny-gpt', allowed: tiny-opt-1, "):
        tiny.folder("tiny:tiny-gpt", "sha256:0")
    with pytest.raises(ValueError, match=r"^revision = 'sha256:0': this version of ctp makes tiny-llama as sha256:"):
        load_model("tiny:tiny-llama", "sha256:0")
