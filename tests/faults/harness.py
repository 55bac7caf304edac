"""A small real grid, run by real drivers that can be watched and killed, and what it leaves behind."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from mlflow.tracking import MlflowClient
from support.tinygrid import grid, write_grid

from ctp.tracking.entries import every_run

CHANGING = ("seconds", "peak_memory_bytes", "train/tokens_per_s")  # metrics that no two runs have alike
STEPS = 40
ROOT = Path(__file__).parents[2]


def small_grid(model, **changes):
    """3 compressions, 2 prompts, 9 perplexities."""
    whole = grid(model, plugins=str(Path(__file__).with_name("slowmotion.py")))
    whole["recovery"] |= {"k": [2, 4], "steps": STEPS, "validate_every": 10}
    return {**whole, **changes}


@dataclass
class Place:
    """A folder with a grid file, a store and an MLflow of its own, and the drivers that were started there.

    uri: of MLflow, where it is not the SQLite file beside the store.
    """

    folder: Path
    model: Path
    uri: str = ""
    drivers: list[subprocess.Popen] = field(default_factory=list)
    read: int = 0  # bytes of the moments that were looked at
    workers: set[int] = field(default_factory=set)  # that told of a moment

    def __post_init__(self):
        self.folder.mkdir(parents=True, exist_ok=True)
        self.file = write_grid(self.folder / "small.yaml", small_grid(self.model))
        self.moments_file = self.folder / "moments"
        self.moments_file.touch()
        self.log = (self.folder / "log").open("a+")
        self.env = {**os.environ, "PYTHONPATH": str(ROOT), "CTP_FAULTS_FILE": str(self.moments_file)}
        # Ray's workers would give way to all else that runs on the machine.
        self.env |= {"RAY_worker_niceness": "0", "OMP_NUM_THREADS": "1", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}
        self.env |= {"MLFLOW_TRACKING_URI": self.uri} if self.uri else {}

    def start(self, *args):
        """A driver, in the background."""
        command = [sys.executable, "-m", "ctp.grid", str(self.file), "--checkpoint-seconds", "0", *args]
        driver = subprocess.Popen(command, cwd=self.folder, env=self.env, stdout=self.log, stderr=self.log,
                                  start_new_session=True)  # fmt: skip
        self.drivers.append(driver)
        return driver

    def run(self, *args):
        """A driver from its start to its end; returns the exit code."""
        return self.start(*args).wait(timeout=600)

    def sync(self):
        command = [sys.executable, "-m", "ctp.track", "sync", str(self.file)]
        return subprocess.run(command, cwd=self.folder, env=self.env, capture_output=True, text=True, check=False)

    def said(self):
        """All that the drivers printed."""
        return Path(self.log.name).read_text()

    def moments(self):
        """(pid, role, stage) of what was told since the last call."""
        with self.moments_file.open() as file:
            file.seek(self.read)
            lines = file.read()
        whole = lines[: lines.rfind("\n") + 1]
        self.read += len(whole)
        found = [(int(pid), role, stage) for pid, role, stage in (x.split(" ", 2) for x in whole.splitlines())]
        self.workers |= {pid for pid, role, _ in found if role == "worker"}
        return found

    def wait_for(self, role, stage, seconds=400):
        """Wait until a process is at this stage; returns its pid."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for pid, who, what in self.moments():
                if who == role and what.startswith(stage):
                    return pid
            time.sleep(0.002)
        raise AssertionError(f"no {role} was at {stage!r} within {seconds} s:\n{self.said()}")

    def processes(self, name=b""):
        """Living processes that a driver here started, or that those started, with `name` in their command line."""
        mark, found = f"CTP_FAULTS_FILE={self.moments_file}".encode(), []
        for p in Path("/proc").glob("[0-9]*"):
            try:
                if mark in (p / "environ").read_bytes().split(b"\0") and name in (p / "cmdline").read_bytes():
                    found.append(int(p.name))
            except OSError:
                continue
        return found

    def end(self):
        """Nothing that was started here lives on."""
        for pid in self.processes():
            kill(pid)
        for driver in self.drivers:
            driver.wait()

    # ------------------------------------------------------------- what is there

    def artifacts(self):
        """Folder of a finished cell -> file -> hash of its bytes; of a history, all but how long it took."""
        found = {}
        for path in (self.folder / "results" / "store").glob("[!.]*/*/manifest.json"):
            files = json.loads(path.read_text())["files"]
            hashes = {n: f["sha256"] for n, f in files.items() if n != "history.json"}
            if "history.json" in files:
                history = json.loads((path.parent / "history.json").read_text())
                hashes["history"] = {n: v for n, v in history.items() if n != "seconds"}
            found[f"{path.parent.parent.name}/{path.parent.name}"] = hashes
        return found

    def everything(self):
        """All that MLflow says of every run, times included."""
        client = self.client()
        experiment = client.get_experiment_by_name("small")
        runs = every_run(client, experiment.experiment_id, "")
        return experiment.tags, {r.info.run_id: r.to_dictionary() for r in runs}

    def client(self):
        return MlflowClient(self.uri or f"sqlite:///{self.folder}/results/mlflow.db")

    def tracked(self):
        """(key of a cell, what its run says) for every run of a cell, in order; statuses of the invocations."""
        client = self.client()
        experiment = client.get_experiment_by_name("small").experiment_id
        cells, invocations = [], []
        for run in every_run(client, experiment, ""):
            if run.data.tags["ctp.kind"] == "grid":
                invocations.append(run.info.status)
                continue
            metrics = {n: v for n, v in run.data.metrics.items() if not n.startswith(CHANGING)}
            curve = client.get_metric_history(run.info.run_id, "train/val_loss") if "train/val_loss" in metrics else []
            points = sorted((m.step, m.value) for m in curve)
            cells.append((run.data.tags["ctp.key"], run.info.status, run.data.params, metrics, points))
        return sorted(cells, key=lambda c: c[0]), invocations


