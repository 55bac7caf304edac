"""The graph: what depends on what, what a slice keeps, why something does not run."""

import pytest
from support.plans import make
from support.tinygrid import VOCAB, byte_tokenizer, grid

from ctp.cells.cell import Compress, Evaluate, Learn, to_json
from ctp.planning import select, states
from ctp.planning.gridtext import GridError
from ctp.storage.ref import identity, ref
from ctp.storage.store import Store


@pytest.fixture
def graph(tmp_path, llama_folder):
    return make(tmp_path / "g.yaml", **grid(llama_folder))


def kinds(graph):
    names = [n.cell.kind for n in graph.nodes.values()]
    return {k: names.count(k) for k in ("compress", "learn", "evaluate")}


def test_every_cell_once_and_inputs_first(graph):
    assert kinds(graph) == {"compress": 3, "learn": 1, "evaluate": 6}
    seen = set()
    for k, node in graph.nodes.items():
        assert set(node.inputs) <= seen
        seen.add(k)


def test_transfer_own_keeps_prompts_at_home(tmp_path, llama_folder):
    graph = make(tmp_path / "g.yaml", **grid(llama_folder, transfer="own"))
    pairs = [n.cell for n in graph.nodes.values() if isinstance(n.cell, Evaluate) and n.cell.recovery]
    assert [c.target for c in pairs] == [c.recovery.source for c in pairs]
    assert len(pairs) == 1


def test_two_models_never_share_a_prompt(tmp_path, llama_folder):
    from support.tinygrid import model_folder

    both = [str(llama_folder), str(model_folder(tmp_path / "tiny-opt", "opt"))]
    graph = make(tmp_path / "g.yaml", **(grid(llama_folder) | {"models": both}))
    assert kinds(graph) == {"compress": 6, "learn": 2, "evaluate": 12}


def test_dense_needs_no_calibration_and_no_key_from_it(tmp_path, llama_folder):
    one = make(tmp_path / "a.yaml", **grid(llama_folder))
    other = grid(llama_folder)
    other["calibration"]["seed"] = 7
    two = make(tmp_path / "b.yaml", **other)
    dense = [next(k for k, n in g.nodes.items() if n.cell.compression.method == "dense") for g in (one, two)]
    assert dense[0] == dense[1]
    assert len(set(one.nodes) & set(two.nodes)) == 2  # dense and its evaluation without a prompt


def test_a_mixture_of_experts_is_planned_with_its_experts(tmp_path):
    from support.tinygrid import model_folder

    folder = model_folder(tmp_path / "tiny-mixtral", "mixtral", intermediate=48)
    alone = grid(folder, compression={"method": "gptq", "bits": 4, "group_size": 16}, sources="all")
    assert kinds(make(tmp_path / "g.yaml", **alone))["compress"] == 1
    alone["compression"]["group_size"] = 32
    with pytest.raises(GridError, match=r"group_size = 32 .* must divide the input sizes .*, not so for 48"):
        make(tmp_path / "g.yaml", **alone)


def test_experts_that_are_called_in_another_way_are_refused_before_any_work(tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "jetmoe", vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_key_value_heads=2,
        kv_channels=8, num_local_experts=4, num_experts_per_tok=2, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder := tmp_path / "jet")
    byte_tokenizer().save_pretrained(folder)
    with pytest.raises(GridError, match=r"jet: model type jetmoe: model\.layers\.0\.mlp\.input_linear\.weight") as e:
        make(tmp_path / "g.yaml", **grid(folder))
    assert len(e.value.problems) == 1
    dense = grid(folder, compression="dense", sources=["dense"])
    assert kinds(make(tmp_path / "g.yaml", **dense)) == {"compress": 1, "learn": 1, "evaluate": 2}


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("kind=evaluate and target=dense", {"compress": 2, "learn": 1, "evaluate": 2}),
        ("kind=evaluate and target=dense and source=none", {"compress": 1, "learn": 0, "evaluate": 1}),
        ("k>=4", {"compress": 3, "learn": 1, "evaluate": 3}),
        ("target=dense,gptq-3bit", {"compress": 2, "learn": 1, "evaluate": 4}),
        ("bits!=4", {"compress": 1, "learn": 1, "evaluate": 2}),
        ("study=g", {"compress": 3, "learn": 1, "evaluate": 6}),
    ],
)
def test_where_keeps_what_matches_and_what_that_needs(graph, expression, expected):
    assert kinds(select.where(graph, [expression])) == expected


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("targte=dense", "did you mean 'target'"),
        ("target", "write axis=value"),
        ("model>3", "is not a number"),
        ("k>4", "no cell of g is like that"),
        ("k==4", "write axis=value"),
        ("k=4 or k=8", "write axis=value"),
    ],
)
def test_bad_conditions_are_told(graph, expression, message):
    with pytest.raises(GridError, match=message):
        select.where(graph, [expression])


