"""The store: done means whole, nothing is overwritten, nothing wrong is read."""

import json
import uuid

import pytest
from test_spec import CALIBRATION, MODEL, compress, evaluate, learn

from ctp.artifacts import entries, find
from ctp.methods import GPTQ
from ctp.spec import KINDS, Compress, key
from ctp.store import Store, StoreError


@pytest.fixture(params=["local", "remote"])
def store(request, tmp_path, monkeypatch):
    """A folder, and an object store: fsspec's in-memory file system has no rename and no directories either."""
    monkeypatch.setenv("CTP_CACHE", str(tmp_path / "cache"))
    return Store(str(tmp_path / "store") if request.param == "local" else f"memory://{uuid.uuid4().hex}")


def publish(store, cell, text="payload"):
    with store.publish(cell) as draft:
        (draft.path / "sub").mkdir()
        (draft.path / "sub" / "a.txt").write_text(text)
        draft.record["metrics"] = {"x": 1.5}


def test_what_is_published_is_done_and_fetched(store):
    cell = compress()
    assert not store.has(cell)
    assert store.done([cell]) == set()
    publish(store, cell)
    assert store.has(cell)
    assert store.done([cell, learn()]) == {key(cell)}
    assert (store.fetch(cell) / "sub" / "a.txt").read_text() == "payload"
    manifest = store.manifest(cell)
    assert manifest["key"] == key(cell)
    assert manifest["metrics"] == {"x": 1.5}
    assert manifest["files"]["sub/a.txt"]["size"] == 7
    assert store.fs.ls(store.folder(cell), detail=False)


def test_inputs_are_named_by_key(store):
    publish(store, learn())
    assert store.manifest(learn())["inputs"] == [key(compress())]


def test_an_error_leaves_nothing_behind(store):
    def broken():
        with store.publish(compress()) as draft:
            (draft.path / "a.txt").write_text("half")
            raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match="out of luck"):
        broken()
    assert not store.has(compress())
    assert not store.fs.glob(f"{store.root}/**/a.txt")


def test_the_first_to_publish_wins(store):
    publish(store, compress(), "first")
    publish(store, compress(), "second")
    assert (store.fetch(compress()) / "sub" / "a.txt").read_text() == "first"


@pytest.mark.parametrize("damage", [b"Payload", b"payloa", None])
def test_changed_or_missing_bytes_are_never_read(store, damage):
    publish(store, compress())
    [path] = store.fs.glob(f"{store.folder(compress())}/**/a.txt")
    if damage is None:
        store.fs.rm_file(path)
    else:
        store.fs.pipe_file(path, damage)
    with pytest.raises(StoreError, match=r"a\.txt"):
        Store(store.uri).fetch(compress())


def test_a_damaged_cached_copy_is_fetched_again(store):
    publish(store, compress())
    copy = store.fetch(compress()) / "sub" / "a.txt"
    if not store.local:
        copy.write_text("Payload")
    assert (Store(store.uri).fetch(compress()) / "sub" / "a.txt").read_text() == "payload"


def test_a_torn_manifest_is_said(store):
    publish(store, compress())
    store.fs.pipe_file(f"{store.folder(compress())}/manifest.json", b'{"key": ')
    with pytest.raises(StoreError, match="is not JSON"):
        store.manifest(compress())


def test_another_cells_manifest_is_refused(store):
    publish(store, compress())
    path = f"{store.folder(compress())}/manifest.json"
    store.fs.pipe_file(path, json.dumps({**store.manifest(compress()), "key": "0" * 64}).encode())
    with pytest.raises(StoreError, match="of key 0000"):
        store.manifest(compress())


def test_two_racers_never_mix_their_files(store):
    """The slower one finds the other's manifest when its own files are already there: they go, the first one stands."""
    with store.publish(compress()) as slow:
        (slow.path / "a.txt").write_text("slow")
        with Store(store.uri).publish(compress()) as fast:
            (fast.path / "a.txt").write_text("fast")
    assert (store.fetch(compress()) / "a.txt").read_text() == "fast"
    assert len(store.fs.glob(f"{store.folder(compress())}/**/a.txt")) == 1


def test_what_lost_its_manifest_is_computed_again(store):
    publish(store, compress(), "old")
    store.fs.rm_file(f"{store.folder(compress())}/manifest.json")
    publish(store, compress(), "new")
    assert (store.fetch(compress()) / "sub" / "a.txt").read_text() == "new"


