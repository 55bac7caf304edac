"""The store: done means whole, nothing is overwritten, nothing wrong is read."""

import json
import os
import re
import resource
import subprocess
import sys
import threading
import time
import uuid

import pytest
from support.cells import CALIBRATION, MODEL, compress, evaluate, learn
from support.stores import (
    publish,
    store,  # noqa: F401 (fixtures)
)

from ctp.cells import GPTQ
from ctp.cells.cell import KINDS, Compress, key, to_json
from ctp.storage import folders
from ctp.storage.catalog import entries, find
from ctp.storage.manifest import Damaged
from ctp.storage.ref import identity, ref
from ctp.storage.remote import StoreError
from ctp.storage.store import Store


def test_what_is_published_is_done_and_fetched(store):
    cell = compress()
    assert not store.has(ref(cell))
    assert store.done(map(ref, [cell])) == set()
    publish(store, cell)
    assert store.has(ref(cell))
    assert store.done(map(ref, [cell, learn()])) == {key(cell)}
    assert (store.fetch(ref(cell)) / "sub" / "a.txt").read_text() == "payload"
    manifest = store.manifest(ref(cell))
    assert manifest["key"] == key(cell)
    assert manifest["metrics"] == {"x": 1.5}
    assert manifest["files"]["sub/a.txt"]["size"] == 7
    assert store.folders.fs.ls(store.folder(ref(cell)), detail=False)


def test_inputs_are_named_by_key(store):
    publish(store, learn())
    assert store.manifest(ref(learn()))["inputs"] == [key(compress())]


def test_an_error_leaves_nothing_behind(store):
    def broken():
        with store.publish(ref(compress()), identity(compress())) as draft:
            (draft.path / "a.txt").write_text("half")
            raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match="out of luck"):
        broken()
    assert not store.has(ref(compress()))
    assert not store.folders.fs.glob(f"{store.folders.root}/**/a.txt")


def test_the_first_to_publish_wins(store):
    publish(store, compress(), "first")
    publish(store, compress(), "second")
    assert (store.fetch(ref(compress())) / "sub" / "a.txt").read_text() == "first"


@pytest.mark.parametrize("damage", [b"Payload", b"payloa", None])
def test_changed_or_missing_bytes_are_never_read(store, damage):
    publish(store, compress())
    [path] = store.folders.fs.glob(f"{store.folder(ref(compress()))}/**/a.txt")
    if damage is None:
        store.folders.fs.rm_file(path)
    else:
        store.folders.fs.pipe_file(path, damage)
    with pytest.raises(Damaged, match=r"a\.txt.*moved to .*damaged/compress/.*computes it again"):
        Store(store.uri).fetch(ref(compress()))
    assert not store.has(ref(compress()))
    [kept] = [p for p in store.folders.fs.find(f"{store.folders.root}/damaged") if p.endswith("damaged.json")]
    assert "a.txt" in json.loads(store.folders.read(kept))["why"]
    with pytest.raises(StoreError, match="is not done"):
        store.fetch(ref(compress()))
    publish(store, compress(), "new")
    assert (store.fetch(ref(compress())) / "sub" / "a.txt").read_text() == "new"


def test_a_damaged_cached_copy_is_fetched_again(store):
    publish(store, compress())
    copy = store.fetch(ref(compress())) / "sub" / "a.txt"
    if not store.folders.local:
        copy.write_text("Payload")
    assert (Store(store.uri).fetch(ref(compress())) / "sub" / "a.txt").read_text() == "payload"


def test_a_torn_manifest_is_said(store):
    publish(store, compress())
    store.folders.fs.pipe_file(f"{store.folder(ref(compress()))}/manifest.json", b'{"key": ')
    with pytest.raises(StoreError, match="is not JSON"):
        store.manifest(ref(compress()))


def test_another_cells_manifest_is_refused(store):
    publish(store, compress())
    path = f"{store.folder(ref(compress()))}/manifest.json"
    store.folders.fs.pipe_file(path, json.dumps({**store.manifest(ref(compress())), "key": "0" * 64}).encode())
    with pytest.raises(StoreError, match="of key 0000"):
        store.manifest(ref(compress()))


