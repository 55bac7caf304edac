"""What comes from the hub: commits, files, access, and planning without a network. The hub is one on this machine."""

import errno
import json
import multiprocessing
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file
from support.fakehub import COMMIT
from support.known import ARCHITECTURES
from support.tiny import random_windows, tiny_opt
from support.tinygrid import byte_tokenizer, grid, write_grid
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM

import ctp
from ctp import grid as command
from ctp.common import hub
from ctp.formats import checkpoint
from ctp.models import adapters, sources
from ctp.models.config import config_facts, model_facts
from ctp.models.load import load_model, load_tokenizer
from ctp.models.sources import known_models
from ctp.planning import gridfile, plan
from ctp.planning.gridtext import GridError
from ctp.planning.pins import Pins


@pytest.fixture(scope="module")
def opt(tmp_path_factory):
    """A repository like facebook/opt-*: weights in .bin shards alone, among files of other frameworks."""
    folder = tmp_path_factory.mktemp("repos") / "opt"
    model = tiny_opt(vocab=257)
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    weights = {n: t.clone() for n, t in model.state_dict().items() if n != "lm_head.weight"}  # the head is tied
    shards = [dict(list(weights.items())[:5]), dict(list(weights.items())[5:])]
    names = [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]
    for name, shard in zip(names, shards, strict=True):
        torch.save(shard, folder / name)
    index = {"metadata": {}, "weight_map": {n: names[i] for i in (0, 1) for n in shards[i]}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    for other in ("flax_model.msgpack", "tf_model.h5", "rust_model.ot", "consolidated.00.pth", "onnx/model.onnx",
                  "original/model.safetensors", "README.md"):  # fmt: skip
        (folder / other).parent.mkdir(exist_ok=True)
        (folder / other).write_bytes(b"not for us")
    return folder


def names(folder):
    return {f.name for f in Path(folder).iterdir()}


# ------------------------------------------------------------------ fetching


def test_a_model_of_bin_shards_is_fetched_once_and_loaded_without_the_network(remote, opt):
    remote.repos["some/opt"] = opt
    assert sources.locate("some/opt") == ("some/opt", COMMIT, "hub:some/opt")
    load_tokenizer("hub:some/opt", COMMIT)
    assert not any(path.endswith(".bin") for path in remote.asked)  # weights are not what a tokenizer needs
    model, tokenizer = load_model("hub:some/opt", COMMIT)
    folder, safe = hub.fetch_model("some/opt", COMMIT)
    assert not safe
    kept = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
            "pytorch_model.bin.index.json", *(f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2))}  # fmt: skip
    assert names(folder) == kept
    windows = random_windows(2, 12)
    with torch.no_grad():
        torch.testing.assert_close(model(windows).logits, tiny_opt(vocab=257)(windows).logits, rtol=0, atol=0)
    assert tokenizer("ab")["input_ids"] == byte_tokenizer()("ab")["input_ids"]
    asked = len(remote.asked)
    load_model("hub:some/opt", COMMIT)
    hub.check_access("some/opt", COMMIT)
    assert len(remote.asked) == asked


def test_tokenizers_of_vocabulary_and_merges_come_whole_and_begin_with_their_bos(remote, tmp_path):
    """As facebook/opt-* have it: no tokenizer.json, GPT-2's class with add_bos_token and </s> as the first token."""
    folder = tmp_path / "repo"
    tiny_opt().config.save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {t: i for i, t in enumerate(["<s>", "<pad>", "</s>", "<unk>", *alphabet, "ab"])}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\na b\n")
    special = {"unk_token": "</s>", "bos_token": "</s>", "eos_token": "</s>", "pad_token": "<pad>"}
    said = {**special, "add_bos_token": True, "add_prefix_space": False, "tokenizer_class": "GPT2Tokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    remote.repos["some/opt"] = folder
    tokenizer = load_tokenizer("hub:some/opt", COMMIT)
    assert tokenizer.convert_ids_to_tokens(tokenizer("ab c")["input_ids"]) == ["</s>", "ab", "Ġ", "c"]
    assert names(hub.fetch("some/opt", COMMIT, hub.CONFIG)) == names(folder)


def test_a_tokenizer_in_both_forms_is_read_from_its_json(remote, llama_folder, tmp_path):
    """As LLaMA has it: tokenizer.json beside sentencepiece's tokenizer.model, which needs another package."""
    folder = shutil.copytree(llama_folder, tmp_path / "repo")
    (folder / "tokenizer.model").write_bytes(b"no sentencepiece here")
    remote.repos["some/llama"] = folder
    assert load_tokenizer("hub:some/llama", COMMIT)("ab")["input_ids"] == byte_tokenizer()("ab")["input_ids"]
    assert "tokenizer.model" in names(hub.fetch("some/llama", COMMIT, hub.CONFIG))


def test_safetensors_are_preferred_and_a_bin_beside_them_stays_there(remote, opt, tmp_path):
    both = shutil.copytree(opt, tmp_path / "both")
    AutoModelForCausalLM.from_pretrained(opt, use_safetensors=False).save_pretrained(both)
    (both / "model.fp16.safetensors").write_bytes(b"a variant")
    remote.repos["some/both"] = both
    folder, safe = hub.fetch_model("some/both", COMMIT)
    assert safe
    assert {n for n in names(folder) if not n.endswith(".json")} == {"model.safetensors"}
    load_model("hub:some/both", COMMIT)
    assert not any(path.endswith((".bin", "fp16.safetensors")) for path in remote.asked)


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path(__file__).with_name("code-was-run"),))


