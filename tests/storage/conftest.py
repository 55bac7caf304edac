import uuid

import pytest

from ctp.storage.store import Store


@pytest.fixture(params=["local", "remote"])
def store(request, tmp_path, monkeypatch):
    """A folder, and an object store: fsspec's in-memory file system has no rename and no directories either."""
    monkeypatch.setenv("CTP_CACHE", str(tmp_path / "cache"))
    return Store(str(tmp_path / "store") if request.param == "local" else f"memory://{uuid.uuid4().hex}")
