"""Nearest words: against a table where they are known, and against every cosine at once."""

import pytest
import torch
from support.measured import ARCHITECTURES, job_for, loaded, read_json, rows_for

from ctp.cells import Neighbours
from ctp.evaluation import neighbours as module
from ctp.evaluation.neighbours import histogram, neighbours
from ctp.execution import measure


def table(v=1000, d=16, seed=0):
    return torch.randn(v, d, generator=torch.Generator().manual_seed(seed))


def test_known_directions():
    words = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0], [1.0, 1.0]])
    cosines, ids = neighbours(torch.tensor([[5.0, 0.0], [0.0, -1.0]]), words, 4)
    assert ids[0].tolist() == [0, 3, 1, 2]
    assert cosines[0].tolist() == pytest.approx([1, 0.5**0.5, 0, -1], abs=1e-7)
    assert ids[1, 2:].tolist() == [3, 1]
    assert cosines[1].tolist() == pytest.approx([0, 0, -(0.5**0.5), -1], abs=1e-7)


@pytest.mark.parametrize("chunk", [1, 16 * 7, 2**22])
@pytest.mark.parametrize("top", [1, 10, 1000])
def test_it_equals_all_cosines_at_once(chunk, top, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", chunk)
    prompt, words = rows_for_table(5), table()
    cosines, ids = neighbours(prompt, words, top)
    everything = torch.cosine_similarity(prompt.double()[:, None], words.double()[None], dim=-1)
    expected = everything.sort(dim=1, descending=True).values
    # Two rows whose cosines are nearer to each other than sums of 16 products in fp32 are exact may change places.
    assert torch.allclose(everything.gather(1, ids), expected[:, :top], rtol=0, atol=2e-6)
    assert all(len(set(row)) == top for row in ids.tolist())
    assert torch.allclose(cosines.double(), expected[:, :top], rtol=0, atol=2e-6)


def rows_for_table(k, d=16):
    return table(k, d, seed=1)


def test_a_row_of_zeros_in_the_table_is_nobodys_neighbour():
    words = table(50)
    words[7] = 0
    cosines, ids = neighbours(rows_for_table(3), words, 49)
    assert 7 not in ids
    assert torch.isfinite(cosines).all()
    with pytest.raises(ValueError, match=r"^top = 50, allowed: 1 to 49"):
        neighbours(rows_for_table(3), words, 50)


def test_the_tables_length_does_not_count_and_half_precision_is_read_as_it_is():
    prompt, words = rows_for_table(4), table().to(torch.bfloat16)
    a, ids = neighbours(prompt, words, 5)
    b, same = neighbours(100 * prompt, (words.float() * torch.linspace(0.5, 2, 1000)[:, None]), 5)
    assert torch.equal(ids, same)
    assert torch.allclose(a, b, atol=1e-6)
    assert a.dtype == torch.float32


def test_no_more_than_a_chunk_of_the_table_is_copied(monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 16 * 100)
    seen, plain = [], module.F.normalize
    monkeypatch.setattr(module.F, "normalize", lambda x, dim: (seen.append(x.shape), plain(x, dim=dim))[1])
    neighbours(rows_for_table(3), table(), 5)
    assert max(shape[0] for shape in seen) == 100


def broken_row(value):
    prompt = rows_for_table(3)
    prompt[1] = value
    return prompt


@pytest.mark.parametrize(
    ("prompt", "top", "message"),
    [
        (rows_for_table(3), 1001, r"^top = 1001, allowed: 1 to 1000"),
        (rows_for_table(3), 0, r"^top = 0, allowed"),
        (broken_row(0.0), 5, r"^row 1 of the prompt is zero"),
        (broken_row(float("nan")), 5, r"^a prompt's rows must be finite"),
        (torch.ones(3, 4), 5, r"^prompt \(3, 4\) and table \(1000, 16\)"),
        (torch.ones(0, 16), 5, r"^prompt \(0, 16\)"),
    ],
)
def test_what_is_not_allowed(prompt, top, message):
    with pytest.raises(ValueError, match=message):
        neighbours(prompt, table(), top)


def test_a_broken_table_says_so():
    words = table()
    words[3, 3] = float("nan")
    with pytest.raises(ValueError, match=r"^the table has rows that are not finite"):
        neighbours(rows_for_table(3), words, 5)


def test_histogram():
    found = histogram(torch.tensor([[-1.0, -0.99, 0.0, 0.019], [0.021, 0.5, 0.999, 1.0]]))
    assert (found["edges"][0], found["edges"][50], found["edges"][58], found["edges"][-1]) == (-1.0, 0.0, 0.16, 1.0)
    assert {i: n for i, n in enumerate(found["counts"]) if n} == {0: 2, 50: 2, 51: 1, 75: 1, 99: 2}
    assert (len(found["edges"]), len(found["counts"])) == (101, 100)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_words_of_the_vocabulary_are_their_own_neighbours(name, tmp_path):
    model, tokenizer = loaded(name)
    ids = tokenizer("good good day")["input_ids"]
    prompt = 3 * model.get_input_embeddings().weight[ids].detach()
    job = job_for(tmp_path, model, tokenizer, prompt)
    numbers = measure._neighbours(Neighbours(top=7), job)
    stored = read_json(tmp_path / "neighbours.json")
    assert [row["id"] for row in stored["nearest"]] == ids
    assert [row["word"] for row in stored["nearest"]] == ["<bos>", *"good good day"]
    assert stored["nearest"][5]["token"] == "Ġ"  # as the tokenizer writes a blank
    assert numbers["rows"] == 14
    assert numbers["distinct_nearest"] == 7  # <bos>, g, o, d, blank, a, y
    assert numbers["max_cosine"] == pytest.approx(1, abs=1e-6)
    assert numbers["mean_nearest_cosine"] == pytest.approx(1, abs=1e-6)
    assert sum(stored["histogram"]["counts"]) == 14 * 7
    assert stored["histogram"]["counts"][-1] == 14


def test_the_fraction_below_the_papers_bound(tmp_path):
    model, tokenizer = loaded("tiny-llama")
    job = job_for(tmp_path, model, tokenizer, rows_for(model, 5))
    numbers = measure._neighbours(Neighbours(top=258), job)
    words = model.get_input_embeddings().weight.double()
    cosines = torch.cosine_similarity(job.prompt.double()[:, None], words[None], dim=-1)
    assert numbers["fraction_below_0.16"] == pytest.approx((cosines < 0.16).double().mean().item(), abs=1e-9)
    assert 0.8 < numbers["fraction_below_0.16"] < 0.95  # cosines of random directions in 64 numbers: std 1/8
    assert all(isinstance(value, int | float) for value in numbers.values())


def test_rows_beyond_the_vocabulary_have_no_token(tmp_path):
    model, tokenizer = loaded("tiny-llama")
    model.resize_token_embeddings(300, mean_resizing=False)
    prompt = model.get_input_embeddings().weight[[299, 3]].detach().clone()
    measure._neighbours(Neighbours(top=1), job_for(tmp_path, model, tokenizer, prompt))
    nearest = read_json(tmp_path / "neighbours.json")["nearest"]
    assert (nearest[0]["id"], nearest[0]["token"], nearest[0]["word"]) == (299, None, "")
    assert nearest[1]["token"] == tokenizer.convert_ids_to_tokens(3)


def test_there_must_be_a_prompt(tmp_path):
    model, tokenizer = loaded("tiny-llama")
    with pytest.raises(ValueError, match=r"^neighbours are those of a prompt's rows: there is no prompt here"):
        measure._neighbours(Neighbours(), job_for(tmp_path, model, tokenizer))