def kill(pid, number=signal.SIGKILL):
    """Send a signal; False where the process had ended."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def check_equal(place, undisturbed):
    """The same artifacts byte for byte, the same runs, and none is left running."""
    assert place.artifacts() == undisturbed.artifacts()
    cells, invocations = place.tracked()
    assert cells == undisturbed.tracked()[0]
    assert {c[1] for c in cells} == {"FINISHED"}
    assert "RUNNING" not in invocations, place.said()


class Killer:
    """Kills what it is told to, once it is seen at the stage where it is to die, some random milliseconds later.

    targets: (victim, role, stage): driver, worker or raylet, dies when a process of that role is at the stage.
    """

    def __init__(self, targets, seed):
        self.random = random.Random(seed)
        self.targets = list(targets)
        self.random.shuffle(self.targets)
        self.killed = []  # (victim, stage it was seen at)

    def watch(self, place, driver, workers=5):
        """Follow a driver until it ends, or is dead; kill at most so many of its workers."""
        while driver.poll() is None:
            for pid, role, stage in place.moments():
                target = self._target(role, stage.split()[0], workers)
                if target and self.random.random() < 0.5:
                    time.sleep(self.random.uniform(0, 0.05))
                    if self._kill(target, pid, place, driver):
                        workers -= target[0] == "worker"
                        break
            time.sleep(0.002)
        return driver.wait()

    def _target(self, role, stage, workers):
        for target in self.targets:
            if target[1:] == (role, stage) and (workers > 0 or target[0] != "worker"):
                return target
        return None

    def _kill(self, target, pid, place, driver):
        victims = {"driver": [driver.pid], "worker": [pid], "raylet": place.processes(b"raylet/raylet")[-1:]}
        if not all(kill(victim) for victim in victims[target[0]]):
            return False
        if target[0] == "driver":
            driver.wait()
        self.targets.remove(target)
        self.killed.append((target[0], f"{target[1]}: {target[2]}"))
        print(
            f"--- {len(self.killed)}: killed the {target[0]} while {target[1]} {pid} was at {target[2]}",
            file=place.log,
            flush=True,
        )
        return True
