"""Cells done without Ray: what is stored is what was computed, on every architecture."""

import math
from importlib.metadata import version

import pytest
import torch
from support.bench import Bench
from support.tinygrid import model_folder

from ctp.cells.cell import Compress, Evaluate, Learn
from ctp.cells.events import Notice
from ctp.cells.labels import slug
from ctp.compression.walk import compress_model
from ctp.evaluation.perplexity import perplexity
from ctp.execution import loading
from ctp.formats.pack import pack
from ctp.models.load import load_model
from ctp.prompts import prefix
from ctp.prompts.files import load_prompt
from ctp.storage.ref import ref


@pytest.fixture(params=["llama", "opt", "bloom", "mixtral"])
def bench(request, tmp_path):
    return Bench(tmp_path, model_folder(tmp_path / request.param, request.param))


def test_the_whole_graph(bench):
    for cell in bench.cells:
        bench.execute(cell)
    assert len(bench.store.done(map(ref, bench.cells))) == len(bench.cells)
    for cell in bench.all(Evaluate):
        numbers = bench.store.manifest(ref(cell))["metrics"]
        k = cell.recovery.recovery.k if cell.recovery else 0
        assert numbers["scored_tokens"] == 4 * 23
        assert numbers["positions"] == 4 * (23 + k)
        assert numbers["ppl"] == pytest.approx(math.exp(numbers["nll_sum"] / (4 * 23)), rel=1e-12)
        assert numbers["ppl_paper"] == pytest.approx(math.exp(numbers["nll_sum"] / (4 * (23 + k))), rel=1e-12)
        assert bench.store.manifest(ref(cell))["text"]["tokens"] == 4 * 24
    joint = next(c for c in bench.all(Compress) if c.compression.label == "sparsegpt-50-4bit")
    assert bench.store.manifest(ref(joint))["metrics"]["sparsity"] == pytest.approx(0.5, abs=0.01)
    manifest = bench.store.manifest(ref(bench.all(Learn)[0]))
    assert manifest["versions"]["torch"] == version("torch")
    assert manifest["seconds"] > 0


def test_a_stored_model_is_bit_for_bit_the_one_that_was_compressed(bench):
    for cell in bench.all(Compress)[1:]:
        bench.execute(cell)
        stored, _ = loading.load_compressed(cell, bench.store, bench.runtime, "cpu")
        model, tokenizer = load_model(
            bench.pins.locations[f"{cell.model.name}@{cell.model.revision}"], cell.model.revision
        )
        ids = loading.token_windows(cell.calibration, tokenizer, bench.runtime)
        compress_model(model, ids, cell.compression)
        ours, theirs = stored.state_dict(), model.state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[n], theirs[n]) for n in ours)
        assert torch.equal(stored(ids[:1]).logits, model(ids[:1]).logits)  # buffers outside the state dict too


def test_experts_short_of_calibration_tokens_are_told_and_recorded(tmp_path):
    bench, told = Bench(tmp_path, model_folder(tmp_path / "moe", "mixtral")), []
    cell = next(c for c in bench.all(Compress) if c.compression.label == "gptq-3bit")
    bench.execute(cell, told.append)
    manifest = bench.store.manifest(ref(cell))
    short = manifest["experts_short_of_tokens"]
    assert manifest["metrics"]["experts"] == 8
    assert manifest["metrics"]["experts_short_of_tokens"] == len(short) > 0
    assert manifest["metrics"]["expert_tokens_least"] == min(short.values())
    (text,) = [event.text for event in told if isinstance(event, Notice)]
    assert text.startswith(f"moe gptq-3bit: {len(short)} of 8 experts were routed fewer calibration tokens than")
    assert "\n" not in text


def test_what_does_not_unpack_to_the_weights_is_not_stored(tmp_path, llama_folder, monkeypatch):
    bench = Bench(tmp_path, llama_folder)
    cell = next(c for c in bench.all(Compress) if c.compression.label == "gptq-3bit")

    def careless(layers):
        packed = pack(layers)
        if (codes := packed.get("model.layers.0.mlp.up_proj.codes")) is not None:
            codes[0] ^= 1
        return packed

    monkeypatch.setattr("ctp.formats.artifact.pack", careless)
    with pytest.raises(ArithmeticError, match=r"^model\.layers\.0\.mlp\.up_proj: unpacking"):
        bench.execute(cell)
    assert not bench.store.has(ref(cell))


def test_numbers_are_those_of_the_stored_artifacts(bench):
    cell = next(c for c in bench.all(Evaluate) if c.recovery and c.target.compression.label == "gptq-3bit")
    for each in (*cell.recovery.inputs, cell.recovery, cell):
        bench.execute(each)
    model, tokenizer = loading.open_model(cell.target, bench.store, bench.runtime, "cpu")
    ids = loading.token_windows(cell.measure.text, tokenizer, bench.runtime)
    prompt = load_prompt(bench.store.fetch(ref(cell.recovery)))
    again = perplexity(model, ids, prompt, batch=bench.runtime.batch)
    assert again.nll_sum == bench.store.manifest(ref(cell))["metrics"]["nll_sum"]


