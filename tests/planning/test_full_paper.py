"""The paper's grids: what they hold, planned without a network; and the small one run whole, with its analysis."""

import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import yaml

from ctp.cells.cell import Compress, Evaluate, Learn
from ctp.planning import gridfile, plan
from ctp.planning.pins import Pins

ROOT = Path(__file__).parents[2]
MODELS = {
    "facebook/opt-1.3b",
    "facebook/opt-2.7b",
    "facebook/opt-6.7b",
    "huggyllama/llama-7b",
    "meta-llama/Llama-2-13b-hf",
    "bigscience/bloom-7b1",
}
STUDIES = {*(f"figure{n}" for n in range(1, 10)), *(f"table{n}" for n in (1, 2, 3, 5, 6, 7, 8))}
MINUTES = 25  # that the small grid may take on two cores


def planned(name, *settings):
    pins = Pins(provisional=True)
    return plan.make(gridfile.load(str(ROOT / "grid" / f"{name}.yaml"), list(settings), pins), pins)


@pytest.fixture(scope="module")
def paper():
    return planned("full_paper")


def cells(graph, kind, study=None):
    return [n.cell for n in graph.nodes.values() if isinstance(n.cell, kind) and (study is None or study in n.studies)]


def test_every_table_and_figure_is_a_study_on_every_model(paper):
    assert {s for n in paper.nodes.values() for s in n.studies} == STUDIES
    assert {c.model.name for c in cells(paper, Compress)} == MODELS


def test_the_compressions_are_the_papers(paper):
    labels = {c.compression.label for c in cells(paper, Compress)}
    bits = {f"gptq-{b}bit-plain" for b in (4, 3, 2)}
    assert labels == {"dense", "sparsegpt-50", "sparsegpt-62.5", "sparsegpt-75", "sparsegpt-50-4bit-plain", *bits}
    for cell in cells(paper, Compress):
        if cell.calibration:
            assert (cell.calibration.dataset, cell.calibration.split) == ("c4", "train")
            assert (cell.calibration.count, cell.calibration.seq_len) == (128, 2048)


def test_figure_5_is_six_sources_by_six_targets_by_three_texts(paper):
    pairs = Counter(
        (c.recovery.source.compression.label, c.target.compression.label, c.measure.text.dataset)
        for c in cells(paper, Evaluate, "figure5")
        if c.recovery
    )
    assert len(pairs) == 6 * 6 * 3
    assert set(pairs.values()) == {1}


def test_prompts_are_the_papers_text(paper):
    prompts = [c.recovery for c in cells(paper, Learn) if c.recovery.method == "soft_prompt"]
    assert {p.k for p in prompts} == {25, 50, 75, 100}
    assert {p.text.dataset for p in prompts} == {"c4", "wikitext2", "ptb"}
    for p in prompts:
        assert (p.steps, p.batch, p.lr, p.weight_decay, p.text.seq_len) == (30_000, 4, 1e-3, 1e-5, 1024)
        assert (p.init, p.loss, p.dtype, p.on_reported, p.clip) == ("random_rows", "token_mean", "float32", False, None)


def test_paper_code_differs_where_the_code_does(paper):
    code = planned("paper_code")
    assert len(code.nodes) == len(paper.nodes)
    prompts = [c.recovery for c in cells(code, Learn) if c.recovery.method == "soft_prompt"]
    for p in prompts:
        assert (p.init, p.weight_decay, p.warmup, p.schedule) == ("first_rows", 0, 500, "linear")
        assert (p.loss, p.dtype, p.clip) == ("sequence_sum", "bfloat16", 1.0)
    on_c4 = next(p for p in prompts if p.text.dataset == "c4")
    assert (on_c4.text.documents, on_c4.validation.documents, on_c4.validation.skip) == (5000, 1100, 0)
    assert next(p for p in prompts if p.text.dataset == "wikitext2").text.join == " "


def test_controls_have_three_seeds(paper):
    controls = planned("controls")
    assert not {s for n in controls.nodes.values() for s in n.studies} & STUDIES
    seeds = Counter()
    for cell in cells(controls, Learn):
        settings = cell.recovery.model_dump(exclude={"seed"}, mode="json")
        if "seed" in type(cell.recovery).model_fields:
            seeds[str((cell.source, settings))] += 1
    assert set(seeds.values()) == {3}
    methods = {(c.recovery.method, c.recovery.learned and c.source.compression.label) for c in cells(controls, Learn)}
    assert {("soft_prompt", "dense"), ("random_prompt", False), ("bos", False), ("lora", "dense")} <= methods


def test_the_small_grid_has_the_same_studies(paper):
    small = planned("full_paper_small")
    assert {s for n in small.nodes.values() for s in n.studies} == STUDIES
    kinds = [Counter((n.cell.kind, n.studies) for n in graph.nodes.values()) for graph in (paper, small)]
    assert kinds[0] == kinds[1]


def run(*command, cwd, expect=0):
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=cwd,
        text=True,
        capture_output=True,
        env={**os.environ, "PYTHONPATH": ROOT},
    )
    assert done.returncode == expect, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_the_whole_paper_runs_small(tmp_path):
    begun = time.monotonic()
    run("ctp.grid", str(ROOT / "grid" / "full_paper_small.yaml"), cwd=tmp_path)
    assert time.monotonic() - begun < 60 * MINUTES
    assert "Nothing to run" in run("ctp.grid", str(ROOT / "grid" / "full_paper_small.yaml"), cwd=tmp_path)
    run("analysis.tables", "full_paper_small", cwd=tmp_path)
    run("analysis.figures", "full_paper_small", cwd=tmp_path)
    assert ", 0 not run" in run("analysis.compare", "full_paper_small", cwd=tmp_path).splitlines()[-1]
    manifests = [json.loads(p.read_text()) for p in (tmp_path / "results" / "store" / "learn").glob("*/manifest.json")]
    learned = [m for m in manifests if m["spec"]["recovery"]["method"] in ("soft_prompt", "lora")]
    assert len(learned) == 40
    assert sum(m["metrics"]["best_step"] > 0 for m in learned) > 30  # else the transfers compare starting points


@pytest.mark.slow
def test_the_controls_run_on_tiny_models(tmp_path):
    small = yaml.safe_load((ROOT / "grid" / "full_paper_small.yaml").read_text())
    small["define"] |= {
        "llama-7b": {"name": "tiny-llama"},
        "prompt": {"steps": 2, "batch": 2, "validate_every": 1, "lr": 0.03, "precision": "fp32"},
        "lora": {"steps": 2, "batch": 2, "validate_every": 1, "precision": "fp32"},
        "prompt_sized_lora": {"layers": 1},
    }
    file = tmp_path / "tiny_controls.yaml"
    text = {
        "extends": str(ROOT / "grid" / "controls.yaml"),
        "define": small["define"],
        "calibration": small["calibration"],
    }
    file.write_text(yaml.safe_dump(text))
    run("ctp.grid", str(file), cwd=tmp_path)
    said = run("analysis.transfer_matrix", "tiny_controls", cwd=tmp_path)
    rows = ["untrained bos", "untrained hard_prompt", "untrained random_prompt-k100", "dense prompt, k=100, newswire"]
    for row in (*rows, "gptq-3bit-plain lora-r1-last1-newswire", "gptq-3bit-plain lora-r32-newswire"):
        assert row in said
