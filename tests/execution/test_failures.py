"""Faults put into real tiny cells: each is one clear line, stops only what needs it, and is tried again."""

import json
import os
import re
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import mlflow
import pytest
import ray
import torch
from support.bench import Bench
from support.gridruns import runs, starting
from support.prompts import CPU, S, run
from support.tiny import random_windows, tiny_llama
from support.tinygrid import byte_tokenizer, grid, write_grid
from transformers import LlamaForCausalLM, LlamaModel

from ctp import cells
from ctp import grid as command
from ctp.cells import Latency, LoRA, Perplexity
from ctp.cells.cell import Compress, Evaluate, Learn, key, to_json
from ctp.common.messages import one_line
from ctp.execution.loading import token_windows
from ctp.learning.lora import learn_lora
from ctp.machine.memory import AtOnce, OutOfMemory, ran_out, said
from ctp.planning import plugins
from ctp.planning.states import again, states
from ctp.scheduling import tune
from ctp.scheduling import walk as scheduling_walk
from ctp.scheduling.walk import WORKER_DIED, death, ended_for_memory, without_commands
from ctp.storage.ref import ref
from ctp.storage.store import Store

FAULTS = {
    "host": lambda: MemoryError(),
    "torch": lambda: RuntimeError(
        "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
        "allocate 4000000000000 bytes. Error code 12 (Cannot allocate memory)"
    ),
    "cuda": lambda: torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB of which 3.06 MiB is "
        "free. Process 1 has 79.09 GiB memory in use. Of the allocated memory 70 GiB is allocated by PyTorch"
    ),
}


def full_above(monkeypatch, positions, fault, when=lambda: True):
    """Memory for so many positions in a pass, one of windows or of a prompt and its windows in a row; counts passes."""
    own, seen = LlamaModel.forward, []

    def forward(self, input_ids=None, inputs_embeds=None, **more):
        given = input_ids if inputs_embeds is None else inputs_embeds
        seen.append(given.shape[0] * given.shape[1])
        if seen[-1] > positions and when():
            raise FAULTS[fault]()
        return own(self, input_ids=input_ids, inputs_embeds=inputs_embeds, **more)

    monkeypatch.setattr(LlamaModel, "forward", forward)
    return seen


# ------------------------------------------------------------------- out of memory


@pytest.fixture(scope="module")
def undisturbed():
    """Runs of a batch of four at once, and two by two."""
    return run(clip=None), run(clip=None, accumulate=2)


@pytest.mark.parametrize("fault", FAULTS)
def test_learning_goes_on_with_smaller_micro_batches(monkeypatch, undisturbed, fault):
    """The very run that accumulate = 2 asks for, and within rounding that of the full batch."""
    (whole, halves), told = undisturbed, []
    full_above(monkeypatch, 4 + 2 * (S - 1), fault)
    short = run(clip=None, report=told.append)
    assert torch.equal(short.embeddings, halves.embeddings)
    # Adam divides by the root of the squared gradient: rounding of 1e-7 in a sum grows to some 1e-5 of a rate of 0.05.
    torch.testing.assert_close(short.embeddings, whole.embeddings, atol=1e-4, rtol=0)
    assert {t.at_once for t in told if t.step} == {2}
    assert short.history[-1]["at_once"] == 2
    assert "at_once" not in whole.history[-1]


def test_a_gradient_that_broke_off_halfway_does_not_count(monkeypatch):
    """LoRA: memory runs out in the backward pass, when the last block's gradients are there already."""
    text = {"dataset": "d", "split": "train", "seq_len": S}
    spec = LoRA(text=text, steps=3, validate_every=3, lr=0.01, dropout=0.0, batch=4)
    train, validation = random_windows(10, S, seed=1), random_windows(5, S, seed=2)
    halves = learn_lora(tiny_llama(), train, validation, spec.model_copy(update={"accumulate": 2}), runtime=CPU)
    model, broken = tiny_llama(), []

    def full(module, inputs, output):
        def back(grad):
            if grad.numel() > 2 * (S - 1) * grad.shape[-1]:
                broken.append(grad.shape)
                raise FAULTS["cuda"]()

        if output[0].requires_grad:
            output[0].register_hook(back)

    model.model.layers[0].self_attn.register_forward_hook(full)
    short = learn_lora(model, train, validation, spec, runtime=CPU)
    assert len(broken) == 1
    assert all(torch.equal(short.weights[n], t) for n, t in halves.weights.items())