def test_two_racers_never_mix_their_files(store):
    """The slower one finds the other's manifest when its own files are already there: they go, the first one stands."""
    with store.publish(ref(compress()), identity(compress())) as slow:
        (slow.path / "a.txt").write_text("slow")
        with Store(store.uri).publish(ref(compress()), identity(compress())) as fast:
            (fast.path / "a.txt").write_text("fast")
    assert (store.fetch(ref(compress())) / "a.txt").read_text() == "fast"
    assert len(store.folders.fs.glob(f"{store.folder(ref(compress()))}/**/a.txt")) == 1


def test_what_lost_its_manifest_is_computed_again(store):
    publish(store, compress(), "old")
    store.folders.fs.rm_file(f"{store.folder(ref(compress()))}/manifest.json")
    publish(store, compress(), "new")
    assert (store.fetch(ref(compress())) / "sub" / "a.txt").read_text() == "new"


def test_a_failure_record_cut_off_by_a_crash_is_passed_over(store):
    store.failures.record(ref(compress()), to_json(compress()), "ValueError: boom", "trace")
    [path] = store.folders.fs.glob(f"{store.folders.root}/failed/*.json")
    store.folders.fs.pipe_file(path, b"")
    assert store.failures.all() == {}


def test_files_without_manifest_are_not_done(store):
    store.folders.fs.makedirs(store.folder(ref(compress())), exist_ok=True)
    store.folders.fs.pipe_file(f"{store.folder(ref(compress()))}/a.txt", b"x")
    assert not store.has(ref(compress()))
    assert store.done(map(ref, [compress()])) == set()


def test_failures_are_kept_until_the_cell_is_done(store):
    store.failures.record(ref(compress()), to_json(compress()), "ValueError: boom", "trace")
    assert store.failures.all() == {key(compress()): "ValueError: boom"}
    publish(store, compress())
    assert store.failures.all() == {}


def test_partial_state_is_the_newest_whole_one(store):
    cell = learn()
    with store.states.newest(ref(cell)) as found:
        assert found is None
    for step in (5, 10):
        store.states.save(
            ref(cell), identity(cell), step, lambda folder, step=step: (folder / "s.txt").write_text(f"at {step}")
        )
    assert list(store.states.started().values()) == [10]
    with store.states.newest(ref(cell)) as found:
        assert (found / "s.txt").read_text() == "at 10"
    publish(store, cell)
    assert store.states.started() == {}


def test_a_torn_partial_state_is_passed_over(store):
    cell = learn()
    store.states.save(ref(cell), identity(cell), 5, lambda folder: (folder / "s.txt").write_text("whole"))
    [whole] = store.states.steps(ref(cell))
    torn = whole.replace("000000005", "000000009")
    store.folders.fs.makedirs(torn, exist_ok=True)
    store.folders.fs.pipe_file(f"{torn}/manifest.json", store.folders.fs.cat_file(f"{whole}/manifest.json"))
    with store.states.newest(ref(cell)) as found:
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
    assert len(store.folder(ref(cell)).rsplit("/", 1)[-1]) < 200


@pytest.mark.parametrize("name", ["llama [v2]", "l*a?", "[[]"])
def test_names_with_glob_characters_are_names(store, name):
    store = Store(store.uri + " st[1]*")
    model = MODEL.model_copy(update={"name": name})
    cell = learn(Compress(model=model, compression=GPTQ(bits=3), calibration=CALIBRATION))
    for step in (5, 10):
        store.states.save(
            ref(cell), identity(cell), step, lambda folder, step=step: (folder / "s.txt").write_text(f"at {step}")
        )
    assert [p.rsplit("/", 1)[-1] for p in store.states.steps(ref(cell))] == ["step-000000010"]
    assert list(store.states.started().values()) == [10]
    with store.states.newest(ref(cell)) as found:
        assert (found / "s.txt").read_text() == "at 10"
    store.failures.record(ref(cell), to_json(cell), "ValueError: boom", "trace")
    assert store.failures.all() == {key(cell): "ValueError: boom"}
    publish(store, cell)
    assert (store.failures.all(), store.states.started()) == ({}, {})
    assert store.done(map(ref, [cell, compress()])) == {key(cell)}
    assert store.manifest(ref(cell))["key"] == key(cell)
    assert (store.fetch(ref(cell)) / "sub" / "a.txt").read_text() == "payload"
    assert [e.key for e in entries(store)] == [key(cell)]
    assert find(store, key(cell)[:8])[0] == cell


