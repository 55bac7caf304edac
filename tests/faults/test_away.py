"""A real MLflow server that is killed while a grid runs: nothing is lost, whether it comes back in time or not."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import mlflow
import pytest
from harness import Place, check_equal, kill

from analysis import transfer_matrix
from analysis.runs import evaluations

pytestmark = pytest.mark.faults


class Server:
    """`mlflow server` on a port of its own."""

    def __init__(self, folder):
        self.folder, self.database, self.process = folder, "server.db", None
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"

    def start(self, seconds=120):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", "--port", str(self.port), "--workers", "1",
             "--backend-store-uri", f"sqlite:///{self.folder / self.database}",
             "--artifacts-destination", str(self.folder / "files")],
            env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}, start_new_session=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                if urllib.request.urlopen(f"{self.uri}/health", timeout=5).status == 200:
                    return
            except OSError:
                time.sleep(0.1)
        raise AssertionError("mlflow server does not answer")

    def kill(self):
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def server(tmp_path):
    made = Server(tmp_path)
    made.start()
    yield made
    made.kill()


@pytest.fixture
def place(tmp_path, llama_folder, server):
    made = Place(tmp_path / "place", llama_folder, server.uri)
    yield made
    made.end()


def matrix(uri):
    """The perplexities of MLflow at `uri`, by who learned and who was asked."""
    mlflow.set_tracking_uri(uri)
    return transfer_matrix.matrix(evaluations("small"), "ppl")


def test_a_server_that_comes_back_during_the_run(place, server, undisturbed):
    driver = place.start()
    place.wait_for("worker", "learn 5")
    server.kill()
    place.wait_for("worker", "learn 25")  # the losses at 10 and 20 were told meanwhile
    for pid in place.workers:  # they wait until the server has started
        kill(pid, signal.SIGSTOP)
    time.sleep(5)
    server.start()
    for pid in place.workers:
        kill(pid, signal.SIGCONT)
    assert driver.wait(timeout=600) == 0, place.said()
    assert "MLflow was away for a while" in place.said()
    check_equal(place, undisturbed)
    client = mlflow.MlflowClient(server.uri)
    experiment = client.get_experiment_by_name("small").experiment_id
    for run in client.search_runs([experiment], "tags.`ctp.kind` = 'learn'"):
        told = {m.step for m in client.get_metric_history(run.info.run_id, "train/tokens_per_s")}
        assert {10, 20, 30, 40} <= told
    assert matrix(server.uri).equals(matrix(f"sqlite:///{undisturbed.folder}/results/mlflow.db"))


def test_a_server_that_comes_back_too_late(place, server, undisturbed):
    driver = place.start()
    place.wait_for("worker", "learn 5")
    server.kill()
    assert driver.wait(timeout=600) == 3, place.said()
    assert "Nothing is lost" in place.said()
    assert place.artifacts() == undisturbed.artifacts()
    server.start()
    for database in ("server.db", "emptied.db"):
        first = place.sync()
        assert first.returncode == 0, first.stderr
        check_equal(place, undisturbed)
        before = place.everything()
        again = place.sync()
        assert "0 runs written, 14 there" in again.stdout
        assert place.everything() == before
        assert matrix(server.uri).equals(matrix(f"sqlite:///{undisturbed.folder}/results/mlflow.db"))
        if database == "server.db":
            server.kill()
            server.database = "emptied.db"
            server.start()
