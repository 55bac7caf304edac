"""Hashes of files, remembered by what the file system says of them."""

import os
import time

import pytest

from ctp.common import files


@pytest.fixture
def settled(monkeypatch):
    """Files count as settled the moment they are written, and nothing is remembered of other tests."""
    monkeypatch.setattr(files, "SETTLED", 0)
    monkeypatch.setattr(files, "_digests", {})


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"a" * 100)
    time.sleep(0.01)
    return path


def rewritten(path, data, keep_inode):
    """Other bytes of the same length under the same name and times, as two archives unpacked over each other."""
    before = path.stat()
    if not keep_inode:
        path.unlink()
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    time.sleep(0.01)


@pytest.mark.parametrize("keep_inode", [True, False])
def test_equal_size_and_time_of_writing_are_not_equal_bytes(file, settled, keep_inode):
    first = files.digest([file])
    assert files.digest([file]) == first
    rewritten(file, b"b" * 100, keep_inode)
    assert files.digest([file]) != first
    rewritten(file, b"a" * 100, keep_inode)
    assert files.digest([file]) == first


def test_a_file_written_just_now_is_hashed_at_every_call(file, monkeypatch):
    monkeypatch.setattr(files, "_digests", {})
    files.digest([file])
    assert not files._digests
    assert not (files.cache_dir() / "digests").exists() or not any(
        "model.safetensors" in m.read_text() for m in (files.cache_dir() / "digests").iterdir()
    )


def test_a_worker_believes_its_own_hashes_only(file, settled, monkeypatch, tmp_path):
    monkeypatch.setenv("CTP_CACHE", str(tmp_path / "cache"))  # what is remembered of other tests' files stays right
    first = files.digest([file])
    for memo in (files.cache_dir() / "digests").glob("*.json"):
        memo.write_text('{"sha256": "0"}')
    monkeypatch.setattr(files, "_digests", {})
    assert files.digest([file]) == "0"
    assert files.digest([file], anew=True) == first


def test_a_file_that_changes_while_it_is_hashed_is_refused(file, monkeypatch):
    def slow(path):
        path.write_bytes(b"c" * 100)
        return "x"

    monkeypatch.setattr(files, "sha256_file", slow)
    with pytest.raises(ValueError, match="changes while it is read"):
        files.digest([file])