def test_a_smaller_micro_batch_is_kept_for_the_rest_of_the_run(monkeypatch, undisturbed, tmp_path):
    """A resumed run goes on with it, to the same bytes, though there is memory again."""

    def stop(state):
        state.save(tmp_path)
        if state.step == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as short:
        full_above(short, 4 + 2 * (S - 1), "torch")
        with pytest.raises(KeyboardInterrupt):
            run(clip=None, checkpoint=stop)
    seen = full_above(monkeypatch, 10**6, "torch")
    assert torch.equal(run(clip=None, resume=tmp_path).embeddings, undisturbed[1].embeddings)
    assert max(seen[2:]) == 4 + 2 * (S - 1)  # after the two trials of the objective on one window


@pytest.mark.slow
def test_memory_that_does_not_do_for_one_window_is_told(grid_run, llama_folder, monkeypatch, tracking_uri):
    """One line with what was tried and what could help; MLflow has it; --retry-failed does it and nothing else."""
    content = grid(llama_folder)
    with monkeypatch.context() as short:
        full_above(short, 24, "cuda", torch.is_grad_enabled)
        code, out, err = grid_run("short", content, "--where", "target!=sparsegpt-50-4bit")
    assert (code, err) == (1, [])
    [failed] = starting(out, "failed: tiny-llama_gptq-3bit_soft")
    file = re.search(r"\((/.*\.json)\)$", failed)[1]
    assert failed.startswith(
        "failed: tiny-llama_gptq-3bit_soft_prompt-k4-pydoc: OutOfMemory: CUDA out of memory. Tried to allocate 2.00 "
        "GiB. GPU 0 has a total capacity of 79.10 GiB of which 3.06 MiB is free; tried with 4, 2 and 1 at once; could "
        "help: --recompute, --packed, windows shorter than text.seq_len = 24, more --cpus a cell, a larger machine ("
    )
    assert "in forward" in json.loads(Path(file).read_text())["traceback"]
    skipped = starting(out, "skipped:")
    assert len(skipped) == 2
    assert all(line.endswith("_ppl-pydoc-test: needs tiny-llama_gptq-3bit_soft_prompt-k4-pydoc") for line in skipped)
    [run_] = [r for r in runs(tracking_uri, "short") if r.info.status == "FAILED"]
    assert run_.data.tags["ctp.error"].startswith("OutOfMemory: CUDA out of memory")
    assert "in forward" in mlflow.artifacts.load_text(f"{run_.info.artifact_uri}/traceback.txt")

    code, out, _ = grid_run("short", content, "--retry-failed")
    assert code == 0
    assert "3 done in" in "".join(out)  # the prompt and its two evaluations, nothing of the target that never ran
    assert not Path(file).exists()
    again_ = [r for r in runs(tracking_uri, "short") if r.info.run_id == run_.info.run_id]
    assert (again_[0].info.status, again_[0].data.tags.get("ctp.error")) == ("FINISHED", None)
    code, out, _ = grid_run("short", content, "--retry-failed")
    assert code == 0
    assert "No cell failed last time" in out[-1]