def test_a_failure_record_cut_off_by_a_crash_is_passed_over(store):
    store.record_failure(compress(), "ValueError: boom", "trace")
    [path] = store.fs.glob(f"{store.root}/failed/*.json")
    store.fs.pipe_file(path, b"")
    assert store.failures() == {}


def test_files_without_manifest_are_not_done(store):
    store.fs.makedirs(store.folder(compress()), exist_ok=True)
    store.fs.pipe_file(f"{store.folder(compress())}/a.txt", b"x")
    assert not store.has(compress())
    assert store.done([compress()]) == set()


def test_failures_are_kept_until_the_cell_is_done(store):
    store.record_failure(compress(), "ValueError: boom", "trace")
    assert store.failures() == {key(compress()): "ValueError: boom"}
    publish(store, compress())
    assert store.failures() == {}


def test_partial_state_is_the_newest_whole_one(store):
    cell = learn()
    with store.partial(cell) as found:
        assert found is None
    for step in (5, 10):
        store.save_partial(cell, step, lambda folder, step=step: (folder / "s.txt").write_text(f"at {step}"))
    assert list(store.started().values()) == [10]
    with store.partial(cell) as found:
        assert (found / "s.txt").read_text() == "at 10"
    publish(store, cell)
    assert store.started() == {}


def test_a_torn_partial_state_is_passed_over(store):
    cell = learn()
    store.save_partial(cell, 5, lambda folder: (folder / "s.txt").write_text("whole"))
    [whole] = store._partial_steps(cell)
    torn = whole.replace("000000005", "000000009")
    store.fs.makedirs(torn, exist_ok=True)
    store.fs.pipe_file(f"{torn}/manifest.json", store.fs.cat_file(f"{whole}/manifest.json"))
    with store.partial(cell) as found:
        assert (found / "s.txt").read_text() == "whole"


def test_a_store_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreError, match="cannot be written"):
        Store(str(tmp_path / "file" / "store")).check_writable()
    with pytest.raises(StoreError, match="nonsense"):
        Store("nonsense://bucket")


def test_long_names_still_fit_a_file_system(store):
    cell = evaluate(recovery=learn(compress(damping=0.0123, act_order=True, group_size=128, scale="mse")))
    publish(store, cell)
    assert len(store.folder(cell).rsplit("/", 1)[-1]) < 200


@pytest.mark.parametrize("name", ["llama [v2]", "l*a?", "[[]"])
def test_names_with_glob_characters_are_names(store, name):
    store = Store(store.uri + " st[1]*")
    model = MODEL.model_copy(update={"name": name})
    cell = learn(Compress(model=model, compression=GPTQ(bits=3), calibration=CALIBRATION))
    for step in (5, 10):
        store.save_partial(cell, step, lambda folder, step=step: (folder / "s.txt").write_text(f"at {step}"))
    assert [p.rsplit("/", 1)[-1] for p in store._partial_steps(cell)] == ["step-000000010"]
    assert list(store.started().values()) == [10]
    with store.partial(cell) as found:
        assert (found / "s.txt").read_text() == "at 10"
    store.record_failure(cell, "ValueError: boom", "trace")
    assert store.failures() == {key(cell): "ValueError: boom"}
    publish(store, cell)
    assert (store.failures(), store.started()) == ({}, {})
    assert store.done([cell, compress()]) == {key(cell)}
    assert store.manifest(cell)["key"] == key(cell)
    assert (store.fetch(cell) / "sub" / "a.txt").read_text() == "payload"
    assert [e.key for e in entries(store)] == [key(cell)]
    assert find(store, key(cell)[:8])[0] == cell


def test_racers_in_a_root_with_brackets_leave_one_artifact(store):
    store = Store(store.uri + "[1]")
    with store.publish(compress()) as slow:
        (slow.path / "a.txt").write_text("slow")
        publish(store, compress(), "fast")
    assert (store.fetch(compress()) / "sub" / "a.txt").read_text() == "fast"
    assert len([p for p in store.fs.find(store.folder(compress())) if p.endswith("a.txt")]) == 1


def test_what_is_done_takes_one_listing_a_kind(store, monkeypatch):
    for bits in (2, 3, 4):
        publish(store, compress(bits=bits))
    calls, find = [], store.fs.find
    monkeypatch.setattr(store.fs, "find", lambda path, **how: calls.append((path, how)) or find(path, **how))
    assert len(store.done([compress(bits=2), compress(bits=4)])) == 2
    # Without a depth: with one, object stores are asked folder by folder. A local folder is asked without fsspec.
    assert calls == ([] if store.local else [(f"{store.root}/{kind}", {"detail": True}) for kind in KINDS])