def test_states_say_why(graph, tmp_path):
    store = Store(str(tmp_path / "store"))
    cells = {n.cell.kind: n for n in graph.nodes.values()}
    gptq = next(n for n in graph.nodes.values() if isinstance(n.cell, Learn)).cell.source
    assert set(map(str, states.states(graph, store).values())) >= {"never ran", "needs tiny-llama_dense"}
    with store.publish(ref(gptq), identity(gptq)):
        pass
    store.states.save(
        ref(cells["learn"].cell), identity(cells["learn"].cell), 3, lambda folder: (folder / "x").write_text("x")
    )
    dense = next(n.cell for n in graph.nodes.values() if isinstance(n.cell, Compress))
    store.failures.record(ref(dense), to_json(dense), "ValueError: no", "")
    found = {k: str(s) for k, s in states.states(graph, store).items()}
    assert found[cells["learn"].key] == "interrupted at step 3"
    assert "failed last time: ValueError: no" in found.values()
    assert list(found.values()).count("done") == 1


def test_runnable_blocks_whole_chains(graph):
    evaluations = {k for k, n in graph.nodes.items() if isinstance(n.cell, Evaluate)}
    blocked = states.runnable(graph, evaluations, set())
    assert set(blocked) == evaluations
    builds = set(graph.nodes) - evaluations
    assert states.runnable(graph, evaluations, builds) == {}
    assert states.runnable(graph, set(graph.nodes), set()) == {}


def test_none_is_measured_whether_said_or_not(tmp_path, llama_folder):
    whole = grid(llama_folder)
    said = make(tmp_path / "g.yaml", **{**whole, "recovery": ["none", whole["recovery"]]})
    assert set(said.nodes) == set(make(tmp_path / "h.yaml", **whole).nodes)


def test_prompts_only_measures_skip_what_has_no_rows(tmp_path, llama_folder):
    whole = grid(llama_folder)
    lora = {**{n: v for n, v in whole["recovery"].items() if n != "k"}, "method": "lora"}
    graph = make(tmp_path / "g.yaml", **{**whole, "recovery": [lora, "hard_prompt"], "measures": "neighbours"})
    measured = [n.cell for n in graph.nodes.values() if isinstance(n.cell, Evaluate)]
    assert {c.recovery.recovery.method for c in measured} == {"hard_prompt"}


def test_lora_on_more_blocks_than_there_are_is_told_before_anything_starts(tmp_path, llama_folder):
    whole = grid(llama_folder)
    lora = {**{n: v for n, v in whole["recovery"].items() if n != "k"}, "method": "lora", "layers": 9}
    with pytest.raises(GridError, match=r"recovery\.layers = 9: tiny-llama has 2 decoder blocks"):
        make(tmp_path / "g.yaml", **{**whole, "recovery": lora})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"recovery": {"method": "random_prompt", "k": 300}}, "recovery.k = 300: the vocabulary of tiny-llama has 257"),
        (
            {"recovery": "hard_prompt", "measures": {"method": "neighbours", "top": 300}},
            "measures.top = 300: the vocabulary of",
        ),
        ({"measures": {"method": "generation", "new_tokens": 70}}, "measures.new_tokens = 70: beyond the context of"),
    ],
)
def test_what_a_model_is_too_small_for(tmp_path, llama_folder, change, said):
    with pytest.raises(GridError) as caught:
        make(tmp_path / "g.yaml", **grid(llama_folder, **change))
    assert any(said in p for p in caught.value.problems)


def test_one_missing_model_is_one_line(tmp_path, llama_folder):
    studies = {"a": {}, "b": {}, "c": {}}
    with pytest.raises(GridError) as caught:
        make(tmp_path / "g.yaml", **grid(tmp_path / "gone", studies=studies))
    [line] = caught.value.problems
    assert line.endswith("(and in 2 more places)")
    assert "studies.a.models" in line
