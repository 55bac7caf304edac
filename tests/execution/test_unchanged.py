"""What a cell reads is what its key names: whatever changes after planning fails the cell, and nothing is stored."""

import json
import shutil
import subprocess
import sys

import pytest
from safetensors.torch import load_file, save_file
from support.adapters import save_prompt
from support.bench import Bench, fails
from support.tiny import tiny_llama
from support.tinygrid import VOCAB, grid, model_folder, write_grid

from ctp.cells import Dense
from ctp.cells.cell import Compress, Evaluate, Learn, key
from ctp.common.files import Changed
from ctp.data.documents import locate_text, read_documents
from ctp.data.texts import parse_corpus
from ctp.execution import jobs, loading
from ctp.models.load import load_model
from ctp.storage.ref import ref


def write_text(folder, word="apples", n=60):
    folder.mkdir(exist_ok=True)
    for split in ("train", "validation", "test"):
        rows = (json.dumps({"text": f"Order {i}: {i % 7} crates of {word} go to harbour {i % 13}. "}) for i in range(n))
        (folder / f"{split}.jsonl").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture
def text(tmp_path):
    return write_text(tmp_path / "orders")


@pytest.fixture
def bench(tmp_path, text):
    """A model and a text of one's own, planned."""
    model = model_folder(tmp_path / "mine")
    own = {"dataset": "orders", "split": "train", "seq_len": 24}
    recovery = grid(model)["recovery"] | {"text": {**own, "count": 32}, "validation": {"count": 4}}
    bench = Bench(tmp_path, model, datasets={"orders": {"path": str(text)}}, recovery=recovery,
                  calibration={**own, "count": 8, "sampling": "crops"},
                  compression=["dense", {"method": "gptq", "bits": 3}],
                  sources=["gptq-3bit"],
                  measures={"method": "perplexity", "text": {**own, "split": "test", "count": 4}})  # fmt: skip
    bench.runtime = bench.runtime.model_copy(update={"datasets": {"orders": {"path": str(text)}}})
    loading.forget(texts=True)
    yield bench
    loading.forget(texts=True)


def other_weights(folder):
    """The same names, shapes and size."""
    tensors = {n: t.clone() for n, t in load_file(folder / "model.safetensors").items()}
    tensors["lm_head.weight"] *= 2
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def first(bench, kind, **fields):
    return next(c for c in bench.all(kind) if all(getattr(c, n) == v for n, v in fields.items()))


EDITS = {
    "weights": lambda f: other_weights(f),
    "one byte of the weights": lambda f: (f / "model.safetensors").write_bytes(
        (f / "model.safetensors").read_bytes()[:-1] + b"\x01"
    ),
    "configuration": lambda f: (f / "config.json").write_text((f / "config.json").read_text() + "\n"),
    "tokenizer": lambda f: (f / "tokenizer.json").write_text((f / "tokenizer.json").read_text() + "\n"),
    "a file more": lambda f: (f / "added_tokens.json").write_text("{}"),
    "a file less": lambda f: (f / "generation_config.json").unlink(),
    "no weights": lambda f: (f / "model.safetensors").unlink(),
    "nothing left": lambda f: [p.unlink() for p in f.iterdir()],
    "no folder": lambda f: shutil.rmtree(f),
}


@pytest.mark.parametrize("edit", EDITS)
def test_a_model_that_changed_is_not_read(bench, tmp_path, edit):
    EDITS[edit](tmp_path / "mine")
    for cell in bench.all(Compress):
        fails(bench, cell, "the model")
    with pytest.raises(Changed, match="the model"):
        load_model(bench.pins.locations[bench.cells[0].model.pinned_name], bench.cells[0].model.revision)


def test_every_text_that_a_cell_reads_is_looked_at(bench, text):
    """Calibration, learning and measuring, whatever of it is in memory from the cell before."""
    dense, quantized = bench.all(Compress)
    for cell in (dense, quantized, first(bench, Evaluate, target=dense, recovery=None)):
        bench.execute(cell)
    left = [c for c in bench.cells if not bench.store.has(ref(c))]
    write_text(text, "pears")
    for cell in left:
        if isinstance(cell, Learn) or cell.recovery is None:
            fails(bench, cell, "the text")
    assert len(bench.store.done(map(ref, bench.cells))) == 3
    write_text(text)  # as it was
    for cell in left:
        bench.execute(cell)