def test_racers_in_a_root_with_brackets_leave_one_artifact(store):
    store = Store(store.uri + "[1]")
    with store.publish(ref(compress()), identity(compress())) as slow:
        (slow.path / "a.txt").write_text("slow")
        publish(store, compress(), "fast")
    assert (store.fetch(ref(compress())) / "sub" / "a.txt").read_text() == "fast"
    assert len([p for p in store.folders.fs.find(store.folder(ref(compress()))) if p.endswith("a.txt")]) == 1


def test_what_is_done_takes_one_listing_a_kind(store, monkeypatch):
    for bits in (2, 3, 4):
        publish(store, compress(bits=bits))
    calls, find = [], store.folders.fs.find
    monkeypatch.setattr(store.folders.fs, "find", lambda path, **how: calls.append((path, how)) or find(path, **how))
    assert len(store.done(map(ref, [compress(bits=2), compress(bits=4)]))) == 2
    # Without a depth: with one, object stores are asked folder by folder. A local folder is asked without fsspec.
    assert calls == (
        [] if store.folders.local else [(f"{store.folders.root}/{kind}", {"detail": True}) for kind in KINDS]
    )


# ---------------------------------------------------------------- nobody leaves the folder


@pytest.mark.parametrize("name", ["../../x", "/etc/passwd", "sub/../../x", "", ".", "a//b", "manifest.json", "a\0b"])
def test_a_manifest_that_names_files_elsewhere_is_refused(store, name, tmp_path):
    publish(store, compress())
    path = f"{store.folder(ref(compress()))}/manifest.json"
    manifest = store.manifest(ref(compress()))
    files = {name: {"sha256": "0" * 64, "size": 0}, **manifest["files"]}
    store.folders.fs.pipe_file(path, json.dumps({**manifest, "files": files}).encode())
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(Damaged, match="is not the name of a file in its folder"):
        Store(store.uri).fetch(ref(compress()))
    assert [p for p in tmp_path.rglob("*") if p not in before and "store" not in p.parts] == []


@pytest.mark.parametrize("payload", ["../", "/etc/", "payload-0123456789ab/../../", "elsewhere/", 3])
def test_a_manifest_whose_payload_lies_elsewhere_is_refused(store, payload):
    publish(store, compress())
    path = f"{store.folder(ref(compress()))}/manifest.json"
    store.folders.fs.pipe_file(path, json.dumps({**store.manifest(ref(compress())), "payload": payload}).encode())
    with pytest.raises(Damaged, match="not a folder that ctp makes"):
        Store(store.uri).fetch(ref(compress()))


def test_a_link_out_of_the_folder_is_refused(tmp_path):
    store = Store(str(tmp_path / "store"))
    publish(store, compress())
    path = tmp_path / "store" / "compress"
    [file] = path.rglob("a.txt")
    (tmp_path / "secret").write_text("payload")  # the right bytes in the wrong place
    file.unlink()
    file.symlink_to(tmp_path / "secret")
    with pytest.raises(Damaged, match="a link that leaves its folder"):
        store.fetch(ref(compress()))
    assert (tmp_path / "secret").read_text() == "payload"


def test_a_method_cannot_publish_links(store, tmp_path):
    (tmp_path / "secret").write_text("x")

    def linking():
        with store.publish(ref(compress()), identity(compress())) as draft:
            (draft.path / "a.txt").symlink_to(tmp_path / "secret")

    with pytest.raises(ValueError, match=r"'a\.txt' is a link"):
        linking()
    assert not store.has(ref(compress()))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda folder: os.mkfifo(folder / "pipe"), "'pipe' is neither a file nor a folder"),
        (lambda folder: (folder / "manifest.json").write_text("{}"), "'manifest.json' is the name of ctp's own file"),
        (lambda folder: (folder / "odd\udce4").write_text(""), "is not UTF-8"),
    ],
)
def test_a_method_cannot_publish_what_is_no_file_of_its_own(store, make, said):
    def publishing():
        with store.publish(ref(compress()), identity(compress())) as draft:
            make(draft.path)

    with pytest.raises(ValueError, match=said):
        publishing()
    assert not store.has(ref(compress()))


def test_a_folder_that_lies_on_another_disk_may_be_linked(tmp_path):
    store = Store(str(tmp_path / "store"))
    publish(store, compress())
    folder = tmp_path / "store" / "compress"
    [artifact] = folder.iterdir()
    artifact.rename(tmp_path / "elsewhere")
    artifact.symlink_to(tmp_path / "elsewhere")
    assert (store.fetch(ref(compress())) / "sub" / "a.txt").read_text() == "payload"


