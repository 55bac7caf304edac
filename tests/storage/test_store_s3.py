"""The store on an object store that speaks S3's own protocol: what is away comes back, what stays away is told."""

import json
import re
import threading
import time
import uuid

import pytest
from support.cells import compress, evaluate, learn, publish
from support.objectstore import Server

from ctp.cells.cell import key
from ctp.storage import remote
from ctp.storage.manifest import Damaged
from ctp.storage.ref import ref
from ctp.storage.remote import StoreError
from ctp.storage.store import Store


@pytest.fixture(scope="module")
def server():
    server = Server()
    yield server
    server.stop()


@pytest.fixture
def store(server, tmp_path, monkeypatch):
    for name, value in {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "us-east-1",
                        "AWS_ENDPOINT_URL": server.url, "CTP_CACHE": str(tmp_path / "cache")}.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(remote, "PAUSES", (0.01, 0.01, 0.01, 0.01))
    quick = {"mode": "standard", "total_max_attempts": 1}  # botocore's own pauses between tries are seconds
    monkeypatch.setattr(remote, "S3_CONFIG", remote.S3_CONFIG | {"retries": quick})
    bucket = f"b{uuid.uuid4().hex}"
    store = Store(f"s3://{bucket}/study")
    store.folders.fs.mkdir(bucket)
    return store


def objects(store):
    return sorted(store.folders.find(store.folders.root))


def test_what_is_published_is_fetched_and_nothing_else_is_there(store):
    store.check_writable()
    publish(store, compress())
    assert store.done(map(ref, [compress(), learn()])) == {key(compress())}
    assert (store.fetch(ref(compress())) / "sub" / "a.txt").read_text() == "payload"
    assert len(objects(store)) == 2
    assert all(o.startswith(store.folder(ref(compress()))) for o in objects(store))


@pytest.mark.parametrize("status", [500, 502, 503, 429])
def test_a_busy_store_is_asked_again(store, server, status):
    with server.fault(status, times=3):
        publish(store, compress())
    with server.fault(status, times=3):
        assert Store(store.uri).done(map(ref, [compress()])) == {key(compress())}
    with server.fault(status, times=3, method="GET"):
        assert (Store(store.uri).fetch(ref(compress())) / "sub" / "a.txt").read_text() == "payload"


def test_a_store_that_stays_away_is_named_with_its_last_error(store, server):
    publish(store, compress())
    with server.fault(503), pytest.raises(StoreError, match=rf"{re.escape(store.uri)}.*5 tries.*Service Unavailable"):
        store.done(map(ref, [compress()]))
    with server.fault(503), pytest.raises(StoreError, match="5 tries"):
        store.check_writable()
    assert store.done(map(ref, [compress()])) == {key(compress())}