def test_code_in_a_bin_is_not_run(remote, opt, tmp_path):
    bad = shutil.copytree(opt, tmp_path / "bad")
    for file in bad.glob("pytorch_model*"):
        file.unlink()
    torch.save({"model.decoder.final_layer_norm.bias": Evil()}, bad / "pytorch_model.bin")
    remote.repos["some/bad"] = bad
    with pytest.raises(
        ValueError, match=r"a .bin file of hub:some/bad holds more than tensors, and code in it is not run"
    ):
        load_model("hub:some/bad", COMMIT)
    assert not Path(__file__).with_name("code-was-run").exists()


def test_ctp_load_takes_a_hub_model_of_bin_files(remote, opt):
    remote.repos["some/opt"] = opt
    model, tokenizer = ctp.load("some/opt", device="cpu")
    assert model.config.model_type == "opt"
    assert tokenizer.padding_side == "left"


def test_a_commit_without_weights_or_with_half_of_them(remote, opt, tmp_path):
    half = shutil.copytree(opt, tmp_path / "half")
    (half / "pytorch_model-00002-of-00002.bin").unlink()
    remote.repos["some/half"] = half
    with pytest.raises(ValueError, match=r"lacks pytorch_model-00002-of-00002.bin, which pytorch_model.bin.index.json"):
        load_model("hub:some/half", COMMIT)
    for file in half.glob("pytorch_model*"):
        file.unlink()
    remote.repos["some/none"] = half
    with pytest.raises(ValueError, match=r"'some/none' at c{40} holds neither model.safetensors nor pytorch_model.bin"):
        load_model("hub:some/none", COMMIT)


def test_what_was_deleted_is_fetched_again(remote, opt):
    remote.repos["some/opt"] = opt
    folder, _ = hub.fetch_model("some/opt", COMMIT)
    (folder / "config.json").resolve().unlink()
    (folder / "config.json").unlink()
    folder, _ = hub.fetch_model("some/opt", COMMIT)
    assert (folder / "config.json").is_file()


def _fetch(count, barrier):
    def download(*args, **kwargs):
        with count.get_lock():
            count.value += 1
        return original(*args, **kwargs)

    original, huggingface_hub.snapshot_download = huggingface_hub.snapshot_download, download
    barrier.wait()
    assert hub.fetch("some/opt", COMMIT, hub.CONFIG).is_dir()