@pytest.mark.parametrize("name", ["..", "a/../../b", "\u7f8a\u9a7c" * 60, "-rf", "~"])
def test_models_may_be_called_anything(store, name):
    model = MODEL.model_copy(update={"name": name})
    cell = Compress(model=model, compression=GPTQ(bits=3), calibration=CALIBRATION)
    publish(store, cell)
    assert store.done(map(ref, [cell])) == {key(cell)}
    assert store.folder(ref(cell)).rpartition("/")[0] == f"{store.folders.root}/compress"
    assert (store.fetch(ref(cell)) / "sub" / "a.txt").read_text() == "payload"


# --------------------------------------------------------------------- crashes and races


def test_an_empty_manifest_as_a_power_cut_leaves_it_is_none(store):
    publish(store, compress(), "old")
    store.folders.fs.pipe_file(f"{store.folder(ref(compress()))}/manifest.json", b"")
    assert store.done(map(ref, [compress()])) == set()
    publish(store, compress(), "new")
    assert (store.fetch(ref(compress())) / "sub" / "a.txt").read_text() == "new"
    old = [
        store.folders.read(p)
        for p in store.folders.fs.find(store.folders.root)
        if p.endswith("a.txt") and "new" not in str(store.folders.read(p))
    ]
    assert old == [b"old"]  # nothing computed is thrown away unseen
    assert [p for p in store.folders.fs.find(f"{store.folders.root}/damaged") if p.endswith("manifest.json")]


def test_a_torn_manifest_goes_aside_with_its_own_files_alone(store):
    """Another driver's files may be on their way into the same folder of an object store."""
    publish(store, compress(), "old")
    path = f"{store.folder(ref(compress()))}/manifest.json"
    store.folders.fs.pipe_file(path, store.folders.read(path)[:-20])
    others = f"{store.folder(ref(compress()))}/payload-0123456789ab/a.txt"
    if not store.folders.local:
        store.folders.fs.pipe_file(others, b"coming")
    with pytest.raises(Damaged, match="is not JSON"):
        store.fetch(ref(compress()))
    aside = [
        store.folders.read(p) for p in store.folders.fs.find(f"{store.folders.root}/damaged") if p.endswith("a.txt")
    ]
    assert aside == [b"old"]
    assert store.folders.local or store.folders.read(others) == b"coming"


def test_a_store_may_be_copied_from_an_object_store_to_a_folder_and_back(tmp_path, monkeypatch):
    monkeypatch.setenv("CTP_CACHE", str(tmp_path / "cache"))
    far, near = Store(f"memory://{uuid.uuid4().hex}"), Store(str(tmp_path / "near"))
    again = Store(f"memory://{uuid.uuid4().hex}")
    publish(far, compress())
    publish(near, learn())
    for source, target in ((far.folders, near.folders), (near.folders, again.folders)):
        for path in source.fs.find(source.root):
            to = target.root + path[len(source.root) :]
            target.fs.makedirs(to.rpartition("/")[0], exist_ok=True)
            target.fs.pipe_file(to, source.read(path))
    for cell in (compress(), learn()):
        assert (near.fetch(ref(cell)) / "sub" / "a.txt").read_text() == "payload"
        assert (again.fetch(ref(cell)) / "sub" / "a.txt").read_text() == "payload"


def test_what_came_meanwhile_is_not_moved_aside(store):
    publish(store, compress())
    path = f"{store.folder(ref(compress()))}/manifest.json"
    old = store.folders.read(path)
    store.folders.fs.pipe_file(path, json.dumps({**json.loads(old), "created": 2}).encode())
    assert store.folders.set_aside(store.folder(ref(compress())), old, "seen before") == ""
    assert store.has(ref(compress()))


def together(wait, store, text, raised):
    wait.wait(10)
    try:
        publish(store, compress(), text)
    except Exception as e:
        raised.append(e)


