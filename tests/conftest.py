import gc
import os
import shutil

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # no test asks the network


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
def database(tmp_path_factory):
    """A database without a run: making its tables takes a second or two."""
    from ctp.tracking.database import make

    file = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    make(file)
    return file


@pytest.fixture
def uri(tmp_path, monkeypatch, database):
    import mlflow

    shutil.copy(database, tmp_path / "mlflow.db")
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    mlflow.set_tracking_uri(uri)
    return uri