def test_documents_are_those_that_were_located(text):
    for description, file in ((str(text), "train.jsonl"), (str(text / "test.jsonl"), "test.jsonl")):
        corpus = parse_corpus("orders", {"path": description})
        location, _ = locate_text(corpus, "train")
        assert "apples" in read_documents(location, corpus, "train")[0]
        whole = (text / file).read_text()
        (text / file).write_text(whole.replace("apples", "grapes"))
        with pytest.raises(Changed, match=rf"the text .*{file} has changed since it was pinned"):
            read_documents(location, corpus, "train")
        (text / file).unlink()
        with pytest.raises(ValueError, match="missing on this machine"):
            read_documents(location, corpus, "train")


@pytest.mark.parametrize("what", ["model", "text"])
def test_a_change_while_a_cell_runs_fails_it(bench, tmp_path, text, monkeypatch, what):
    """A loaded model's memory may be the file itself."""
    dense = first(bench, Compress, compression=Dense())
    cell = first(bench, Evaluate, target=dense, recovery=None)
    bench.execute(dense)
    own = loading.cut_windows

    def meanwhile(*given):
        other_weights(tmp_path / "mine") if what == "model" else write_text(text, "pears")
        return own(*given)

    monkeypatch.setattr(loading, "cut_windows", meanwhile)
    fails(bench, cell, f"the {what}")
    assert loading._held is None
    assert not loading._windows


def test_no_state_is_saved_of_what_changed(bench, tmp_path, text, monkeypatch):
    cell, source = first(bench, Learn), bench.all(Compress)[1]
    bench.execute(source)
    saved, keep = [], jobs.LearnJob.keep

    def watched(self, state):
        if len(saved) == 1:
            write_text(text, "pears")
        keep(self, state)
        saved.append(state.step)

    monkeypatch.setattr(jobs.LearnJob, "keep", watched)
    fails(bench, cell, "the text")
    assert len(saved) == 1


def test_an_error_of_half_a_file_is_told_as_what_it_is(bench, tmp_path, monkeypatch):
    def broken(*given):
        cut = tmp_path / "mine" / "model.safetensors"
        cut.write_bytes(cut.read_bytes()[:50])
        raise RuntimeError("header too large")

    monkeypatch.setattr("ctp.execution.loading.load_model", broken)
    fails(bench, bench.all(Compress)[1], "the model")


def test_what_is_only_touched_elsewhere_does_not_matter(bench, tmp_path):
    """Prompts and measures of a compressed model read the store, not the model that it was made from."""
    _, quantized = bench.all(Compress)
    bench.execute(quantized)
    other_weights(tmp_path / "mine")
    cell = first(bench, Learn)
    bench.execute(cell)
    bench.execute(first(bench, Evaluate, target=quantized, recovery=cell))


def test_an_adapter_and_a_checkpoint_are_watched_too(tmp_path, llama_folder):
    save_prompt(tiny_llama(vocab=VOCAB), tmp_path / "prompt")
    bench = Bench(tmp_path, llama_folder, recovery={"method": "adapter", "path": str(tmp_path / "prompt")})
    [cell] = bench.all(Learn)
    bench.execute(cell.source)
    (tmp_path / "prompt" / "adapter_config.json").unlink()
    fails(bench, cell, "the adapter")


def test_another_plan_has_other_keys(bench, tmp_path, text):
    before = {key(c) for c in bench.cells}
    other_weights(tmp_path / "mine")
    again = Bench(tmp_path, tmp_path / "mine")
    assert not before & {key(c) for c in again.cells}


@pytest.mark.slow
def test_an_edit_in_the_middle_of_a_grid(tmp_path, text):
    """The cells that read the file fail, the command says so, and the next run computes what is there now."""
    model = model_folder(tmp_path / "mine")
    plugin = tmp_path / "editor.py"
    plugin.write_text(f"""
from pathlib import Path
from typing import Literal
from ctp.plugin import Measure

class Editor(Measure):
    method: Literal["editor"] = "editor"
    at: int = 0

    @property
    def label(self): return f"editor-{{self.at}}"

    @property
    def needed_tokens(self): return 1

    def measure(self, job):
        with Path({str(model / "tokenizer_config.json")!r}).open("a") as f:
            f.write(" ")
        return {{"x": 1.0}}
""")
    measure = {"method": "editor", "at": [1, 2, 3]}
    content = grid(model, compression=["dense"], calibration=None, sources=None, recovery=None, measures=measure,
                   plugins=str(plugin))  # fmt: skip
    write_grid(tmp_path / "g.yaml", {k: v for k, v in content.items() if v is not None})
    found = subprocess.run([sys.executable, "-m", "ctp.grid", "g.yaml"], cwd=tmp_path, capture_output=True, text=True,
                           timeout=180, check=False)  # fmt: skip
    assert found.returncode == 1, found.stdout + found.stderr
    assert found.stdout.count("has changed since it was pinned") >= 3
