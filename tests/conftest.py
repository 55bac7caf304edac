import os

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # no test asks the network


@pytest.fixture(autouse=True)
def own_places(tmp_path_factory, monkeypatch):
    """Caches and results of the tests are their own; settings of the person who runs them do not reach in."""
    monkeypatch.setenv("CTP_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.setattr("ctp.hub._silent_until", 0.0)  # one test's dead network is not the next one's
    for name in ("CTP_STORE", "CTP_DATA_DIR", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory):
    from tinygrid import model_folder

    return model_folder(tmp_path_factory.mktemp("models") / "tiny-llama")