SCARCE = """
import json, resource, sys
from pathlib import Path
from support.tiny import random_windows, tiny_llama
from ctp.cells import SoftPrompt
from ctp.cells.runtime import Runtime
from ctp.learning.soft_prompt import learn

spec = SoftPrompt(k=8, text={"dataset": "d", "split": "train", "seq_len": 512}, steps=2, validate_every=2, lr=0.01,
                  batch=8, accumulate=int(sys.argv[1]))
if limit := int(sys.argv[2]):
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
train, validation = (random_windows(8, 512, vocab=4096, seed=seed) for seed in (1, 2))
model = tiny_llama(vocab=4096, hidden=256, layers=6, context=1024)
learned = learn(model, train, validation, spec, runtime=Runtime(device="cpu"))
[peak] = [x.split()[1] for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmPeak:")]
print(json.dumps([int(peak) * 1024, learned.history[-1].get("at_once"), learned.best_val_loss]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS and /proc")
def test_a_process_that_is_given_little_memory():
    """A real lack: half of what a batch takes beyond a single window. As torch says it, and nobody plays it."""

    def learned(accumulate, limit=0):
        asked = [sys.executable, "-c", SCARCE, str(accumulate), str(limit)]
        root = Path(__file__).parents[1]
        path = os.pathsep.join([str(root), str(root.parent), os.environ.get("PYTHONPATH", "")])
        ran = subprocess.run(asked, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}, check=True)
        return json.loads(ran.stdout.splitlines()[-1])

    (most, all_, loss), (least, _, _) = learned(1), learned(8)
    assert all_ is None
    used, at_once, short = learned(1, (most + least) // 2)
    assert least < used < most
    assert at_once in (1, 2, 4)
    assert short == pytest.approx(loss, rel=1e-6)


def test_an_evaluation_goes_on_with_fewer_windows(tmp_path, llama_folder, monkeypatch):
    bench = Bench(tmp_path, llama_folder, compression=["dense"], sources=[])
    target, cell = bench.cells
    bench.execute(target)
    with monkeypatch.context() as short:
        seen = full_above(short, 23, "host")  # of four windows of 23 scored tokens, one
        bench.execute(cell)
    assert [n for n in seen if n >= 23] == [4 * 23, 2 * 23, 23, 23, 23, 23]  # fewer: how the head is reached is tried
    manifest = bench.store.manifest(ref(cell))
    assert manifest["at_once"] == 1
    shutil.rmtree(bench.store.folder(ref(cell)))
    bench.execute(cell)
    whole = bench.store.manifest(ref(cell))
    assert "at_once" not in whole
    # The same sum in float64 of the same log-likelihoods, but for the order in which float32 matrices were added up.
    assert manifest["metrics"]["ppl"] == pytest.approx(whole["metrics"]["ppl"], rel=1e-6)


def test_what_a_failed_attempt_wrote_is_gone(tmp_path, llama_folder, monkeypatch):
    bench = Bench(tmp_path, llama_folder, compression=["dense"], sources=[])
    target, cell = bench.cells
    bench.execute(target)
    batches = []

    def measure(self, job):
        batches.append(job.runtime.batch)
        (job.folder / f"{job.runtime.batch}.json").write_text("{}")
        job.record[f"with {job.runtime.batch}"] = True
        if job.runtime.batch > 2:
            raise FAULTS["torch"]()
        return {"x": 1.0}

    monkeypatch.setattr(Perplexity, "measure", measure, raising=False)
    bench.execute(cell)
    manifest = bench.store.manifest(ref(cell))
    assert batches == [4, 2]
    assert sorted(manifest["files"]) == ["2.json", "result.json"]
    assert manifest["with 2"]
    assert "with 4" not in manifest


def test_a_timing_is_not_tried_with_something_else(tmp_path, llama_folder, monkeypatch):
    """Its batch is what is timed."""
    latency = {"method": "latency", "seq_len": 8, "new_tokens": 2, "batch": 4, "repeats": 1}
    bench = Bench(tmp_path, llama_folder, compression=["dense"], sources=[], measures=latency)
    target, cell = bench.cells
    bench.execute(target)
    tried = []
    fails = lambda self, job: tried.append(1) or raising(FAULTS["host"]())  # noqa: E731
    monkeypatch.setattr(Latency, "measure", fails, raising=False)
    with pytest.raises(OutOfMemory) as told:
        bench.execute(cell)
    assert str(told.value) == "no memory was left; could help: more --cpus a cell, a larger machine"
    assert tried == [1]


def test_a_compression_is_not_tried_with_other_batches(tmp_path, llama_folder, monkeypatch):
    """Sums in another order would round a weight to another code here and there."""
    bench = Bench(tmp_path, llama_folder)
    seen = full_above(monkeypatch, 24, "torch")  # one window, as the check of the blocks takes
    with pytest.raises(OutOfMemory, match=r"bytes; could help: fewer windows than calibration.count = 8, more --cpus"):
        bench.execute(bench.all(Compress)[1])
    assert [n for n in seen if n > 24] == [8 * 24]


def raising(error):
    raise error


def test_a_failed_attempt_leaves_no_tensors_behind(monkeypatch):
    """The error holds the frames of the attempt, and these its activations, for as long as it is looked at."""
    held = []

    def attempt(size):
        assert not [r for r in held if r() is not None]
        some = torch.zeros(4)
        held.append(weakref.ref(some))
        if size > 1:
            raise MemoryError
        return size

    at_once = AtOnce(3)
    assert at_once(attempt) == 1
    assert at_once.tried == [3, 2]
    assert len(held) == 3
    with pytest.raises(ValueError, match="other"):
        at_once(lambda size: raising(ValueError("other")))


def test_what_is_no_lack_of_memory_is_not_tried_again():
    assert all(ran_out(make()) for make in FAULTS.values())
    wrapped = ValueError("model.layers.0: no")
    wrapped.__cause__ = FAULTS["torch"]()
    assert ran_out(wrapped)
    for other in (ValueError("out of memory"), RuntimeError("shape mismatch"), FileNotFoundError("x")):
        assert not ran_out(other)
    assert said(FAULTS["torch"]()) == "can't allocate memory: you tried to allocate 4000000000000 bytes"
    with pytest.raises(RuntimeError) as real:
        torch.empty(2**60)
    assert ran_out(real.value)
    with pytest.raises(MemoryError) as host:
        bytearray(2**62)
    assert ran_out(host.value)
    assert [AtOnce(6, n).size for n in range(5)] == [6, 3, 2, 1, 1]


# ------------------------------------------------------------------ dead workers

DEAD = """Failure # 1 (occurred at 2026-11-23_06-00-31)
1 worker(s) were killed due to the node running low on memory. Memory on the node (IP: 192.0.2.2, ID: 333d) was \
22.01GB used / 23.54GB limit (0.935)
Top 10 memory users: PID\tMEM(GB)\tCOMMAND
9131\t0.44\tpython serve.py --token=secret
Failure # 2 (occurred at 2026-11-23_06-00-33)
1 worker(s) were killed due to the node running low on memory. Memory on the node (IP: 192.0.2.2, ID: 333d) was \
22.53GB used / 23.54GB limit (0.957)
Top 10 memory users: PID\tMEM(GB)\tCOMMAND
9131\t0.44\tpython serve.py --token=secret
"""


def test_what_ray_says_of_a_death():
    """As Ray 2.60 writes it, shortened."""
    words = without_commands(DEAD)
    assert "secret" not in words
    assert ended_for_memory(words) == 2
    assert "on 192.0.2.2, where 22.53GB of 23.54GB were in use" in death(words)
    assert "\n" not in death(words)
    assert death("The actor died unexpectedly before finishing this task.") == WORKER_DIED
    assert ended_for_memory("The actor died unexpectedly before finishing this task.") == 0


def test_a_retry_after_a_death_for_memory_begins_with_less(tmp_path):
    class Trial:
        trial_id, config, error_file = "a", {"cells": "[]"}, str(tmp_path / "error.txt")

    class Search:
        messages: dict = {}  # noqa: RUF012

    witness = tune.Witness(Search())
    witness.on_trial_error(None, Trial)  # no file yet: nothing is known
    assert Trial.config == {"cells": "[]"}
    Path(Trial.error_file).write_text(DEAD)
    witness.on_trial_error(None, Trial)
    assert Trial.config["halved"] == 2
    assert Search.messages == {"a": without_commands(DEAD)}


@pytest.mark.slow
def test_workers_that_are_killed(tmp_path, llama_folder, monkeypatch, capsys, tracking_uri):
    """By the kernel, in real workers: retries take fewer windows at once where memory was why; the line and record of
    what cannot be done are the driver's, as nobody else is left."""
    start = ray.init
    monkeypatch.setattr(ray, "init", lambda **how: start(num_cpus=2, **how))
    monkeypatch.setattr(
        scheduling_walk, "ended_for_memory", lambda words: words.count("Failure #")
    )  # all of these were
    monkeypatch.setattr(cells.Measure, "registry", dict(cells.Measure.registry))
    monkeypatch.setattr(plugins, "_sources", {})
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_uri)
    monkeypatch.chdir(tmp_path)
    content = grid(llama_folder, compression="dense", sources=[], recovery=[])
    content["plugins"] = str(Path(__file__).parents[1] / "plugins" / "hungry.py")
    content["measures"] = [{"method": "hungry", "fits": [1, 0]}, content["measures"]]
    code = command.main([str(write_grid(tmp_path / "killed.yaml", content)), "--device", "cpu"])
    out = capsys.readouterr().out.splitlines()
    assert code == 1
    assert "killed: 3 done, 1 failed in" in "".join(out)
    assert not [line for line in out if "raylet" in line]
    store = Store(str(tmp_path / "results" / "store"))
    [manifest] = [json.loads(p.read_text()) for p in Path(store.folders.root).glob("evaluate/*hungry-1*/manifest.json")]
    assert (manifest["metrics"]["batch"], manifest["at_once"]) == (1, 1)
    [failed] = starting(out, "failed: tiny-llama_dense_none_hungry-0: ")
    record = json.loads(Path(re.search(r"\((/.*\.json)\)$", failed)[1]).read_text())
    assert f": {WORKER_DIED} (" in failed
    assert record["error"] == WORKER_DIED
    assert "Failure # 3" in record["traceback"]
    [run_] = [r for r in runs(tracking_uri, "killed") if r.info.status == "FAILED"]
    assert run_.data.tags["ctp.error"] == WORKER_DIED
    assert "Failure # 3" in mlflow.artifacts.load_text(f"{run_.info.artifact_uri}/traceback.txt")
    assert command.main([str(tmp_path / "killed.yaml"), "--plan", "--retry-failed"]) == 0
    assert "3 done, 1 to run" in capsys.readouterr().out


