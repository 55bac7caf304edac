"""Two drivers that run one grid on one store at the same time, in processes of their own: one artifact a cell."""

import os
import subprocess
from itertools import count

import pytest
from support.gridruns import command
from support.objectstore import Server
from support.tinygrid import grid, write_grid

from ctp.planning import gridfile
from ctp.planning.pins import Pins
from ctp.planning.plan import make
from ctp.storage import catalog, verify
from ctp.storage.store import Store

pytestmark = pytest.mark.slow


def run_both(tmp_path, file, store, **env):
    """(exit code, output) of both. Each has an MLflow of its own: this is about the store."""
    drivers = []
    for who in ("one", "two"):
        (tmp_path / who).mkdir()
        own = {
            "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/{who}/mlflow.db",
            "CTP_CACHE": str(tmp_path / who / "cache"),
        }
        drivers.append(subprocess.Popen(
            command("ctp.grid", file, "--store", store, "--checkpoint-seconds", "0.1"), cwd=tmp_path / who, text=True,
            env={**os.environ, **own, **env}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        ))  # fmt: skip
    try:
        return [(out, d.returncode) for d in drivers for out in (d.communicate(timeout=800)[0],)]
    finally:
        for d in drivers:
            d.kill()


def check(plan, store, ended):
    for out, code in ended:
        assert code == 0, out
        assert "FAILED" not in out
    assert store.done(plan.refs()) == set(plan.nodes)
    found = catalog.artifacts(store)
    assert sorted(a.digits for a in found) == sorted(k[:12] for k in plan.nodes)
    wrong = list(verify.check(store, found, found))
    assert wrong == []
    for a in found:  # no second payload beside the one that the manifest names
        payloads = {n.split("/")[0] for n in a.files if n.startswith("payload-")}
        assert len(payloads) <= 1
    assert store.failures.all() == {}


@pytest.fixture
def planned(tmp_path, llama_folder):
    file = write_grid(tmp_path / "tiny.yaml", grid(llama_folder))
    pins = Pins()
    return file, make(gridfile.load(str(file), [], pins), pins)


def test_on_a_local_store(tmp_path, planned):
    file, plan = planned
    store = Store(str(tmp_path / "store"))
    check(plan, store, run_both(tmp_path, file, store.uri))
    assert list((tmp_path / "store" / ".tmp").iterdir()) == []


def test_on_an_object_store_that_is_busy_now_and_then(tmp_path, planned, monkeypatch):
    file, plan = planned
    server, asked = Server(), count(1)
    env = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "us-east-1",
           "AWS_ENDPOINT_URL": server.url}  # fmt: skip
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("CTP_CACHE", str(tmp_path / "cache"))
    store = Store("s3://shared/study")
    store.folders.fs.mkdir("shared")
    server.faults.append(lambda method, path: 503 if next(asked) % 10 == 0 else None)
    try:
        ended = run_both(tmp_path, file, store.uri, **env)
        server.faults.clear()
        check(plan, store, ended)
    finally:
        server.stop()
    assert next(asked) > 100
