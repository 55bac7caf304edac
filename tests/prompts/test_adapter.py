"""PEFT adapters made elsewhere: what is read of them, what is refused, what they do to a model."""

import json
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from support.adapters import save_lora, save_prompt
from support.tiny import random_windows, tiny_bloom, tiny_llama, tiny_opt

from ctp.models.adapters import AdapterFacts, adapter_facts, fetch, locate, parameters
from ctp.prompts.adapter import applied
from ctp.prompts.attach import scored_logits

MODELS = {"llama": tiny_llama, "opt": lambda: tiny_opt(embed=16), "bloom": tiny_bloom}
TARGETS = {"llama": ["q_proj", "down_proj"], "opt": ["q_proj", "fc1"], "bloom": ["query_key_value"]}


@pytest.fixture(params=MODELS)
def make(request):
    return MODELS[request.param]


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    return save_lora(tiny_llama(), tmp_path_factory.mktemp("lora"), target_modules=TARGETS["llama"])


def changed(folder, target, **fields):
    """A copy of the adapter with other fields in its configuration; None takes a field out."""
    shutil.copytree(folder, target)
    config = json.loads((target / "adapter_config.json").read_text()) | fields
    (target / "adapter_config.json").write_text(json.dumps(config))
    return target


# ------------------------------------------------------------------------- what it is


def test_facts_of_a_prompt_and_of_lora(tmp_path, lora):
    prompt = save_prompt(tiny_opt(embed=16), tmp_path, k=7)
    assert adapter_facts(prompt) == AdapterFacts("prompt", 7, 16)
    assert parameters(prompt) == 7 * 16
    assert adapter_facts(lora) == AdapterFacts("lora", 0, 0)
    assert parameters(lora) == 2 * 3 * ((32 + 32) + (64 + 32))  # two layers; r = 3; q_proj and down_proj


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": "PREFIX_TUNING"}, "peft_type = 'PREFIX_TUNING', allowed: PROMPT_TUNING, LORA"),
        ({"task_type": "SEQ_CLS"}, "task_type = 'SEQ_CLS', allowed: CAUSAL_LM"),
        ({"task_type": None}, "task_type = None, allowed: CAUSAL_LM"),
        ({"bias": "all"}, "bias = 'all', allowed: none"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save = "),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa'"),
        ({"layer_replication": [[0, 1]]}, "layer_replication = "),
        ({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 0, "token_dim": 4}, "must be above 0"),
    ],
)
def test_adapters_that_cannot_be_used(tmp_path, lora, fields, message):
    with pytest.raises(ValueError, match=message):
        adapter_facts(changed(lora, tmp_path / "a", **fields))


def test_folders_that_are_no_adapter(tmp_path, lora):
    shutil.copytree(lora, tmp_path / "pickled")
    (tmp_path / "pickled" / "adapter_model.safetensors").rename(tmp_path / "pickled" / "adapter_model.bin")
    (tmp_path / "text").mkdir()
    for folder, message in (("pickled", "no pickled weights"), ("text", "it has no adapter_config.json")):
        for use in (adapter_facts, lambda f: locate(str(f)), lambda f: applied(tiny_llama(), f).__enter__()):
            with pytest.raises(ValueError, match=message):
                use(tmp_path / folder)
    (changed(lora, tmp_path / "broken") / "adapter_config.json").write_text("[]")
    with pytest.raises(ValueError, match="is no adapter's configuration"):
        adapter_facts(tmp_path / "broken")


def test_a_folder_is_pinned_by_its_two_files(tmp_path, lora):
    name, revision, location = locate(str(lora))
    assert (name, location) == (lora.name, str(lora))
    assert fetch(location, revision) == lora
    other = shutil.copytree(lora, tmp_path / "a")
    (other / "README.md").write_text("what else lies there does not matter")
    assert locate(str(other))[1] == revision
    changed(other, tmp_path / "b", r=4)
    assert locate(str(tmp_path / "b"))[1] != revision
    with pytest.raises(ValueError, match="has changed since it was pinned"):
        fetch(str(tmp_path / "b"), revision)


def test_places_where_no_adapter_is():
    with pytest.raises(ValueError, match=r"there is no folder '\./nowhere'"):
        locate("./nowhere")
    with pytest.raises(ValueError, match=r"no folder, the hub cannot .* such adapter. Without a network: a folder$"):
        locate("nobody/nothing")


def test_a_hub_adapter_is_two_files_at_a_commit(monkeypatch, lora):
    """The hub's own functions are stood in for: no network here."""
    import huggingface_hub

    class Api:
        def model_info(self, name, revision, timeout):
            return type("Info", (), {"sha": f"commit-of-{name}-{revision}"})

    def download(name, revision, allow_patterns, ignore_patterns):
        assert (name, revision) == ("some/lora", "commit-of-some/lora-v2")
        assert allow_patterns == ["adapter_config.json", "adapter_model.safetensors"]
        assert ignore_patterns == ["*/*"]
        return str(lora)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    name, revision, location = locate("some/lora", "v2")
    assert (name, revision, location) == ("some/lora", "commit-of-some/lora-v2", "hub:some/lora")
    assert fetch(location, revision) == lora