# --------------------------------------------------------------- numbers that are none


def test_a_prompt_that_diverges(grid_run, llama_folder):
    content = grid(llama_folder, compression=["dense"], sources=["dense"])
    content["recovery"] |= {"lr": 1e9, "weight_decay": 1e3, "steps": 6}
    code, out, err = grid_run("diverging", content)
    assert (code, err) == (1, [])
    [failed], [skipped] = starting(out, "failed:"), starting(out, "skipped:")
    assert re.match(r"failed: tiny-llama_dense_soft_prompt-k4-pydoc: FloatingPointError: step \d+: the .* loss is "
                    r"(not finite|nan|inf); learning rate 1e\+09; last losses: ", failed)  # fmt: skip
    assert skipped.endswith("needs tiny-llama_dense_soft_prompt-k4-pydoc")
    told = [line.split()[1] for line in out if line.startswith("[")]
    assert told.index("FAILED") < told.index("skipped")
    code, out, _ = grid_run("diverging", content, "--plan")
    assert any("failed last time: FloatingPointError" in line for line in out)


def test_retry_failed_computes_damage_that_it_meets_and_leaves_the_rest(grid_run, llama_folder, tmp_path, tracking_uri):
    content = grid(llama_folder, compression=["dense"], sources=["dense"])
    good = {"method": "random_prompt", "k": [2, 3]}
    content["recovery"] = [good, content["recovery"] | {"text": content["recovery"]["text"] | {"count": 10**6}}]
    assert grid_run("both", content)[0] == 1
    whole = Path("results/store/evaluate")
    [away], [torn] = whole.glob("*-k2*"), whole.glob("*-k3*")
    shutil.rmtree(away)
    manifest = torn / "manifest.json"
    lost_key = json.loads(manifest.read_text())["key"]
    [lost] = [r for r in runs(tracking_uri, "both") if r.data.tags["ctp.key"] == lost_key]
    mlflow.MlflowClient(tracking_uri).delete_run(lost.info.run_id)
    manifest.write_bytes(manifest.read_bytes()[:100])
    code, out, _ = grid_run("both", content, "--retry-failed")
    assert code == 1
    assert (torn.exists(), away.exists()) == (True, False)
    assert sum("is not JSON" in line for line in out) == 1


