"""Who ended it is said: a method that ends its process, a method that writes nothing, a process of Ray's."""

import ctypes
import os
import re
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace
from typing import ClassVar, Literal

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.bench import Bench

from ctp import cells
from ctp.cells import Compression, Measure, Recovery
from ctp.cells.cell import Compress, Evaluate, Learn, to_json
from ctp.cells.events import Failed
from ctp.execution.worker import do
from ctp.machine import signals
from ctp.machine.contained import MethodEnded, contained, crash
from ctp.planning import plugins
from ctp.prompts.files import save_prompt
from ctp.scheduling import cluster
from ctp.storage.ref import ref

ENDS = {
    "exit": (lambda: sys.exit(3), "SystemExit: 3: the method itself ended the process"),
    "system exit": (lambda: _raise(SystemExit("done")), "SystemExit: done: the method itself ended the process"),
    "interrupt": (lambda: _raise(KeyboardInterrupt()), "KeyboardInterrupt: the method itself ended the process"),
    "_exit": (lambda: os._exit(7), "MethodEnded: os._exit(7): the method itself ended the process"),
}


def _raise(e):
    raise e


@pytest.fixture(autouse=True)
def forgotten(monkeypatch):
    for family in (cells.Measure, cells.Recovery, cells.Compression):
        monkeypatch.setattr(family, "registry", dict(family.registry))
    monkeypatch.setattr(plugins, "_sources", {})


def told(bench, cell):
    """The last event of a cell that is done here as a worker does it."""
    events = []
    do(to_json(cell) | {"key": "?"}, bench.store, bench.runtime, events.append, "run")
    return events[-1]


@pytest.mark.parametrize("end", ENDS)
def test_a_method_that_ends_its_process_fails_its_cell(tmp_path, llama_folder, end):
    class Ends(Measure):
        method: Literal["ends"] = "ends"

        def measure(self, job):
            ENDS[end][0]()

    own = os._exit
    bench = Bench(tmp_path, llama_folder, compression=["dense"], sources=[], measures={"method": "ends"})
    for cell in bench.all(Compress):
        bench.execute(cell)
    event = told(bench, bench.all(Evaluate)[0])
    assert isinstance(event, Failed)
    assert event.error.startswith(ENDS[end][1])
    assert list(bench.store.failures.all().values()) == [event.error]
    assert os._exit is own


def test_a_crash_is_told_by_the_next_try_which_does_nothing(tmp_path):
    script = "import ctypes\nfrom ctp.machine.contained import contained\n"
    script += f"with contained({str(tmp_path)!r}, 'k'):\n    {{}}\n"
    for fatal, what in (("ctypes.string_at(0)", "Segmentation fault"), ("__import__('os').abort()", "Aborted")):
        assert subprocess.run([sys.executable, "-c", script.format(fatal)], check=False, stderr=-3).returncode < 0
        with pytest.raises(MethodEnded, match=f"^{what} in .*line"), contained(str(tmp_path), "k"):
            raise AssertionError
        with contained(str(tmp_path), "k"):  # a later run tries it
            pass
    killed = "__import__('os').kill(__import__('os').getpid(), 9)"  # as for memory: nobody knows, and it is tried again
    assert subprocess.run([sys.executable, "-c", script.format(killed)], check=False).returncode == -9
    with contained(str(tmp_path), "k"):
        assert ctypes.sizeof(ctypes.c_int)
    assert crash("?") == "a fatal signal"


def test_a_fork_may_exit_as_it_likes():
    with contained():
        if (pid := os.fork()) == 0:
            os._exit(5)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 5


def test_a_plugin_that_exits_when_it_is_read_is_a_mistake_of_the_grid(tmp_path):
    for i, text in enumerate(("import os\nos._exit(4)", "raise SystemExit(4)")):
        (tmp_path / f"p{i}.py").write_text(text)
        problems = []
        plugins.read(f"p{i}.py", [tmp_path], problems)
        [line] = problems
        assert re.search("4", line)


# ------------------------------------------------------------------ what a method writes


