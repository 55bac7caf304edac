"""What tests share: see the names."""

import huggingface_hub
import pytest
from huggingface_hub import constants
from support.fakehub import serving


@pytest.fixture
def remote(tmp_path, monkeypatch):
    """The hub, on this machine, and an empty cache for what comes from it."""
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
