"""Prompts that are not trained, and a method of one's own: rows as a learned prompt's, in front of every target."""

import importlib.util
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.bench import Bench
from support.prompts import run, spec
from support.tiny import random_windows, tiny_bloom, tiny_llama, tiny_opt
from support.tinygrid import byte_tokenizer, model_folder

from ctp.cells import Bos, HardPrompt, RandomPrompt, Recovery
from ctp.cells.cell import Evaluate, Learn
from ctp.evaluation.perplexity import perplexity
from ctp.execution.loading import load_compressed, token_windows
from ctp.learning.soft_prompt import initial_prompt
from ctp.models.adapters import AdapterFacts, adapter_facts
from ctp.planning import gridtext
from ctp.prompts.adapter import applied
from ctp.prompts.attach import scored_logits
from ctp.prompts.files import load_prompt, save_prompt
from ctp.prompts.rows import embedding_rows, untrained_rows
from ctp.storage.ref import ref

MODELS = {"llama": tiny_llama, "opt": tiny_opt, "opt-350m": lambda **f: tiny_opt(embed=16, **f), "bloom": tiny_bloom}
PLUGIN = Path(__file__).parents[1] / "plugins" / "mean_prompt.py"


@pytest.fixture(params=MODELS)
def make(request):
    return MODELS[request.param]


def tokenizer_with_bos():
    made = byte_tokenizer()
    made.add_special_tokens({"bos_token": "<eos>"})  # one token for both, as in OPT
    return made


# ------------------------------------------------------------------------ the rows