def test_a_method_that_writes_nothing_is_not_stored(tmp_path, llama_folder):
    class Idle(Recovery):
        learned: ClassVar[bool] = False
        method: Literal["idle"] = "idle"
        half: bool = False

        def recover(self, job):
            if self.half:
                (job.folder / "adapter_config.json").write_text("{}")
                (job.folder / "adapter_model.safetensors").write_bytes(b"")
            return {}

    class Lazy(Compression):
        method: Literal["lazy"] = "lazy"

        def compress(self, job):
            return {}

    recovery = [{"method": "idle"}, {"method": "idle", "half": True}]
    bench = Bench(tmp_path, llama_folder, compression=["dense", "lazy"], sources=[], recovery=recovery)
    dense, lazy = bench.all(Compress)
    bench.execute(dense)
    idle, half = bench.all(Learn)[:2]
    for cell, line in (
        (lazy, "the compression 'lazy' wrote no model: .*config.json missing"),
        (idle, "the recovery 'idle' wrote no adapter: adapter_config.json and adapter_model.safetensors missing"),
        (half, "the recovery 'idle' wrote an adapter that cannot be used: "),
    ):
        event = told(bench, cell)
        assert re.search(line, event.error), event
        assert not bench.store.has(ref(cell))


def test_an_adapter_that_no_cell_could_use_is_not_stored(tmp_path, llama_folder):
    class Odd(Recovery):
        learned: ClassVar[bool] = False
        method: Literal["odd"] = "odd"
        width: int = 0  # of its rows, of a model that stays unread; 0 for LoRA of numbers that are none

        def recover(self, job):
            if self.width:
                save_prompt(job.folder, torch.zeros(2, self.width), job.model_name)
                return {}
            lora = get_peft_model(job.model, LoraConfig(task_type="CAUSAL_LM", r=1, target_modules=["q_proj"]))
            torch.nn.init.constant_(next(p for n, p in lora.named_parameters() if "lora_B" in n), float("nan"))
            lora.save_pretrained(job.folder)
            lora.unload()
            return {}

    recovery = [{"method": "odd"}, {"method": "odd", "width": 24}]
    bench = Bench(tmp_path, llama_folder, compression=["dense"], sources=[], recovery=recovery)
    bench.execute(bench.all(Compress)[0])
    lora, prompt = bench.all(Learn)
    for cell, line in (
        (lora, "wrote an adapter that cannot be used: .*lora_B.* holds numbers that are not finite"),
        (prompt, r"wrote an adapter that cannot be used: its rows have 24 numbers, but the model's embedding has \d+"),
    ):
        event = told(bench, cell)
        assert re.search(line, event.error), event
        assert not bench.store.has(ref(cell))


# ------------------------------------------------------------------------ Ray's processes


@pytest.mark.parametrize("name", ["raylet", "gcs_server"])
def test_ray_processes_that_die_end_the_run_with_a_line(monkeypatch, name):
    process = subprocess.Popen(["sleep", "60"])
    processes = {name: [SimpleNamespace(process=process)]}
    monkeypatch.setattr(cluster.worker, "_global_node", SimpleNamespace(all_processes=processes))
    before = signal.getsignal(signal.SIGUSR2)
    with cluster.watched(0.02):
        time.sleep(0.1)  # while it lives nothing happens
    begun = time.monotonic()
    with pytest.raises(signals.RayLost, match=f"its {cluster.NEEDED[name]} on this machine died .killed by SIGKILL"):
        _outlive(process)
    assert time.monotonic() - begun < 10
    assert signal.getsignal(signal.SIGUSR2) is before


def test_whatever_is_raised_then_is_raylost(monkeypatch):
    """Compiled code turns what a signal's handler raises into a SystemError."""
    monkeypatch.setattr(cluster, "_dead", lambda: "Ray ended")
    with pytest.raises(signals.RayLost, match="Ray ended"):
        _wrapped()


def test_a_death_is_heard_while_the_watch_begins(monkeypatch):
    """Nothing is left behind that would signal again, and end the process."""
    start = threading.Thread.start

    def slowly(thread):
        start(thread)
        time.sleep(1)

    monkeypatch.setattr(cluster, "_dead", lambda: "Ray ended")
    monkeypatch.setattr(threading.Thread, "start", slowly)
    before = signal.getsignal(signal.SIGUSR2)
    with pytest.raises(signals.RayLost, match="Ray ended"), cluster.watched(0.02):
        raise AssertionError
    assert signal.getsignal(signal.SIGUSR2) is before
    assert not any(thread.name == "ray-watch" for thread in threading.enumerate())


def _wrapped():
    with cluster.watched(0.02):
        try:
            time.sleep(30)
        except signals.RayLost as e:
            raise SystemError("returned a result with an exception set") from e


def _outlive(process):
    with cluster.watched(0.02):
        process.kill()
        time.sleep(30)
