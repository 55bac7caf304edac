"""The paper's numbers are the paper's, and each says which measurement it is."""

from decimal import Decimal

import pytest
import yaml
from support.shared import SHARED, needs

from analysis import paper
from analysis.roles import Roles, nearest, of_grid

DIGEST = SHARED / "paper" / "tables.yaml"


def numbers():
    return [e for table in paper.tables() for e in paper.entries(table) if e.value is not None]


def by_place(table):
    return {(*e.row, e.column): e for e in paper.entries(table)}


def test_every_number_that_is_printed():
    counts = {t: sum(e.value is not None for e in paper.entries(t)) for t in paper.tables()}
    assert counts == {"table1": 22, "table2": 8, "table3": 9, "table5": 52, "table6": 12, "table7": 12, "table8": 5,
                      "figure1": 0, "figure2": 5, "figure3": 2, "figure4": 0, "figure5": 108, "figure6": 0,
                      "figure7": 0, "figure8": 0, "figure9": 0}  # fmt: skip
    assert len(numbers()) == 235


def test_an_entry_says_what_was_measured():
    direct = by_place("table1")["3-bit", "w/ direct prompt", "PTB"]
    assert dict(direct.where) == {
        "measure": "perplexity", "model": "llama-7b", "target": "gptq-3bit", "source": "gptq-3bit", "dataset": "ptb",
        "recovery": "soft_prompt", "k": 100, "learned_on": "ptb",
    }  # fmt: skip
    assert (direct.value, direct.rounding, direct.has_prompt) == (7.76, 0.005, True)
    moved = by_place("figure5")["PTB", "2-bit", "62.5 %"]
    assert (moved.where["source"], moved.where["target"], moved.value) == ("gptq-2bit", "sparsegpt-62.5", 21.1)
    lora = by_place("table6")["BLOOM-7B", "3-bit", "LoRA", "C4"]
    assert (lora.where["recovery"], lora.where["rank"], lora.has_prompt) == ("lora", 32, False)
    score = by_place("table5")["Full", "w/o prompt", "OpenBookQA"]
    assert (score.value, score.stderr, score.rounding) == (0.410, 0.022, 0.0005)
    assert by_place("figure2")["w/o prompt", "50 %"].value is None


def test_exact_parameters_are_those_that_are_printed():
    for entry in (e for t in ("table6", "table7") for e in paper.entries(t) if e.exact):
        printed = Decimal(entry.printed.removesuffix(" M"))
        assert abs(Decimal(entry.value) / 1_000_000 - printed) < Decimal(1).scaleb(printed.as_tuple().exponent)
    exact = {(e.where["model"], e.where["recovery"]): e.value for e in paper.entries("table6") if e.exact}
    assert exact == {("llama-2-13b", "soft_prompt"): 100 * 5120, ("bloom-7b1", "soft_prompt"): 100 * 4096,
                     ("llama-2-13b", "lora"): 40 * 2 * 32 * (5120 + 5120),
                     ("bloom-7b1", "lora"): 30 * 2 * 32 * (4096 + 4096)}  # fmt: skip


@needs(DIGEST)
def test_numbers_are_those_of_the_digest():
    digest = yaml.safe_load(DIGEST.read_text())
    ours: dict[tuple, set] = {}
    for e in numbers():
        w = e.where
        prompt = {"none": "none", "soft_prompt": w.get("learned_on")}.get(w["recovery"], w["recovery"])
        text = w.get("dataset") or w.get("task")
        ours.setdefault((w["model"], w.get("target"), w.get("source"), prompt, w["k"], text), set()).add(e.value)

    def check(value, model, target, prompt, text, source=None, k=100):
        source = None if prompt == "none" else source or target
        assert value in ours[model, target, source, prompt, 0 if prompt in ("none", "lora") else k, text]
        return 1

    n = 0
    for row in (r for t in ("cross_dataset", "domain_specific_transfer", "joint") for r in digest[t]["rows"]):
        for text in set(row) & {"ptb", "wikitext2", "c4"}:
            prompt = {"direct": text, "transferred": "c4"}.get(row["prompt"], row["prompt"])
            n += check(row[text], "llama-7b", row["compression"], prompt, text)
    for k, value in digest["token_ablation"]["ppl"].items():
        n += check(value, "llama-7b", "gptq-3bit", "ptb" if k else "none", "ptb", k=k)
    figure5 = digest["cross_compression"]
    for text in ("c4", "wikitext2", "ptb"):
        for source, values in figure5[text].items():
            for target, value in zip(figure5["columns"], values, strict=True):
                n += check(value, "llama-7b", target, "c4", text, source)
    for target, value in digest["accuracy_vs_compression"]["ppl"].items():
        n += check(value, "llama-7b", target, "none", "c4")
    for prompt, value in digest["extreme"]["ppl"].items():
        n += check(value, "opt-1.3b", "gptq-2bit", prompt, "c4")
    for row in digest["cross_task"]["rows"]:
        for task, (value, _) in zip(digest["cross_task"]["tasks"], row["acc"], strict=True):
            n += check(value, "llama-7b", row["compression"], row["prompt"], task)
    for row in digest["lora"]["rows"]:
        prompt = {"soft_prompt": "c4"}.get(row["recovery"], row["recovery"])
        n += sum(check(row[t], row["model"], row["compression"], prompt, t) for t in ("c4", "wikitext2"))
    assert n == 235 - 8  # the trainable parameters stand in two tables and are checked above


def test_roles_are_what_a_grid_defines_else_the_papers_own():
    roles, _ = of_grid("define: {llama-7b: {name: ./models/mine}, c4: {dataset: newswire, split: test}, t: $c4,"
                    " piqa: tasks/piqa.yaml}\n")  # fmt: skip
    assert "mine" in roles.names("llama-7b")
    assert roles.names("c4") == roles.names("t") == {"newswire"}
    assert "piqa" in roles.names("piqa")
    assert roles.names("opt-1.3b") == {"opt-1.3b", "facebook/opt-1.3b"}
    assert Roles().names("high_school_european_history") >= {"mmlu_high_school_european_history"}


@pytest.mark.parametrize(
    ("wanted", "ours", "found"),
    [(100, [100], 100), (100, [16], 16), (100, [8, 16], None), (100, [8, 100], 100), (100, [], None)],
)
def test_another_k_stands_for_the_papers_where_there_is_one(wanted, ours, found):
    assert nearest(wanted, [100], ours) == found


def test_lengths_stand_for_the_papers_by_rank():
    assert [nearest(k, [25, 50, 75, 100], [2, 4, 8, 16]) for k in (25, 50, 75, 100)] == [2, 4, 8, 16]
