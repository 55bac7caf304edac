"""What tests share: see the names."""

import uuid

import pytest

from ctp.storage.ref import identity, ref
from ctp.storage.store import Store


@pytest.fixture(params=["local", "remote"])
def store(request, tmp_path, monkeypatch):
    """A folder, and an object store: fsspec's in-memory file system has no rename and no directories either."""
    monkeypatch.setenv("CTP_CACHE", str(tmp_path / "cache"))
    return Store(str(tmp_path / "store") if request.param == "local" else f"memory://{uuid.uuid4().hex}")


def publish(store, cell, text="payload"):
    with store.publish(ref(cell), identity(cell)) as draft:
        (draft.path / "sub").mkdir()
        (draft.path / "sub" / "a.txt").write_text(text)
        draft.record["metrics"] = {"x": 1.5}