def test_many_workers_of_a_node_fetch_once(remote, opt):
    remote.repos["some/opt"] = opt
    fork = multiprocessing.get_context("fork")  # the children have the settings of this test
    count, barrier = fork.Value("i", 0), fork.Barrier(4)
    workers = [fork.Process(target=_fetch, args=(count, barrier)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(30)
    assert [w.exitcode for w in workers] == [0] * 4
    assert count.value == 1


def test_adapters_and_checkpoints_bring_their_files_only(remote, opt, tmp_path):
    folder = shutil.copytree(opt, tmp_path / "mixed")
    (folder / "adapter_config.json").write_text("{}")
    for name in ("adapter_model.safetensors", "gptq_model-4bit-128g.safetensors"):
        save_file({"x": torch.zeros(2)}, folder / name)
    remote.repos["some/mixed"] = folder
    assert names(adapters.fetch("hub:some/mixed", COMMIT)) == {"adapter_config.json", "adapter_model.safetensors"}
    got = names(checkpoint.fetch("hub:some/mixed", COMMIT, weights=False))
    assert "gptq_model-4bit-128g.safetensors" not in got
    assert "config.json" in got
    got = names(checkpoint.fetch("hub:some/mixed", COMMIT))
    assert "gptq_model-4bit-128g.safetensors" in got
    assert not any(n.endswith(".bin") for n in got)


# -------------------------------------------------------------------- errors


def sentence(error):
    text = str(error.value)
    assert "\n" not in text
    return text


def test_a_gated_model_says_where_its_licence_is_and_how_to_log_in(remote, opt, monkeypatch):
    remote.repos["meta/gated"] = opt
    remote.gated.add("meta/gated")
    for ask in (lambda: load_model("hub:meta/gated", COMMIT), lambda: model_facts("hub:meta/gated", COMMIT),
                lambda: hub.check_access("meta/gated", COMMIT)):  # fmt: skip
        with pytest.raises(ValueError, match="gated") as caught:
            ask()
        text = sentence(caught)
        assert text == (f"the model 'meta/gated' is gated: accept its licence on {remote.url}/meta/gated, then "
                        "`hf auth login` or set HF_TOKEN")  # fmt: skip
    monkeypatch.setenv("HF_TOKEN", "hf_some")
    with pytest.raises(ValueError, match="the account of this machine's token may not read it: accept its licence on"):
        load_model("hub:meta/gated", COMMIT)


def test_a_token_that_the_hub_refuses(remote, opt, monkeypatch):
    remote.repos["some/opt"] = opt
    remote.token_refused = True
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    for ask in (lambda: hub.commit("some/opt"), lambda: hub.check_access("some/opt", COMMIT)):
        with pytest.raises(ValueError, match=r"the hub refuses this machine's token for the model 'some/opt' \(401\)"):
            ask()


def test_what_does_not_exist(remote, opt):
    remote.repos["some/opt"] = opt
    with pytest.raises(ValueError, match=r"no model 'no/such' on the hub, nor a folder of that name; if it is private"):
        sources.locate("no/such")
    with pytest.raises(ValueError, match=r"no model 'a/b/c' on the hub"):
        sources.locate("a/b/c")
    with pytest.raises(ValueError, match="the model 'some/opt' has no revision 'v9' on the hub"):
        sources.locate("some/opt", "v9")
    with pytest.raises(ValueError, match="no adapter 'no/such' on the hub"):
        adapters.fetch("hub:no/such", COMMIT)


def test_a_hub_that_goes_away_in_the_middle(remote, opt):
    remote.repos["some/opt"] = opt
    remote.cut.add("some/opt")
    with pytest.raises(
        hub.Unreachable, match=r"does not have all of the model 'some/opt' at c{40}; what has arrived"
    ) as e:
        load_model("hub:some/opt", COMMIT)
    sentence(e)
    remote.cut.clear()
    load_model("hub:some/opt", COMMIT)


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("I/O: No space left")]
)
def test_a_full_disk(monkeypatch, error):
    def full(*args, **kwargs):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
    with pytest.raises(ValueError, match=r"the disk is full: the model 'a/b' is fetched into .*; free some space"):
        hub.fetch("a/b", COMMIT, hub.CONFIG)


def test_a_fault_of_the_program_is_not_the_networks(monkeypatch):
    def wrong(*args, **kwargs):
        raise TypeError("no such argument")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", wrong)
    with pytest.raises(ValueError, match="cannot be fetched: TypeError: no such argument") as caught:
        hub.fetch("a/b", COMMIT, hub.CONFIG)
    assert not isinstance(caught.value, hub.Unreachable)


# ------------------------------------------------------ planning without a network


def test_an_unreachable_hub_is_asked_once(monkeypatch):
    asked = []

    def model_info(self, name, **kwargs):
        asked.append(name)
        raise TimeoutError("no answer")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    for name in ("a/b", "c/d", "e/f"):
        with pytest.raises(hub.Unreachable, match=f"'{name}' is no folder, the hub cannot be reached"):
            sources.locate(name)
    assert asked == ["a/b"]