# ------------------------------------------------------------------------ what it does


def test_a_prompt_is_given_and_the_model_left_alone(tmp_path, make):
    folder, model, windows = save_prompt(make(), tmp_path), make(), random_windows(2, 12)
    theirs = PeftModel.from_pretrained(make(), str(folder)).eval()
    with torch.no_grad(), applied(model, folder) as prompt:
        ours = scored_logits(model, windows, prompt)
        expected = theirs(input_ids=windows, attention_mask=torch.ones_like(windows)).logits[:, 4:-1]
    assert torch.allclose(ours, expected, atol=2e-5, rtol=1e-4)  # fp32, one position more on their side


@pytest.mark.parametrize("architecture", MODELS)
def test_lora_is_pefts_and_comes_off_without_a_trace(tmp_path, architecture):
    make, windows = MODELS[architecture], random_windows(2, 12)
    folder = save_lora(make(), tmp_path, target_modules=TARGETS[architecture])
    theirs = PeftModel.from_pretrained(make(), str(folder))
    model = make().train()
    next(model.parameters()).requires_grad_(False)

    def state():
        modules = [(n, type(m), id(m), m.training, sorted(vars(m))) for n, m in model.named_modules()]
        tensors = [(n, id(p), p.requires_grad, p.detach().clone()) for n, p in model.named_parameters()]
        return modules, model.config.to_dict(), [t[:3] for t in tensors], [t[3] for t in tensors]

    before, plain = state(), make()(windows).logits
    with torch.no_grad(), applied(model, folder) as prompt:
        assert prompt is None
        assert torch.equal(model(windows).logits, theirs(windows).logits)
        assert not torch.allclose(model(windows).logits, plain, atol=0.01)
    after = state()
    assert after[:3] == before[:3]
    assert all(torch.equal(a, b) for a, b in zip(after[3], before[3], strict=True))
    assert torch.equal(model.eval()(windows).logits, plain)


def test_two_adapters_one_after_the_other(lora, tmp_path):
    other = save_lora(tiny_llama(), tmp_path, target_modules="all-linear", r=2)
    model, windows = tiny_llama(), random_windows(1, 8)
    for folder in (lora, other, lora):
        with torch.no_grad(), applied(model, folder):
            assert torch.equal(
                model(windows).logits, PeftModel.from_pretrained(tiny_llama(), str(folder))(windows).logits
            )


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (tiny_bloom, "does not fit the model: Target modules"),
        (lambda: tiny_llama(hidden=48), "does not fit the model: .*size mismatch"),
        (lambda: tiny_llama(layers=1), "does not fit the model: .*layers.1"),
        (lambda: tiny_llama(layers=3), "does not fit the model: .*layers.2"),
    ],
)
def test_lora_of_another_model_is_refused_and_leaves_no_trace(lora, wrong, message):
    """PEFT itself would take the last two: half of the adapter, or for half of the layers."""
    model, windows = wrong(), random_windows(1, 8)
    before = [(n, type(m), sorted(vars(m))) for n, m in model.named_modules()]
    with pytest.raises(ValueError, match=message), applied(model, lora):
        pass
    assert [(n, type(m), sorted(vars(m))) for n, m in model.named_modules()] == before
    assert torch.equal(model(windows).logits, wrong()(windows).logits)


def test_weights_that_are_no_lora_are_refused(lora, tmp_path):
    """An embedding saved with the adapter would be written into the model, and stay there."""
    folder = changed(lora, tmp_path / "a")
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors["base_model.model.model.embed_tokens.weight"] = torch.zeros(61, 32)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    model, windows = tiny_llama(), random_windows(1, 8)
    with pytest.raises(ValueError, match=r"embed_tokens\.weight, allowed: LoRA's tensors only"), applied(model, folder):
        pass
    assert torch.equal(model(windows).logits, tiny_llama()(windows).logits)


def test_a_failure_inside_takes_lora_off_too(lora):
    model, windows = tiny_llama(), random_windows(1, 8)
    with pytest.raises(KeyError), applied(model, lora):
        raise KeyError
    assert torch.equal(model(windows).logits, tiny_llama()(windows).logits)


def test_a_prompt_that_is_not_what_its_configuration_says(tmp_path):
    folder = changed(save_prompt(tiny_llama(), tmp_path / "p"), tmp_path / "a", num_virtual_tokens=5)
    with pytest.raises(ValueError, match=r"holds a prompt \(4, 32\); adapter_config.json says 5 x 32"):
        applied(tiny_llama(), folder).__enter__()