@pytest.mark.slow
def test_weights_that_are_not_numbers(grid_run, llama_folder, tmp_path):
    """No Hessian, no perplexity: each is told, by name, and what can be measured is."""
    content = grid(llama_folder, recovery={"method": "random_prompt", "k": 2})
    content["measures"] = [content["measures"], {"method": "neighbours", "top": 3}]
    bench = Bench(tmp_path / "whole", llama_folder)
    windows = token_windows(bench.all(Compress)[1].calibration, byte_tokenizer(), bench.runtime)
    late = next(t for t in windows[1:].flatten().tolist() if t not in windows[0])  # not seen before the Hessian is
    broken = {"up_proj": ("model.layers.0.mlp.up_proj.weight", 3), "token": ("model.embed_tokens.weight", late)}
    for name, (weight, row) in broken.items():
        folder = shutil.copytree(llama_folder, tmp_path / name)
        model = LlamaForCausalLM.from_pretrained(folder)
        with torch.no_grad():
            model.get_parameter(weight)[row, 5] = torch.nan
        model.save_pretrained(folder)
        told = {
            "up_proj": "ValueError: LlamaForCausalLM computes no finite numbers: model.layers.0.mlp.up_proj.weight",
            "token": "ValueError: model.layers.0.self_attn.q_proj: the Hessian is not finite",
        }[name]
        code, out, err = grid_run(f"broken_{name}", {**content, "models": str(folder)})
        assert (code, err) == (1, [])
        failed = starting(out, "failed:")
        assert sum(told in line for line in failed) == 2
        if name == "up_proj":  # the token may not occur in what is measured
            assert len(failed) == 4  # and the dense model, without and with a prompt
            assert (
                sum(": FloatingPointError: summed NLL of 92 tokens is nan: no perplexity (" in f for f in failed) == 2
            )
        assert len(starting(out, "skipped:")) == 2 * 3


