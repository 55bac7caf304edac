"""Adapters made elsewhere, in a grid: pinned, one cell a model, measured as PEFT itself would."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from peft import PeftModel
from support.adapters import save_lora, save_prompt
from support.bench import Bench
from support.tiny import tiny_llama
from support.tinygrid import VOCAB, grid, model_folder, write_grid

from ctp.cells import Adapter
from ctp.cells.cell import Compress, Evaluate, Learn, from_json, key, to_json
from ctp.cells.labels import axes, slug
from ctp.common import files
from ctp.execution import loading
from ctp.models import config as models_config
from ctp.models import sources
from ctp.models.config import model_facts
from ctp.planning import gridfile, plan, select
from ctp.planning.gridtext import GridError
from ctp.planning.pins import Pins
from ctp.storage.ref import ref

GPTQ = {"method": "gptq", "bits": 3}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """A folder with `prompt` and `lora` for the tiny Llama of the grids."""
    root = tmp_path_factory.mktemp("adapters")
    save_prompt(tiny_llama(vocab=VOCAB), root / "prompt")
    save_lora(tiny_llama(vocab=VOCAB), root / "lora", target_modules=["q_proj", "up_proj"])
    (root / "lora" / "secret.txt").write_text("never copied")
    return root


def imports(adapters, *names):
    return [{"method": "adapter", "path": str(adapters / name)} for name in names]


def load(path, *settings):
    pins = Pins()
    found = gridfile.load(str(path), list(settings), pins)
    return plan.make(found, pins), pins


def cells(graph, kind):
    return [n.cell for n in graph.nodes.values() if isinstance(n.cell, kind)]


# ----------------------------------------------------------------------------- pinning


@pytest.fixture
def file(tmp_path, llama_folder, adapters):
    content = grid(llama_folder, recovery=imports(adapters, "prompt")[0])
    return write_grid(tmp_path / "g.yaml", content)


def test_it_is_pinned_to_what_lies_there(file, adapters, tmp_path):
    graph, pins = load(file)
    [cell] = cells(graph, Learn)
    spec = cell.recovery
    assert (spec.path, spec.kind, spec.k, spec.width) == ("prompt", "prompt", 4, 32)
    assert spec.revision.startswith("sha256:")
    assert pins.locations[f"prompt@{spec.revision}"] == str(adapters / "prompt")
    assert from_json(to_json(cell)) == cell

    moved = shutil.copytree(adapters / "prompt", tmp_path / "prompt")
    again, _ = load(file, f"recovery.path={moved}")
    assert again.nodes.keys() == graph.nodes.keys()
    config = json.loads((moved / "adapter_config.json").read_text())
    (moved / "adapter_config.json").write_text(json.dumps(config | {"prompt_tuning_init": "RANDOM "}))
    other, _ = load(file, f"recovery.path={moved}")
    assert key(cells(other, Learn)[0]) != key(cell)


def test_an_unpinned_adapter_has_no_key(file):
    source = cells(load(file)[0], Compress)[0]
    with pytest.raises(ValueError, match="'x' has no revision"):
        key(Learn(source=source, recovery=Adapter(path="x")))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["recovery.path=/no/such"], "recovery: path = '/no/such': there is no folder '/no/such'"),
        (["recovery.path=nobody/nothing"], "recovery: path = 'nobody/nothing': 'nobody/nothing' is no folder, the hub"),
        (["recovery.path=MODEL"], "recovery: path = 'MODEL': 'MODEL' is no PEFT adapter: it has no adapter_config"),
        (["recovery.path=3"], "recovery.path = 3: should be a valid string"),
        (["recovery={method: adapter}"], "recovery.path is missing"),
        (["recovery.pfad=x"], "recovery.pfad: unknown key 'pfad'; did you mean 'path'?"),
        (["recovery.revision=abc"], "recovery: path = 'ADAPTER': revision = 'abc': prompt is sha256:"),
        (["recovery.k=9"], "recovery: k = 9: prompt has 4"),
        (["measures.text.seq_len=61"], "measures.text.seq_len = 61 and a prompt of 4: beyond the context"),
        (["models=WIDE"], "recovery.path = prompt: a prompt of width 32 does not fit wide, whose embedding has 48"),
    ],
)  # fmt: skip
def test_each_mistake_is_told_before_anything_starts(file, tmp_path, llama_folder, adapters, settings, expected):
    if "models=WIDE" in settings:
        settings = [f"models={model_folder(tmp_path / 'wide', hidden=48)}"]
    settings = [s.replace("MODEL", str(llama_folder)) for s in settings]
    with pytest.raises(GridError) as caught:
        load(file, *settings)
    expected = expected.replace("MODEL", str(llama_folder)).replace("ADAPTER", str(adapters / "prompt"))
    assert caught.value.problems[0].removeprefix(f"{file}: ").startswith(expected), caught.value.problems


def test_facts_remembered_by_an_older_ctp_are_read_anew(llama_folder):
    _, revision, location = sources.locate(str(llama_folder))
    model_facts.cache_clear()
    known = model_facts(location, revision)
    memo = files.cache_dir() / "facts" / models_config._rules() / f"{revision.replace(':', '-')}.json"
    memo.write_text(json.dumps({n: v for n, v in json.loads(memo.read_text()).items() if n != "width"}))
    model_facts.cache_clear()
    assert model_facts(location, revision) == known
    assert known.width == 32


# -------------------------------------------------------------------------------- graph


def test_one_cell_a_model_in_front_of_every_target(tmp_path, llama_folder, adapters):
    """Whatever sources and transfer say, and without a dense model among the compressions."""
    recovery = [grid(llama_folder)["recovery"], *imports(adapters, "prompt", "lora")]
    compression = [GPTQ, {**GPTQ, "bits": 4}]
    content = grid(llama_folder, recovery=recovery, compression=compression, sources="all", transfer="own")
    graph, _ = load(write_grid(tmp_path / "g.yaml", content))
    learned, imported = ([c for c in cells(graph, Learn) if c.recovery.learned is x] for x in (True, False))
    assert (len(learned), len(imported)) == (2, 2)
    assert len(cells(graph, Compress)) == 3  # the dense model, which imports hang on, is not evaluated
    pairs = [(c.target.compression.label, axes(c)["source"]) for c in cells(graph, Evaluate)]
    for target in ("gptq-3bit", "gptq-4bit"):
        assert sorted(s for t, s in pairs if t == target) == [target, "imported", "imported", "none"]
    assert len(pairs) == 8


def test_names(file):
    graph, _ = load(file)
    [learn] = cells(graph, Learn)
    assert slug(learn) == "tiny-llama_imported_adapter-prompt"
    cell = next(c for c in cells(graph, Evaluate) if c.recovery and c.target.compression.label == "gptq-3bit")
    assert slug(cell) == "tiny-llama_gptq-3bit_imported_adapter-prompt_ppl-pydoc-test"
    found = axes(cell)
    assert (found["source"], found["recovery"], found["adapter"], found["k"]) == ("imported", "adapter", "prompt", 4)
    assert len(select.where(graph, ["source=imported"]).nodes) == 7  # an import, three models, three evaluations


# ------------------------------------------------------------------------------ running


def test_the_perplexity_is_that_of_plain_peft(tmp_path, llama_folder, adapters):
    bench = Bench(tmp_path, llama_folder, compression=[GPTQ], sources="all",
                  recovery=imports(adapters, "prompt", "lora"))  # fmt: skip
    for cell in bench.cells:
        bench.execute(cell)
    for cell in bench.all(Learn):
        folder = bench.store.fetch(ref(cell))
        sent = {p.name for p in folder.iterdir()} - {"manifest.json"}
        assert sent == {"adapter_config.json", "adapter_model.safetensors"}
        numbers = {"prompt": 4 * 32, "lora": 2 * 3 * ((32 + 32) + (32 + 64))}[cell.recovery.path]
        assert bench.store.manifest(ref(cell))["metrics"]["trainable_parameters"] == numbers
    for cell in bench.all(Evaluate):
        model, tokenizer = loading.open_model(cell.target, bench.store, bench.runtime, "cpu")
        ids = loading.token_windows(cell.measure.text, tokenizer, bench.runtime)
        k = 0
        if cell.recovery:
            k = cell.recovery.recovery.k
            model = PeftModel.from_pretrained(model, str(adapters / cell.recovery.recovery.path))
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, k:-1]
        loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2).double(), ids[:, 1:])
        # Theirs is float64 over all windows at once, ours fp32 in batches: rounding only.
        assert bench.store.manifest(ref(cell))["metrics"]["ppl"] == pytest.approx(loss.exp().item(), rel=1e-5)
    found = {axes(c).get("adapter", ""): bench.store.manifest(ref(c))["metrics"]["ppl"] for c in bench.all(Evaluate)}
    assert len({round(ppl, 1) for ppl in found.values()}) == 3  # each adapter does something


def test_an_adapter_that_changed_since_planning_is_not_imported(tmp_path, llama_folder, adapters):
    copy = shutil.copytree(adapters / "prompt", tmp_path / "prompt")
    bench = Bench(tmp_path, llama_folder, recovery={"method": "adapter", "path": str(copy)})
    (copy / "adapter_config.json").write_text((copy / "adapter_config.json").read_text() + "\n")
    [cell] = bench.all(Learn)
    bench.execute(cell.source)
    with pytest.raises(ValueError, match="has changed since it was pinned"):
        bench.execute(cell)
    assert not bench.store.has(ref(cell))


@pytest.mark.slow
def test_the_command_and_the_matrix(tmp_path, llama_folder, adapters):
    """Through Ray and MLflow: an import has no history of losses, and a row of its own."""
    content = grid(llama_folder, compression=[GPTQ], sources="all", recovery=imports(adapters, "prompt", "lora"))
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(content))
    for module, *args in (["ctp.grid", "tiny.yaml"], ["analysis.transfer_matrix", "tiny"]):
        found = subprocess.run(
            [sys.executable, "-m", module, *args],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=180,
            check=False,
        )
        assert found.returncode == 0, found.stdout + found.stderr
    for row in ("no prompt", "imported adapter-lora", "imported adapter-prompt, k=4"):
        assert row in found.stdout