def test_a_hard_prompt_is_its_tokens_in_front(make):
    model, tokenizer, windows = make(vocab=257), byte_tokenizer(), random_windows(3, 8, vocab=257)
    rows = untrained_rows(HardPrompt(text="Mind the gap."), model, tokenizer)
    ids = torch.tensor(tokenizer("Mind the gap.")["input_ids"])
    assert rows.shape == (13, model.get_input_embeddings().embedding_dim)
    with torch.no_grad():
        ours = scored_logits(model, windows, rows)
        theirs = model(torch.cat([ids.expand(3, -1), windows], dim=1)).logits[:, len(ids) : -1]
    # The same numbers go in; one position more on their side, so that a sum may be added up in another order.
    assert torch.allclose(ours, theirs, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(ours, scored_logits(model, windows), atol=0.1)


def test_a_hard_prompt_has_the_tokenizers_special_tokens():
    class Tokenizer:
        def __call__(self, text, add_special_tokens=True):
            return {"input_ids": [1] * add_special_tokens + [ord(c) for c in text]}

    model = tiny_llama(vocab=257)
    table = model.get_input_embeddings().weight
    assert torch.equal(untrained_rows(HardPrompt(text="ab"), model, Tokenizer()), table[[1, 97, 98]])
    empty = lambda text, add_special_tokens=True: {"input_ids": []}  # noqa: E731
    with pytest.raises(ValueError, match="text = 'ab' has no tokens"):
        untrained_rows(HardPrompt(text="ab"), model, empty)
    with pytest.raises(ValueError, match=r"token 97 is not in the model's vocabulary of 61"):
        untrained_rows(HardPrompt(text="ab"), tiny_llama(), Tokenizer())


def test_a_random_prompt_is_where_a_soft_prompt_starts(make):
    model = make()
    for seed in (0, 5):
        start = initial_prompt(model, spec(k=7, seed=seed))
        assert torch.equal(untrained_rows(RandomPrompt(k=7, seed=seed), model, None), start)
    with pytest.raises(ValueError, match=r"k = 62 .* 61"):
        untrained_rows(RandomPrompt(k=62), model, None)


class Padded:
    """A tokenizer with fewer tokens than the embedding has rows, special ones last."""

    def get_vocab(self):
        return {f"t{i}": i for i in range(2, 30)} | {"<eos>": 40}


@pytest.mark.parametrize("init", ["random_rows", "first_rows"])
def test_random_rows_are_those_of_tokens_where_the_embedding_is_padded(init):
    model, table = tiny_llama(), tiny_llama().get_input_embeddings().weight
    rows = initial_prompt(model, spec(k=29, init=init), Padded())
    drawn = {i for i, row in enumerate(table) if any(torch.equal(row, r) for r in rows)}
    assert drawn == {*range(2, 30), 40}
    assert torch.equal(initial_prompt(model, spec(k=3, init="first_rows"), Padded()), table[2:5])
    if init == "random_rows":
        assert torch.equal(untrained_rows(RandomPrompt(k=29), model, Padded()), rows)
    with pytest.raises(ValueError, match=r"k = 30 .* vocabulary of 29"):
        initial_prompt(model, spec(k=30, init=init), Padded())


def test_bos_is_one_row_or_a_sentence(make):
    model = make(vocab=257)
    rows = untrained_rows(Bos(), model, tokenizer_with_bos())
    assert torch.equal(rows, model.get_input_embeddings().weight[[256]])
    with pytest.raises(ValueError, match=r"^method = 'bos': the model's tokenizer has no beginning-of-text token$"):
        untrained_rows(Bos(), model, byte_tokenizer())


def test_rows_of_a_bfloat16_model_are_its_own_numbers():
    model = tiny_llama().to(torch.bfloat16)
    rows = embedding_rows(model, [3, 5])
    assert rows.dtype == torch.float32
    assert torch.equal(rows.to(torch.bfloat16), model.get_input_embeddings().weight[[3, 5]])


# ------------------------------------------------------------------------ the artifact


def test_the_files_are_those_of_a_learned_prompt(tmp_path):
    learned = run(tiny_llama(), steps=2)
    learned.save(tmp_path / "a", "some/model")
    save_prompt(tmp_path / "b", learned.embeddings, "some/model")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert adapter_facts(tmp_path / "b") == AdapterFacts("prompt", 4, 32)
    with applied(tiny_llama(), tmp_path / "b") as prompt:
        assert torch.equal(prompt, learned.embeddings)


@pytest.mark.parametrize(
    "rows", [torch.zeros(3), torch.zeros(0, 4), torch.full((2, 2), torch.nan), torch.ones(2, 2).int()]
)
def test_what_is_no_prompt_is_not_saved(tmp_path, rows):
    with pytest.raises(ValueError, match="a prompt is k > 0 rows"):
        save_prompt(tmp_path / "a", rows, "some/model")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("architecture", ["llama", "bloom"])
def test_cells_of_prompts_that_are_not_trained(tmp_path, architecture):
    folder = model_folder(tmp_path / architecture, architecture)
    tokenizer_with_bos().save_pretrained(folder)
    methods = [
        {"method": "hard_prompt", "text": "Mind the gap."},
        {"method": "random_prompt", "k": 5, "seed": 3},
        "bos",
    ]
    bench = Bench(tmp_path, folder, recovery=methods, compression=["dense", {"method": "gptq", "bits": 3}])
    lengths = {"hard_prompt": 13, "random_prompt": 5, "bos": 1}
    for cell in bench.cells:
        bench.execute(cell)
    learned = bench.all(Learn)
    assert {c.recovery.method for c in learned} == lengths.keys()
    for cell in learned:
        k = lengths[cell.recovery.method]
        assert bench.store.manifest(ref(cell))["metrics"] == {"trainable_parameters": 0, "prompt_tokens": k}
        tensors = load_file(bench.store.fetch(ref(cell)) / "adapter_model.safetensors")
        assert {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()} == {
            "prompt_embeddings": (torch.float32, (k, 32))
        }
    for cell in bench.all(Evaluate):
        numbers = bench.store.manifest(ref(cell))["metrics"]
        k = lengths[cell.recovery.recovery.method] if cell.recovery else 0
        assert numbers["positions"] == numbers["scored_tokens"] + 4 * k


# ------------------------------------------------------------------------ one's own


@pytest.fixture
def mean_prompt(monkeypatch):
    """The example's class, registered for the length of a test."""
    monkeypatch.setattr(Recovery, "registry", dict(Recovery.registry))
    found = importlib.util.spec_from_file_location("mean_prompt", PLUGIN)
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module.MeanPrompt


def test_a_method_of_ones_own_is_one_short_file(tmp_path, llama_folder, mean_prompt):
    assert len(PLUGIN.read_text().splitlines()) <= 30
    text = {"dataset": "pydoc", "split": "train", "seq_len": 24, "count": 16}
    bench = Bench(tmp_path, llama_folder, recovery={"method": "mean_prompt", "k": 3, "text": text})
    (cell,) = bench.all(Learn)
    assert isinstance(cell.recovery, mean_prompt)
    evaluate = next(c for c in bench.all(Evaluate) if c.recovery == cell and c.target.compression.label == "gptq-3bit")
    for each in (cell.source, cell, evaluate.target, evaluate):
        bench.execute(each)
    model, tokenizer = load_compressed(cell.source, bench.store, bench.runtime, "cpu")
    ids = token_windows(cell.recovery.text, tokenizer, bench.runtime)
    rows = load_prompt(bench.store.fetch(ref(cell)))
    table = model.get_input_embeddings().weight
    assert torch.allclose(rows[1], table[ids[:, 8:16]].mean((0, 1)), atol=1e-6)
    target, _ = load_compressed(evaluate.target, bench.store, bench.runtime, "cpu")
    windows = token_windows(evaluate.measure.text, tokenizer, bench.runtime)
    measured = bench.store.manifest(ref(evaluate))["metrics"]
    assert measured["nll_sum"] == perplexity(target, windows, rows).nll_sum
    assert measured["positions"] == measured["scored_tokens"] + 4 * 3


def test_a_mistake_in_it_is_told_like_any_other(tmp_path, llama_folder, mean_prompt):
    text = {"dataset": "pydoc", "split": "train", "seq_len": 24}
    with pytest.raises(gridtext.GridError, match=r"recovery\.k = 0: should be"):
        Bench(tmp_path, llama_folder, recovery={"method": "mean_prompt", "k": 0, "text": text})