@pytest.mark.parametrize(
    ("metrics", "error", "message"),
    [
        ({"ppl": float("nan")}, FloatingPointError, "the metric 'ppl' is nan"),
        ({"x": 1, "ppl": float("inf")}, FloatingPointError, "the metric 'ppl' is inf"),
        ({"ppl": None}, TypeError, "the metric 'ppl' is None, a NoneType, not an int or a float"),
        ({"ppl": "12"}, TypeError, "the metric 'ppl' is '12', a str, not an int or a float"),
        ({"ppl": True}, TypeError, "the metric 'ppl' is True"),
        ({}, ValueError, "numbers by name are needed, at least one"),
        (None, ValueError, "metrics = None: numbers by name are needed"),
    ],
)
def test_a_number_that_is_missing_is_not_published(tmp_path, llama_folder, monkeypatch, metrics, error, message):
    bench = Bench(tmp_path, llama_folder, compression=["dense"], sources=[])
    target, cell = bench.cells
    bench.execute(target)
    monkeypatch.setattr(Perplexity, "measure", lambda self, job: metrics, raising=False)
    with pytest.raises(error, match=re.escape(message)):
        bench.execute(cell)
    assert not bench.store.has(ref(cell))


# ------------------------------------------------------------- what is not there


def test_a_data_set_that_is_missing(grid_run, llama_folder, tmp_path):
    """Known before anything runs; and on a worker, where it has gone since."""
    data = tmp_path / "data" / "wikitext-2-raw"
    data.mkdir(parents=True)
    text = {"dataset": "wikitext2", "split": "test", "seq_len": 24, "count": 2}
    content = grid(llama_folder, compression=["dense"], sources=[], recovery=[])
    content["measures"] = [content["measures"], {"method": "perplexity", "text": text}]
    code, out, err = grid_run("missing", content, "--data", str(data.parent))
    assert (code, out) == (2, [])
    [line] = err
    assert f"wikitext2: {data} has no test.jsonl" in line

    (data / "test.jsonl").write_text(json.dumps({"text": "a text " * 100}) + "\n")
    file = data / "test.jsonl"
    own = tune.run

    def away(*args, **how):
        file.unlink()
        return own(*args, **how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tune, "run", away)
        code, out, err = grid_run("missing", content, "--data", str(data.parent))
    assert (code, err) == (1, [])
    [failed] = starting(out, "failed:")
    assert f"ValueError: wikitext2: {file} is missing on this machine (" in failed
    assert "2 done, 1 failed in" in "".join(out)


