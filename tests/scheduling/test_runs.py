"""`python -m ctp.grid` as a person runs it: real processes where they matter, real stores, exit codes."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from support.gridruns import command, manifests, run, runs, without_ray
from support.tinygrid import grid, write_grid

from analysis import transfer_matrix
from ctp import grid as command_line
from ctp.cells.cell import Evaluate
from ctp.storage.ref import ref
from ctp.tracking.tracker import Tracker

ROOT = Path(__file__).parents[2]


def processes(marker):
    """Command lines of living processes that carry `marker` in their environment."""
    found = []
    for p in Path("/proc").glob("[0-9]*"):
        try:
            if marker.encode() in (p / "environ").read_bytes():
                found.append(int(p.name))
        except OSError:
            continue
    return found


def learning(tmp_path):
    """Workers of a dead driver that are not yet gone: Ray ends them within seconds, its two agents within minutes."""
    lines = [Path(f"/proc/{p}/cmdline") for p in processes(f"CTP_TEST_MARKER={tmp_path}")]
    return [p for p in lines if p.exists() and b"ray::" in (title := p.read_bytes()) and b"Agent" not in title]


def wait_for(condition, seconds=90):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.05)
    raise AssertionError(f"not seen within {seconds} s")


def test_a_run_and_the_same_again(tmp_path, llama_folder):
    file = write_grid(tmp_path / "tiny.yaml", grid(llama_folder))
    first = run("ctp.grid", file, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert re.search(r"\[10/10\] done +evaluate", first.stdout)
    assert "10 done in" in first.stdout
    before = manifests(tmp_path)
    assert len(before) == 10
    assert len(runs(f"sqlite:///{tmp_path}/results/mlflow.db", "tiny")) == 10

    second = run("ctp.grid", file, cwd=tmp_path)
    assert second.returncode == 0, second.stderr
    assert "10 done, 0 to run" in second.stdout
    assert manifests(tmp_path) == before


def test_plans_and_the_matrix_of_what_is_done(copied, uri, tmp_path, capsys):
    """The commands, in this process."""
    file, at = copied.plan.grid.path, ["--store", copied.store.uri]
    assert command_line.main([str(file), "--plan", *at]) == 0
    assert "10 cells (3 compress, 1 learn, 6 evaluate): 10 done, 0 to run" in capsys.readouterr().out
    assert command_line.main([str(file), "--where", "target=dense", "--plan", *at]) == 0
    assert "5 cells (2 compress, 1 learn, 2 evaluate): 5 done" in capsys.readouterr().out
    Tracker(uri, copied.plan, copied.store).sync()
    assert transfer_matrix.main(["g", "--csv", str(tmp_path / "m.csv")]) == 0
    shown = capsys.readouterr().out
    assert "gptq-3bit prompt, k=4, pydoc" in shown
    for cell in copied.all(Evaluate):
        assert f"{copied.store.manifest(ref(cell))['metrics']['ppl']:.2f}" in shown


def test_a_failed_cell_stops_only_what_needs_it(tmp_path, llama_folder, uri, capsys, monkeypatch):
    without_ray(monkeypatch)
    monkeypatch.chdir(tmp_path)
    content = grid(llama_folder)
    content["recovery"]["text"]["count"] = 10**6  # more windows than there is text: known only when it is read
    content["recovery"]["precision"] = "fp16"
    file = str(write_grid(tmp_path / "tiny.yaml", content))
    assert command_line.main([file, "--device", "cpu"]) == 1
    found = capsys.readouterr().out
    assert found.count("no fast float16: computing in float32") == 1  # before its cell begins
    assert "6 done, 1 failed, 3 skipped in" in found
    assert re.search(r"FAILED +learn .*ValueError: .*1000000", found)
    assert re.search(r"skipped: .*: needs tiny-llama_gptq-3bit_soft_prompt", found)
    [failed] = [r for r in runs(uri, "tiny") if r.info.status == "FAILED"]
    assert "1000000" in failed.data.tags["ctp.error"]
    assert command_line.main([file, "--plan"]) == 0
    assert "failed last time" in capsys.readouterr().out


@pytest.fixture
def long_grid(tmp_path, llama_folder):
    content = grid(llama_folder)
    content["recovery"] |= {"steps": 100_000, "validate_every": 50_000}
    return write_grid(tmp_path / "long.yaml", content)


@pytest.fixture
def start(tmp_path):
    """Start a grid in the background; whatever it leaves behind goes with the test."""
    marker = f"CTP_TEST_MARKER={tmp_path}"
    name, value = marker.split("=")

    def starter(*args):
        return subprocess.Popen(
            command("ctp.grid", *args), cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env={**os.environ, name: value}, start_new_session=True,
        )  # fmt: skip

    yield starter
    for pid in processes(marker):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


@pytest.mark.slow
def test_killed_and_started_again_repeats_nothing(tmp_path, long_grid, start):
    driver = start(long_grid, "--checkpoint-seconds", "0.2")
    partial = tmp_path / "results" / "store" / "partial"
    wait_for(lambda: len(manifests(tmp_path)) == 6 and list(partial.glob("*/step-*/manifest.json")))
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    wait_for(lambda: not learning(tmp_path), 60)
    before = manifests(tmp_path)
    reached = max(int(p.parent.name.removeprefix("step-")) for p in partial.glob("*/step-*/manifest.json"))

    again = start(long_grid, "--checkpoint-seconds", "0.2")
    lines = []
    for line in again.stdout:
        lines.append(line)
        if "..." in line and "step" in line:
            break
    text = "".join(lines)
    assert "6 done, 4 to run" in text
    assert "interrupted at step" in text
    assert int(re.search(r"step (\d+)/", lines[-1])[1]) >= reached
    os.killpg(again.pid, signal.SIGINT)  # as a terminal does: to the whole process group
    out, _ = again.communicate(timeout=60)
    assert again.returncode == 130, out
    assert "goes on from here" in out
    assert {n: before[n] for n in before} == {n: m for n, m in manifests(tmp_path).items() if n in before}
    states = [r.info.status for r in runs(f"sqlite:///{tmp_path}/results/mlflow.db", "long")]
    assert states.count("FINISHED") == 6


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["demoo"], 2, "did you mean 'demo'"),
        (["FILE", "--set", "recovery.k=-1"], 2, "recovery.k = -1: should be greater than 0"),
        (["FILE", "--where", "nope=1"], 2, "unknown axis 'nope'"),
        (["FILE", "--stage", "both"], 2, "invalid choice"),
        (["FILE", "--store", "/proc/none/store"], 3, "cannot be written"),
        (["FILE", "--store", "nope://x"], 3, "store 'nope://x'"),
    ],
)
def test_exit_codes_before_anything_starts(tmp_path, llama_folder, monkeypatch, capsys, args, code, message):
    monkeypatch.chdir(tmp_path)
    file = write_grid(tmp_path / "tiny.yaml", grid(llama_folder))
    try:
        found = command_line.main([str(file) if a == "FILE" else a for a in args])
    except SystemExit as e:  # argparse's
        found = e.code
    assert found == code
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("results/store/*/*/manifest.json"))


def test_an_error_is_the_exit_code_of_the_process(tmp_path, llama_folder):
    file = write_grid(tmp_path / "tiny.yaml", grid(llama_folder))
    found = run("ctp.grid", file, "--address", "127.0.0.1:9", cwd=tmp_path)
    assert found.returncode == 2, found.stdout + found.stderr
    assert "no Ray cluster at 127.0.0.1:9" in found.stderr
    assert "Traceback" not in found.stderr
    assert not list(tmp_path.glob("results/store/*/*/manifest.json"))


def test_tracking_that_cannot_be_reached(tmp_path, llama_folder, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.chdir(tmp_path)
    assert command_line.main([str(write_grid(tmp_path / "tiny.yaml", grid(llama_folder)))]) == 3
    assert "MLflow at http://127.0.0.1:9 cannot be reached" in capsys.readouterr().err