def test_a_prompts_texts_share_one_pass_over_its_rows(tmp_path, llama_folder, monkeypatch):
    """Cells of one target, prompt by prompt: the rows go through the model once, and every text is tokenised once."""
    prompts = [{"method": "random_prompt", "k": 3, "seed": seed} for seed in (0, 1)]
    texts = [{"dataset": name, "split": "test", "seq_len": 24, "count": 5} for name in ("pydoc", "newswire")]
    measures = [{"method": "perplexity", "text": text} for text in texts]
    bench = Bench(tmp_path, llama_folder, compression=["dense", {"method": "gptq", "bits": 3}], sources=[],
                  recovery=prompts, measures=measures)  # fmt: skip
    for cell in bench.cells:
        if not isinstance(cell, Evaluate):
            bench.execute(cell)
    made, cut = [], []
    own_prefix, own_windows = prefix.prefix, loading.cut_windows
    monkeypatch.setattr(prefix, "prefix", lambda *given: made.append(given) or own_prefix(*given))
    monkeypatch.setattr(loading, "cut_windows", lambda *given: cut.append(given) or own_windows(*given))
    monkeypatch.setattr(loading, "_windows", {})
    cells = sorted(bench.all(Evaluate), key=lambda c: (c.target.compression.label, slug(c.recovery or c.target)))
    for cell in cells:
        bench.execute(cell)
    assert len(made) == 2 * 2  # targets, prompts
    assert len(cut) == 2  # texts
    loading.forget()
    for cell in cells:
        model, _ = loading.open_model(cell.target, bench.store, bench.runtime, "cpu")
        rows = load_prompt(bench.store.fetch(ref(cell.recovery))) if cell.recovery else None
        alone = perplexity(model, next(iter(w for s, w in loading._windows.items() if s[0] == cell.measure.text)), rows)
        assert bench.store.manifest(ref(cell))["metrics"]["nll_sum"] == alone.nll_sum


def test_a_done_cell_is_not_done_again(tmp_path, llama_folder):
    bench = Bench(tmp_path, llama_folder)
    cell = bench.all(Compress)[1]
    bench.execute(cell)
    before = bench.store.manifest(ref(cell))
    bench.execute(cell)
    assert bench.store.manifest(ref(cell)) == before


def test_an_interrupted_prompt_goes_on_from_its_last_state(tmp_path, llama_folder):
    """The second half alone is computed, and the bytes are those of a run that nothing interrupted."""
    whole, cut = Bench(tmp_path / "a", llama_folder), Bench(tmp_path / "b", llama_folder)
    cell = whole.all(Learn)[0]
    for bench in (whole, cut):
        bench.execute(cell.source)
    whole.execute(cell)

    def die(progress):
        if progress.step == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cut.execute(cell, die)
    assert not cut.store.has(ref(cell))
    assert 3 <= next(iter(cut.store.states.started().values())) <= 4
    steps = []
    cut.execute(cell, lambda progress: steps.append(progress.step))
    assert min(steps) >= 3
    one, two = (load_prompt(b.store.fetch(ref(cell))) for b in (whole, cut))
    assert torch.equal(one, two)
    assert cut.store.states.started() == {}


def test_too_little_text_fails_in_words(tmp_path, llama_folder):
    bench = Bench(tmp_path, llama_folder, calibration={"dataset": "newswire", "split": "train", "seq_len": 24})
    bench.execute(bench.all(Compress)[0])
    measure = bench.all(Evaluate)[0].measure
    few = measure.text.model_copy(update={"count": 10**6})
    cell = bench.all(Evaluate)[0].model_copy(update={"measure": measure.model_copy(update={"text": few})})
    with pytest.raises(ValueError, match="1000000"):
        bench.execute(cell)
    assert not bench.store.has(ref(cell))


def test_packaged_texts_on_a_real_model(tmp_path, trained):
    """One text calibrates and teaches; compression hurts a trained model on it, and the prompt lowers its loss."""
    text = {"dataset": "pydoc", "split": "train", "seq_len": 64}
    bench = Bench(
        tmp_path, trained,
        compression=["dense", {"method": "sparsegpt", "sparsity": 0.9}],
        calibration={**text, "count": 16, "sampling": "crops"},
        sources="all",
        transfer="own",
        recovery={"method": "soft_prompt", "k": 8, "text": {**text, "documents": 80, "count": 200},
                  "validation": {"split": "train", "skip": 80, "count": 8},
                  "steps": 60, "validate_every": 20, "lr": 0.05},
        measures=[{"method": "perplexity", "text": {"dataset": name, "split": "test", "seq_len": 64, "count": 16}}
                  for name in ("pydoc", "newswire")],
    )  # fmt: skip
    for cell in bench.cells:
        bench.execute(cell)
    found = {(c.target.compression.label, c.recovery is not None, c.measure.text.dataset):
             bench.store.manifest(ref(c))["metrics"]["ppl"] for c in bench.all(Evaluate)}  # fmt: skip
    assert len(found) == 8
    for name in ("pydoc", "newswire"):
        assert found["sparsegpt-90", False, name] > found["dense", False, name]
    assert found["dense", False, "newswire"] > found["dense", False, "pydoc"]  # which the model has not learned
    assert found["sparsegpt-90", True, "pydoc"] < found["sparsegpt-90", False, "pydoc"]