def test_a_gated_model(grid_run, remote, llama_folder, monkeypatch):
    """Refused before anything runs; and to a worker, where access was withdrawn since."""
    remote.repos["some/llama"] = llama_folder
    remote.gated.add("some/llama")
    content = grid("some/llama", sources=[], recovery=[])
    content["models"] = ["some/llama", str(llama_folder)]
    code, out, err = grid_run("gated", content)
    assert (code, out) == (2, [])
    [line] = err
    assert "'some/llama' is gated: accept its licence on" in line
    assert "HF_TOKEN" in line
    remote.token_refused = True
    code, out, err = grid_run("gated", content)
    assert (code, out, len(err)) == (2, [], 1)
    assert "the hub refuses this machine's token for the model 'some/llama' (401)" in err[0]

    remote.token_refused = False
    remote.gated.clear()
    own = tune.run

    def withdrawn(*args, **how):
        remote.gated.add("some/llama")
        return own(*args, **how)

    monkeypatch.setattr(tune, "run", withdrawn)
    code, out, err = grid_run("gated", content)
    assert (code, err) == (1, [])
    assert "7 done, 3 failed, 2 skipped in" in "".join(out)
    failed = starting(out, "failed:")
    assert all("ValueError: the model 'some/llama' is gated: accept its licence on" in line for line in failed)


# ------------------------------------------------------------------------ trying again


def test_what_retry_failed_runs(tmp_path, llama_folder):
    bench = Bench(tmp_path, llama_folder)
    dense, gptq, sparse = bench.all(Compress)
    [learned] = bench.all(Learn)
    for cell in (dense, gptq):
        bench.execute(cell)
    assert again(bench.plan, states(bench.plan, bench.store)) == set()
    bench.store.failures.record(ref(learned), to_json(learned), "ValueError: no", "trace")
    behind = {key(c) for c in bench.all(Evaluate) if c.recovery and c.target != sparse}
    assert len(behind) == 2
    assert again(bench.plan, states(bench.plan, bench.store)) == {key(learned), *behind}
    bench.store.failures.record(ref(sparse), to_json(sparse), "its worker died", "")
    found = again(bench.plan, states(bench.plan, bench.store))
    assert found == {key(learned), key(sparse)} | {
        key(c) for c in bench.all(Evaluate) if c.recovery or c.target == sparse
    }


def test_an_error_is_one_line_of_a_terminal():
    assert one_line("ValueError: a\n\n  b\x1b[31m\tc\n") == "ValueError: a b\\x1b[31m c"
