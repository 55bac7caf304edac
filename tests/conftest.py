import gc
import os
import shutil
import time
from pathlib import Path

import pytest
import yaml
from support.longest import LONG

os.environ["HF_HUB_OFFLINE"] = "1"  # no test asks the network


def pytest_collection_modifyitems(items):
    place = {str(Path(__file__).parent / name): i for i, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(str(item.path), len(LONG)))


@pytest.fixture(scope="module", autouse=True)
def nothing_old_is_garbage():
    """Latency collects garbage before every round: half a second, if all that earlier files left is looked through."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def own_places(tmp_path_factory, monkeypatch):
    """Caches and results of the tests are their own; settings of the person who runs them do not reach in."""
    monkeypatch.setenv("CTP_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.setattr("ctp.common.hub._silent_until", 0.0)  # one test's dead network is not the next one's
    for name in ("CTP_STORE", "CTP_DATA_DIR", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory):
    from support.tinygrid import model_folder

    return model_folder(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A folder with a small model that has learned its text: see support.trained."""
    from support.trained import train

    return train(tmp_path_factory.mktemp("trained") / "bytes")


@pytest.fixture(scope="session")
def finished(tmp_path_factory, llama_folder):
    """A grid whose cells are all done, that MLflow has not heard of."""
    from support.bench import Bench

    bench = Bench(tmp_path_factory.mktemp("finished"), llama_folder)
    for cell in bench.cells:
        bench.execute(cell)
    return bench


@pytest.fixture
def copied(finished, tmp_path):
    """The finished grid's plan, with a copy of its store."""
    from support.bench import Bench

    from ctp.storage.store import Store

    shutil.copytree(finished.store.folders.root, tmp_path / "store")
    bench = Bench.__new__(Bench)
    bench.__dict__.update({**finished.__dict__, "store": Store(str(tmp_path / "store"))})
    return bench


@pytest.fixture(scope="session")
def new_database(tmp_path_factory):
    """folder -> the URI of an MLflow database without a run in it. A copy: making the tables takes a second or two."""
    from ctp.tracking.database import make

    empty = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    make(empty)
    return lambda folder: f"sqlite:///{shutil.copy(empty, folder / 'mlflow.db')}"


@pytest.fixture
def uri(tmp_path, monkeypatch, new_database):
    import mlflow

    uri = new_database(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    mlflow.set_tracking_uri(uri)
    return uri


@pytest.fixture
def remote(tmp_path, monkeypatch):
    """The hub, on this machine, and an empty cache for what comes from it."""
    import huggingface_hub
    from huggingface_hub import constants
    from support.fakehub import serving

    with serving() as served:
        monkeypatch.setattr(constants, "ENDPOINT", served.url)
        template = served.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
        monkeypatch.setenv("CTP_CACHE", str(tmp_path / "ctp-cache"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        huggingface_hub.close_session()
        yield served
    huggingface_hub.close_session()


@pytest.fixture
def refused(tmp_path, capsys):
    """Plan a grid that is wrong; gives the one line that tells it, without the file's name."""

    from support.badgrids import SECONDS

    from ctp import grid

    def plan(content, *args) -> str:
        file = tmp_path / "grid.yaml"
        if isinstance(content, dict):
            content = yaml.safe_dump(content, sort_keys=False)
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        begun = time.process_time()  # other work on the machine does not count
        code = grid.main([str(file), "--plan", "--store", str(tmp_path / "store"), *args])
        seconds = time.process_time() - begun
        out, err = capsys.readouterr()
        assert (code, out) == (2, "")
        [line] = err.splitlines()
        assert line.startswith("error: ")
        assert line.isprintable()
        assert len(line) < 2000
        assert seconds < SECONDS
        assert not (tmp_path / "store").exists()
        return line.removeprefix(f"error: {file}: ")

    return plan