def test_nobody_listening_is_told(store, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    from s3fs import S3FileSystem

    S3FileSystem.clear_instance_cache()
    with pytest.raises(StoreError, match=r"s3://gone/study.*5 tries.*EndpointConnectionError"):
        Store("s3://gone/study").done(map(ref, [compress()]))
    S3FileSystem.clear_instance_cache()


def test_no_permission_and_no_bucket_are_answers(store, server):
    before = len(server.requests)
    with server.fault(403), pytest.raises(StoreError, match="PermissionError"):
        store.done(map(ref, [compress()]))
    assert len(server.requests) - before <= 2
    with pytest.raises(StoreError, match="bucket does not exist"):
        Store("s3://no-such-bucket-here/study").done(map(ref, [compress()]))


def test_a_silent_store_does_not_hold_the_listing_up_for_ever(store, server, monkeypatch):
    monkeypatch.setitem(remote.SECONDS, "find", 0.3)
    monkeypatch.setattr(remote, "PATIENCE", 0.5)
    begun = time.monotonic()
    with server.fault("silence"), pytest.raises(StoreError, match="does not answer"):
        store.done(map(ref, [compress()]))
    assert time.monotonic() - begun < 5


def test_an_upload_cut_off_is_no_artifact_and_is_repeated(store, monkeypatch):
    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(store.folders, "put_new", killed)
        with pytest.raises(KeyboardInterrupt):
            publish(store, compress())
    assert not store.has(ref(compress()))
    assert store.done(map(ref, [compress()])) == set()
    assert objects(store)  # the payload of the try; gc takes it after a day
    publish(store, compress(), "again")
    assert (store.fetch(ref(compress())) / "sub" / "a.txt").read_text() == "again"


def test_what_could_not_be_sent_is_kept_and_sent_by_the_next_try(store, server):
    with server.fault(503, method="PUT"), pytest.raises(StoreError, match=r"is kept in .*unsent"):
        publish(store, compress(), "hours of work")
    assert store.done(map(ref, [compress()])) == set()
    assert not Store(f"{store.uri}/elsewhere").has(ref(compress()))
    assert Store(store.uri).has(ref(compress()))
    assert store.done(map(ref, [compress()])) == {key(compress())}
    assert (store.fetch(ref(compress())) / "sub" / "a.txt").read_text() == "hours of work"
    assert store.manifest(ref(compress()))["metrics"] == {"x": 1.5}
    store.folders.remove(store.folder(ref(compress())))
    assert not store.has(ref(compress()))  # sent once


def test_an_answer_that_was_lost_does_not_make_a_racer_of_oneself(store, server):
    with server.fault("lost", times=1, method="PUT", path="manifest.json"):
        publish(store, compress())
    assert (store.fetch(ref(compress())) / "sub" / "a.txt").read_text() == "payload"
    assert len(objects(store)) == 2


def test_two_who_come_at_once_leave_one_artifact(store):
    """Both have looked and found nothing before either puts its manifest: the store itself lets only one in."""
    both = threading.Barrier(2)
    stores = [Store(store.uri) for _ in range(2)]
    for one in stores:
        one.folders.stands = lambda target, look=one.folders.stands: (look(target), both.wait(10))[0]
    threads = [threading.Thread(target=publish, args=(s, compress(), f"from {i}")) for i, s in enumerate(stores)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(20)
    text = (store.fetch(ref(compress())) / "sub" / "a.txt").read_text()
    assert text in ("from 0", "from 1")
    assert len(objects(store)) == 2


def test_a_store_without_conditional_requests_is_written_to_all_the_same(store, monkeypatch):
    put = store.folders.fs._fs.pipe_file

    def pipe_file(path, value, mode="overwrite", **how):
        if mode == "create":
            raise OSError(38, "NotImplemented")
        return put(path, value, **how)

    monkeypatch.setattr(store.folders.fs._fs, "pipe_file", pipe_file)
    publish(store, compress())
    assert store.has(ref(compress()))


@pytest.mark.parametrize("bytes_", [b"Payload", b"pay", None])
def test_a_damaged_artifact_moves_to_damaged(store, bytes_):
    publish(store, compress())
    [path] = [o for o in objects(store) if o.endswith("a.txt")]
    store.folders.fs.rm_file(path) if bytes_ is None else store.folders.fs.pipe_file(path, bytes_)
    with pytest.raises(Damaged, match=r"a\.txt.*moved to .*/damaged/compress/.*computes it again"):
        store.fetch(ref(compress()))
    assert store.done(map(ref, [compress()])) == set()
    assert all("/damaged/" in o for o in objects(store))
    publish(store, compress(), "new")
    assert (store.fetch(ref(compress())) / "sub" / "a.txt").read_text() == "new"


def test_bytes_that_were_torn_on_their_way_are_fetched_again(store, monkeypatch):
    publish(store, compress())
    get, torn = store.folders.fs._fs.get_file, []

    def get_file(source, target, **how):
        get(source, target, **how)
        if not torn:
            torn.append(source)
            with open(target, "w") as f:
                f.write("torn")

    monkeypatch.setattr(store.folders.fs._fs, "get_file", get_file)
    assert (store.fetch(ref(compress())) / "sub" / "a.txt").read_text() == "payload"
    assert torn
    assert store.done(map(ref, [compress()])) == {key(compress())}


def test_what_came_meanwhile_is_not_moved_aside(store):
    publish(store, compress())
    path = f"{store.folder(ref(compress()))}/manifest.json"
    old = store.folders.read(path)
    new = json.dumps({**json.loads(old), "created": 2}).encode()
    store.folders.fs.pipe_file(path, new)
    assert store.folders.set_aside(store.folder(ref(compress())), old, "seen before") == ""
    assert store.folders.read(path) == new


def test_the_driver_sees_what_others_wrote_since(store):
    other = Store(store.uri)
    assert store.done(map(ref, [compress()])) == set()
    assert not store.has(ref(compress()))
    publish(other, compress())
    assert store.has(ref(compress()))
    assert store.done(map(ref, [compress()])) == {key(compress())}


def test_what_is_done_takes_few_requests_however_much_there_is(store, server):
    cells = [compress(bits=b) for b in (2, 3, 4, 8)] + [learn(), evaluate()]
    for cell in cells:
        publish(store, cell)
    before = len(server.requests)
    assert len(store.done(map(ref, cells))) == 6
    assert len(server.requests) - before == 3