def test_many_who_publish_at_once_over_what_is_half_there_leave_one_whole_artifact(tmp_path):
    """Each finds the unfinished folder in its way and would move it aside, others' finished ones with it."""
    for round_ in range(20):
        uri = str(tmp_path / f"store{round_}")
        half = tmp_path / f"store{round_}" / "compress" / Store(uri).folder(ref(compress())).split("/")[-1]
        half.mkdir(parents=True)
        (half / "a.txt").write_text("half")
        wait, raised = threading.Barrier(4), []
        threads = [threading.Thread(target=together, args=(wait, Store(uri), f"from {i}", raised)) for i in range(4)]
        for t in threads:
            t.start()
        for t in threads:
            t.join(20)
        assert raised == []
        assert (Store(uri).fetch(ref(compress())) / "sub" / "a.txt").read_text().startswith("from ")


def test_a_state_further_on_is_kept_by_a_driver_that_is_behind(store):
    cell = learn()
    store.states.save(ref(cell), identity(cell), 100, lambda folder: (folder / "s.txt").write_text("at 100"))
    store.states.save(ref(cell), identity(cell), 50, lambda folder: (folder / "s.txt").write_text("at 50"))
    with store.states.newest(ref(cell)) as found:
        assert (found / "s.txt").read_text() == "at 100"


def test_what_is_in_the_making_for_days_is_not_swept_away(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "PULSE", 0.01)
    store = Store(str(tmp_path / "store"))
    with store.publish(ref(compress()), identity(compress())) as draft:
        os.utime(draft.path, (1, 1))  # its files come at the end only
        end = time.monotonic() + 10
        while draft.path.stat().st_mtime < 10 and time.monotonic() < end:
            time.sleep(0.01)
        (dead := tmp_path / "store" / ".tmp" / "ctp-dead").mkdir()
        os.utime(dead, (1, 1))
        Store(store.uri).check_writable()
        assert not dead.exists()
        (draft.path / "a.txt").write_text("late")
    assert (store.fetch(ref(compress())) / "a.txt").read_text() == "late"


# -------------------------------------------------------------------------- full disks


def small_disk(folder, size):
    """A file system of so many bytes; skips where this user may mount none."""
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True,
                          check=False)  # fmt: skip
    if done.returncode:
        pytest.skip("only root mounts a small disk")


@pytest.fixture
def disk(tmp_path):
    folder = tmp_path / "disk"
    small_disk(folder, "4m")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_is_one_clear_line_and_leaves_nothing(disk):
    store = Store(str(disk / "store"))
    publish(store, compress(bits=2))

    def large():
        with store.publish(ref(compress()), identity(compress())) as draft:
            (draft.path / "weights").write_bytes(os.urandom(8 * 2**20))

    with pytest.raises(StoreError, match=r"^no room left for the store .*No space left on device.* goes on from here$"):
        large()
    assert not store.has(ref(compress()))
    assert list((disk / "store" / ".tmp").iterdir()) == []
    assert store.done(map(ref, [compress(bits=2)])) == {key(compress(bits=2))}
    publish(store, compress())  # room was made
    assert store.has(ref(compress()))


def test_a_full_disk_is_told_before_the_work_and_by_a_failure_that_cannot_be_kept(disk):
    store = Store(str(disk / "store"))
    store.check_writable()
    (disk / "other").write_bytes(bytes(4 * 2**20 - 300_000))
    begun = []
    with pytest.raises(StoreError, match="no room left"), store.publish(ref(compress()), identity(compress())):
        begun.append(1)
    assert not begun
    with pytest.raises(StoreError, match="no room left"):
        store.failures.record(ref(compress()), to_json(compress()), "ValueError: boom", "trace")
    with pytest.raises(StoreError, match="no room left"):
        store.states.save(ref(learn()), identity(learn()), 5, lambda folder: None)
    assert [p for p in (disk / "store").rglob("*") if p.is_file()] == []
    (disk / "other").unlink()
    publish(store, compress())
    assert store.has(ref(compress()))


def test_a_file_larger_than_a_limit_allows_is_told(tmp_path):
    """As where no disk can be mounted, and as quotas do it: in another process, whose limit ends with it."""
    code = f"""
import resource, sys
sys.path[:0] = {sys.path!r}
from support.cells import compress
from ctp.storage.ref import identity, ref
from ctp.store import Store, StoreError
store = Store({str(tmp_path / "store")!r})
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    with store.publish(ref(compress()), identity(compress())) as draft:
        (draft.path / "weights").write_bytes(bytes(10**6))
except StoreError as e:
    print(e)
"""
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert re.fullmatch(r"no room left for the store .*File too large.*\n", found.stdout)
    assert Store(str(tmp_path / "store")).done(map(ref, [compress()])) == set()