def test_a_branch_that_was_fetched_is_known_without_a_network(remote, opt, monkeypatch):
    remote.repos["some/opt"] = opt
    huggingface_hub.snapshot_download("some/opt", allow_patterns=list(hub.CONFIG), ignore_patterns=["*/*"])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert sources.locate("some/opt")[1] == COMMIT


def test_known_models_are_what_their_architectures_give():
    known = known_models()
    assert known.keys() == ARCHITECTURES.keys()
    for name, config in ARCHITECTURES.items():
        commit, facts = known[name]
        assert hub.COMMIT.fullmatch(commit) or name.startswith("package:")
        assert facts == config_facts(config), name
    # What the hub's pages and the papers say, digit for digit.
    assert known["huggyllama/llama-7b"][1].parameters == 6_738_415_616
    assert known["meta-llama/Llama-2-13b-hf"][1].parameters == 13_015_864_320
    assert known["bigscience/bloom-7b1"][1].parameters == 7_069_016_064
    assert known["facebook/opt-1.3b"][1].parameters == 1_315_758_080


def test_facts_count_the_linears_of_the_blocks(llama_folder):
    _, revision, location = sources.locate(str(llama_folder))
    facts = model_facts(location, revision)
    hidden, inside = 32, 64
    attention = 2 * hidden * hidden + 2 * hidden * hidden // 2  # half as many heads of keys and values as of queries
    assert facts.linear_parameters == 2 * (attention + 3 * hidden * inside)
    assert (facts.layers, facts.vocab, facts.width) == (2, 257, 32)


def plan_of(tmp_path, pins, **changes):
    content = grid("facebook/opt-2.7b", **changes)
    content["recovery"]["precision"] = "bf16"  # its weights are float16
    file = write_grid(tmp_path / "g.yaml", content)
    return plan.make(gridfile.load(str(file), [], pins), pins)


C4 = {"dataset": "c4", "split": "train", "seq_len": 24, "count": 8}
PTB = {"method": "perplexity", "text": {"dataset": "ptb", "split": "test", "seq_len": 24}}


def test_a_plan_needs_no_network_for_what_is_known(tmp_path):
    pins = Pins(provisional=True)
    made = plan_of(tmp_path, pins, calibration=C4)
    assert pins.unpinned == []
    node = next(iter(made.nodes.values()))
    assert node.facts.parameters == 2_651_596_800
    assert node.cell.model.revision == "905a4b602cda5c501f1b3a2650a4152680238254"
    assert node.cell.model.dtype == "float16"


def test_what_cannot_be_pinned_is_provisional_in_a_plan_and_an_error_in_a_run(tmp_path, capsys):
    pins = Pins(provisional=True)
    models_and_more = [{"name": "facebook/opt-2.7b", "revision": "main"}]
    made = plan_of(tmp_path, pins, models=models_and_more, measures=PTB)
    assert pins.unpinned == ["facebook/opt-2.7b", "ptb"]
    assert {n.cell.measure.text.revision for n in made.nodes.values() if n.cell.kind == "evaluate"} == {"unpinned"}
    file = str(tmp_path / "g.yaml")
    assert command.main([file, "--plan", "--store", str(tmp_path / "store")]) == 0
    out = capsys.readouterr().out
    assert "not pinned, the hub cannot be reached: facebook/opt-2.7b, ptb: keys are provisional\n" in out
    assert command.main([file, "--store", str(tmp_path / "store")]) == 2
    assert "the hub cannot be reached" in capsys.readouterr().err
    with pytest.raises(GridError, match="'nobody/nothing' is no folder, the hub cannot be reached"):
        plan_of(tmp_path, Pins(provisional=True), models="nobody/nothing")


def test_a_run_finds_out_before_it_starts_that_a_known_model_is_out_of_reach(remote, opt, tmp_path):
    with pytest.raises(GridError, match=r"no model 'facebook/opt-2\.7b' on the hub"):
        plan_of(tmp_path, Pins())
    remote.repos["facebook/opt-2.7b"] = opt
    remote.gated.add("facebook/opt-2.7b")
    with pytest.raises(GridError, match=r"'facebook/opt-2\.7b' is gated: accept its licence on"):
        plan_of(tmp_path, Pins())
    remote.gated.clear()
    assert plan_of(tmp_path, Pins()).nodes
