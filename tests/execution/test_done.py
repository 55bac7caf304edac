"""A cell is done by one definition, wherever it is asked; what is damaged by it is made again in the same run."""

import json
import os
import shutil
from pathlib import Path

import pytest
from support.gridruns import starting
from support.tinygrid import grid

from ctp.cells.cell import Compress, Evaluate, key
from ctp.console import status
from ctp.planning.states import Kind, states
from ctp.storage import catalog, verify
from ctp.storage.catalog import entries
from ctp.storage.ref import identity, ref
from ctp.storage.remote import StoreError
from ctp.storage.store import Store


def other(folder, manifest):
    """The manifest says that it is another cell's."""
    manifest.write_text(json.dumps({**json.loads(manifest.read_bytes()), "key": "0" * 64}))


def in_the_way(folder, manifest):
    """A folder where the manifest is to be."""
    manifest.unlink()
    manifest.mkdir()


def rewritten(**changes):
    def damage(folder, manifest):
        manifest.write_text(json.dumps({**json.loads(manifest.read_bytes()), **changes}))

    return damage


def payload(act):
    """Something happens to the largest file beside the manifest."""

    def damage(folder, manifest):
        act(max((p for p in folder.iterdir() if p != manifest), key=lambda p: p.stat().st_size))

    return damage


def as_folder(path):
    path.unlink()
    path.mkdir()


DAMAGES = {
    "empty": lambda folder, manifest: manifest.write_bytes(b""),
    "zeros": lambda folder, manifest: manifest.write_bytes(bytes(4096)),
    "cut": lambda folder, manifest: manifest.write_bytes(manifest.read_bytes()[:100]),
    "list": lambda folder, manifest: manifest.write_bytes(b"[]"),
    "null": lambda folder, manifest: manifest.write_bytes(b"null"),
    "no fields": lambda folder, manifest: manifest.write_bytes(b"{}"),
    "deep": lambda folder, manifest: manifest.write_bytes(b"[" * 100_000),
    "another key": other,
    "no files": rewritten(files=None),
    "odd metrics": rewritten(metrics=[]),
    "a folder": in_the_way,
    "payload gone": payload(Path.unlink),
    "payload empty": payload(lambda path: path.write_bytes(b"")),
    "payload cut": payload(lambda path: path.write_bytes(path.read_bytes()[:-1])),
    "payload a folder": payload(as_folder),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_whoever_asks_gets_the_same_answer(copied, damage):
    store, cell = copied.store, copied.all(Evaluate)[0]
    assert store.has(ref(cell))  # as a driver saw it that goes on
    folder = Path(store.folder(ref(cell)))
    DAMAGES[damage](folder, folder / "manifest.json")
    for asked in (store, Store(store.uri)):
        assert not asked.has(ref(cell))
        assert asked.done(map(ref, copied.cells)) == set(copied.plan.nodes) - {key(cell)}
        assert states(copied.plan, asked)[key(cell)].kind is Kind.DAMAGED
        assert status.status(copied.plan, asked).done == len(copied.cells) - 1
    found = catalog.artifacts(store)
    assert [a.folder for a in found if not a.done] == [folder.name]
    assert any(folder.name in f.path for f in verify.check(store, found, found))
    listed = entries(store, damaged=[])
    assert key(cell) not in {e.key for e in listed}
    assert folder.exists()  # asking changes nothing
    copied.execute(cell)
    assert store.done(map(ref, copied.cells)) == set(copied.plan.nodes)
    assert [p.name.rpartition("-")[0] for p in (folder.parents[1] / "damaged" / "evaluate").iterdir()] == [folder.name]


def test_one_listing_and_each_manifest_once(copied, monkeypatch):
    store, read = copied.store, []
    assert len(store.done(map(ref, copied.cells))) == len(copied.cells)
    monkeypatch.setattr(store.folders, "read", read.append)
    assert len(store.done(map(ref, copied.cells))) == len(copied.cells)
    assert read == []


def test_what_may_not_be_read_is_said_and_stays(copied, monkeypatch):
    cell, cat = copied.cells[0], copied.store.folders.fs.cat_file
    path = f"{copied.store.folder(ref(cell))}/manifest.json"

    def refused(at, **how):
        if at == path:
            raise PermissionError(13, "Permission denied", at)
        return cat(at, **how)

    monkeypatch.setattr(copied.store.folders.fs, "cat_file", refused)
    for ask in (lambda: copied.store.has(ref(cell)), lambda: Store(copied.store.uri).done(map(ref, copied.cells))):
        with pytest.raises(StoreError, match=r"manifest\.json cannot be read \(Permission denied\)"):
            ask()
    assert os.path.exists(path)


def test_a_run_makes_it_again_and_says_so(tmp_path, llama_folder, grid_run):
    content = grid(llama_folder, compression=["dense"], sources=[])
    assert grid_run("done", content)[0] == 0
    store = tmp_path / "results" / "store"
    [folder] = (store / "evaluate").iterdir()
    DAMAGES["empty"](folder, folder / "manifest.json")
    code, out, _ = grid_run("done", content)
    assert code == 0
    [line] = [x for x in out if "moved to" in x]
    assert str(folder) in line
    assert "done: 1 done" in "\n".join(out)
    assert starting(out, "MLflow was") == []
    assert json.loads((folder / "manifest.json").read_bytes())["key"]
    assert grid_run("done", content, "--status")[1][0].startswith("done: 2 of 2 cells done")


def test_an_artifact_is_on_the_disk_before_it_is_seen(copied, monkeypatch):
    """Files, manifest and folder first, then the rename, then the folder that has the new name."""
    did, cell = [], copied.all(Compress)[1]
    shutil.rmtree(copied.store.folder(ref(cell)))
    monkeypatch.setattr(os, "fsync", lambda at: did.append(os.readlink(f"/proc/self/fd/{at}")))
    rename = Path.rename
    monkeypatch.setattr(Path, "rename", lambda self, to: (did.append(f"-> {to}"), rename(self, to))[1])
    with copied.store.publish(ref(cell), identity(cell)) as draft:
        (draft.path / "weights").write_bytes(b"1")
        work = str(draft.path)
    seen = did.index(f"-> {copied.store.folder(ref(cell))}")
    assert {f"{work}/weights", f"{work}/manifest.json", work} <= set(did[:seen])
    assert did[seen + 1 :] == [os.path.dirname(copied.store.folder(ref(cell)))]
