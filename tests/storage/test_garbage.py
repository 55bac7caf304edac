"""`python -m ctp.store verify`, `gc`, `rm`: what is wrong is found, what nobody needs goes, and nothing else."""

import json
import os
import time

import pytest
from support.cells import compress, evaluate, learn, publish
from support.plans import make
from support.tinygrid import grid, write_grid

from ctp.cells.cell import Compress, key, own_key, to_json
from ctp.machine.process import BEAT, DEAD_SECONDS, OWNER, signs
from ctp.planning import gridfile
from ctp.planning.pins import Pins
from ctp.storage import garbage
from ctp.storage.drivers import Driver
from ctp.storage.ref import identity, ref
from ctp.storage.store import Store
from ctp.store import main

CELLS = (compress(), learn(), evaluate(recovery=learn()))


@pytest.fixture
def full(store):
    """A compressed model, a prompt learned through it, an evaluation of both."""
    for cell in CELLS:
        publish(store, cell)
    return store


def call(store, *args, capsys):
    """(exit code, stdout, stderr) of a command, on this very store: fsspec's memory is this process's."""
    code = main([*map(str, args), "--store", store.uri])
    out, err = capsys.readouterr()
    return code, out, err


def rewrite(store, cell, **changes):
    path = f"{store.folder(ref(cell))}/manifest.json"
    store.folders.fs.pipe_file(path, json.dumps({**store.manifest(ref(cell)), **changes}).encode())


def payload(store, cell):
    [path] = [p for p in store.folders.files(cell.kind) if store.folder(ref(cell)).split("/")[-1] in p and "a.txt" in p]
    return f"{store.folders.root}/{cell.kind}/{path}"


def older(monkeypatch, days=2):
    """As if so many days had gone by since everything here was written."""
    now = time.time
    monkeypatch.setattr(garbage.time, "time", lambda: now() + days * 86400)


def test_a_whole_store_is_said_to_be_whole(full, capsys):
    code, out, _ = call(full, "verify", capsys=capsys)
    assert code == 0
    assert "3 artifacts" in out
    assert "every one is whole" in out


@pytest.mark.parametrize("cell", CELLS, ids=lambda c: c.kind)
@pytest.mark.parametrize(
    ("damage", "said"),
    [(b"Payload", "its bytes have changed"), (b"payloa", "has 6 bytes, not the 7"), (None, "is missing")],
    ids=["flipped", "truncated", "removed"],
)
def test_any_damaged_file_is_found(full, cell, damage, said, capsys):
    path = payload(full, cell)
    full.folders.fs.rm_file(path) if damage is None else full.folders.fs.pipe_file(path, damage)
    code, out, _ = call(full, "verify", capsys=capsys)
    assert code == 1
    [line] = [x for x in out.splitlines() if said in x]
    assert line.startswith(f"{cell.kind}/")
    assert f"{key(cell)[:12]}" in line.split("To do:")[1]
    assert call(full, "verify", key(next(c for c in CELLS if c != cell))[:8], capsys=capsys)[0] == 0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"", "is not JSON"),
        (b'{"key": ', "is not JSON"),
        (b"[1]", "is not an object"),
        (b"\xff\xfe", "is not JSON"),
        (b'{"key": "../../x"}', "not 64 hex digits"),
        (b'{"key": "%s", "kind": "evaluate", "spec": {}, "inputs": [3]}' % (b"0" * 64), "not a list of keys"),
    ],
)
def test_a_torn_manifest_is_found_and_the_rest_is_listed(full, text, said, capsys):
    full.folders.fs.pipe_file(f"{full.folder(ref(CELLS[2]))}/manifest.json", text)
    code, out, _ = call(full, "verify", capsys=capsys)
    assert code == 1
    assert said in out
    code, out, err = call(full, "ls", capsys=capsys)
    assert code == 1
    assert key(CELLS[0])[:12] in out
    assert said in err


def test_a_manifest_that_is_not_what_its_key_says_is_found(full, capsys):
    spec = full.manifest(ref(CELLS[0]))["spec"]
    spec["compression"]["bits"] = 4
    rewrite(full, CELLS[0], spec=spec)
    code, out, _ = call(full, "verify", capsys=capsys)
    assert code == 1
    assert f"its key is {key(CELLS[0])[:12]}, but its spec makes {key(compress(bits=4))[:12]}" in out


def test_an_input_that_is_not_what_is_said_of_it_is_found(full, capsys):
    spec = full.manifest(ref(CELLS[1]))["spec"]
    spec["source"]["compression"]["bits"] = 4  # enters the key by the input's key only
    rewrite(full, CELLS[1], spec=spec)
    code, out, _ = call(full, "verify", capsys=capsys)
    assert code == 1
    assert f"it says of its input {key(CELLS[0])[:12]} what that is not" in out


def test_every_cell_of_the_paper_has_the_key_that_its_manifest_makes():
    """own_key works from plain JSON, key from the cells: a difference would call whole artifacts damaged."""
    pins = Pins(provisional=True)
    from ctp.planning.plan import make as plan

    cells = plan(gridfile.load("full_paper", [], pins), pins).cells()
    assert len(cells) > 400
    for cell in cells:
        assert own_key(json.loads(json.dumps(identity(cell)))) == key(cell)


def test_missing_inputs_and_files_that_nobody_names_are_found(full, capsys):
    full.folders.remove(full.folder(ref(CELLS[0])))
    full.folders.fs.pipe_file(f"{full.folder(ref(CELLS[1]))}/notes.txt", b"mine")
    code, out, _ = call(full, "verify", capsys=capsys)
    assert code == 1
    lines = out.splitlines()
    assert sum(f"its source {key(CELLS[0])[:12]} is missing" in x for x in lines) == 1
    assert sum(f"its target {key(CELLS[0])[:12]} is missing" in x for x in lines) == 1
    assert sum("notes.txt: no manifest names this file" in x for x in lines) == 1


def test_files_without_a_manifest_are_found(full, capsys, monkeypatch):
    full.folders.fs.rm_file(f"{full.folder(ref(CELLS[2]))}/manifest.json")
    code, out, _ = call(full, "verify", capsys=capsys)
    assert code == (1 if full.folders.local else 0)  # in an object store the manifest may be on its way
    older(monkeypatch)
    code, out, _ = call(full, "verify", capsys=capsys)
    assert code == 1
    assert "files without a manifest" in out


def test_verify_as_json(full, capsys):
    full.folders.fs.pipe_file(payload(full, CELLS[1]), b"Payload")
    code, out, _ = call(full, "verify", "--json", capsys=capsys)
    said = json.loads(out)
    assert code == 1
    assert said["artifacts"] == 3
    [problem] = said["problems"]
    assert problem["path"] == "/".join(full.folder(ref(CELLS[1])).split("/")[-2:])
    assert "changed" in problem["problem"]


# ------------------------------------------------------------------------------ gc


def everything(store):
    return {p: store.folders.read(p) for p in store.folders.fs.find(store.folders.root)}


def test_gc_leaves_a_tidy_store_alone(full, capsys, monkeypatch):
    for path in (
        "compress/notes.txt",
        "evaluate/my plots/a.png",
        f"{full.folder(ref(CELLS[0]))[len(full.folders.root) + 1 :]}/b",
    ):
        full.folders.fs.makedirs(f"{full.folders.root}/{path}".rpartition("/")[0], exist_ok=True)
        full.folders.fs.pipe_file(f"{full.folders.root}/{path}", b"mine")  # not ctp's
    full.states.save(
        ref(learn(compress(bits=4))),
        identity(learn(compress(bits=4))),
        5,
        lambda folder: (folder / "s").write_text("x"),
    )
    full.failures.record(ref(compress(bits=2)), to_json(compress(bits=2)), "ValueError: boom", "trace")
    older(monkeypatch)
    before = everything(full)
    code, out, _ = call(full, "gc", capsys=capsys)
    assert code == 0
    assert "nothing to remove" in out
    assert everything(full) == before
    code, out, _ = call(full, "verify", capsys=capsys)
    assert code == 1
    assert out.count("move it elsewhere") == 3


def test_gc_removes_what_no_run_needs(full, capsys, monkeypatch):
    before = everything(full)
    full.states.save(
        ref(CELLS[1]), identity(CELLS[1]), 5, lambda folder: (folder / "s").write_text("x")
    )  # another driver's, too late
    full.failures.record(ref(CELLS[0]), to_json(CELLS[0]), "ValueError: boom", "trace")
    publish(full, compress(bits=4))
    full.folders.fs.pipe_file(payload(full, compress(bits=4)), b"torn")
    with pytest.raises(Exception, match="moved to"):
        full.fetch(ref(compress(bits=4)))
    half = f"{full.folders.root}/compress/half-0123456789ab/" + (
        "a.txt" if full.folders.local else "payload-0123456789ab/a.txt"
    )
    full.folders.fs.makedirs(half.rpartition("/")[0], exist_ok=True)
    full.folders.fs.pipe_file(half, b"half")
    if full.folders.local:
        os.makedirs(f"{full.folders.root}/.tmp/ctp-killed")
    code, out, _ = call(full, "gc", "--dry-run", capsys=capsys)
    assert "would be removed" in out
    assert "half" not in out  # it may be coming just now
    older(monkeypatch)
    state = everything(full)
    code, out, _ = call(full, "gc", "--dry-run", capsys=capsys)
    assert code == 0
    assert everything(full) == state
    for what in (
        "half-0123456789ab",
        "partial/",
        "failed/",
        "damaged/",
        *([".tmp/ctp-killed"] if full.folders.local else []),
    ):
        assert what in out
    assert call(full, "gc", capsys=capsys)[0] == 0
    assert everything(full) == before
    assert "nothing to remove" in call(full, "gc", capsys=capsys)[1]


def test_gc_removes_what_dead_drivers_said_and_leaves_the_living(full, capsys, monkeypatch):
    living = signs()
    dead = living | {OWNER: f"{living[OWNER].split()[0]} 999999999 1"}
    silent = {OWNER: "elsewhere/x 1 2", BEAT: str(int(time.time()) - 2 * int(DEAD_SECONDS))}
    for name, told in (("living", living), ("dead", dead), ("silent", silent)):
        driver = Driver(
            grid=name, machine="m", pid=1, signs=told, total=1, done=0, failed=0, skipped=0, began=0.0, cells=[]
        )
        full.folders.write(f"{full.folders.root}/running/{name}.json", driver.model_dump_json().encode())
    full.folders.write(f"{full.folders.root}/running/torn.json", b'{"grid": "g"')
    _, out, _ = call(full, "gc", capsys=capsys)
    assert out.count("left by a driver that is no more") == 2
    assert sorted(full.folders.files("running")) == ["living.json", "torn.json"]  # may be being written
    older(monkeypatch)
    _, out, _ = call(full, "gc", "--dry-run", capsys=capsys)
    assert "running/torn.json" in out


def test_gc_removes_the_files_of_a_racer_that_died(full, capsys, monkeypatch):
    if full.folders.local:
        return  # there a racer's files are in its own folder under .tmp
    before = everything(full)
    full.folders.fs.pipe_file(f"{full.folder(ref(CELLS[0]))}/payload-0123456789ab/a.txt", b"late")
    assert call(full, "verify", capsys=capsys)[0] == 0
    older(monkeypatch)
    assert call(full, "verify", capsys=capsys)[0] == 1
    call(full, "gc", capsys=capsys)
    assert everything(full) == before


def test_gc_for_grids_keeps_their_cells_alone(tmp_path, llama_folder, capsys):
    plan = make(tmp_path / "g.yaml", **grid(llama_folder))
    store = Store(str(tmp_path / "store"))
    for node in plan.nodes.values():
        publish(store, node.cell)
    publish(store, compress())
    store.failures.record(ref(learn()), to_json(learn()), "ValueError: boom", "trace")
    file = write_grid(tmp_path / "g.yaml", grid(llama_folder))
    other = write_grid(tmp_path / "other.yaml", grid(llama_folder, recovery=[], sources=[]))
    assert "nothing to remove" in call(store, "gc", capsys=capsys)[1]
    code, out, _ = call(store, "gc", "--grid", file, "--dry-run", capsys=capsys)
    assert "2 things" in out
    assert key(compress())[:12] in out
    assert call(store, "gc", "--grid", other, file, capsys=capsys)[0] == 0
    assert store.done(map(ref, [*plan.cells(), compress()])) == set(plan.nodes)
    assert call(store, "gc", "--grid", other, capsys=capsys)[0] == 0
    kept = store.done(plan.refs())
    assert len(kept) == 6
    assert any(isinstance(plan.nodes[k].cell, Compress) for k in kept)
    code, _, err = call(store, "gc", "--grid", "nosuch", capsys=capsys)
    assert code == 2
    assert "nosuch" in err
    assert store.done(plan.refs()) == kept


# ------------------------------------------------------------------------------ rm


def test_rm_refuses_what_others_were_made_from(full, capsys):
    code, _, err = call(full, "rm", key(CELLS[0])[:8], capsys=capsys)
    assert code == 1
    assert "Nothing removed" in err
    assert "learn/" in err
    assert "evaluate/" in err
    assert full.done(map(ref, CELLS)) == {key(c) for c in CELLS}


def test_rm_removes_one_its_dependants_or_it_alone(full, capsys):
    assert call(full, "rm", key(CELLS[2])[:8], "--dry-run", capsys=capsys)[0] == 0
    assert len(full.done(map(ref, CELLS))) == 3
    name = full.folder(ref(CELLS[2])).split("/")[-1]
    assert call(full, "rm", name[:-13], capsys=capsys)[0] == 0
    assert full.done(map(ref, CELLS)) == {key(c) for c in CELLS[:2]}
    assert call(full, "rm", key(CELLS[0]), "--force", capsys=capsys)[0] == 0
    assert full.done(map(ref, CELLS)) == {key(CELLS[1])}
    for cell in CELLS:
        publish(full, cell)
    code, out, _ = call(full, "rm", key(CELLS[0]), "--with-dependants", capsys=capsys)
    assert code == 0
    assert "3 things" in out
    assert everything(full) == {}


def test_rm_takes_a_torn_artifact(full, capsys):
    full.folders.fs.pipe_file(f"{full.folder(ref(CELLS[2]))}/manifest.json", b"torn")
    assert call(full, "rm", key(CELLS[2])[:12], capsys=capsys)[0] == 0
    assert full.done(map(ref, CELLS)) == {key(c) for c in CELLS[:2]}


@pytest.mark.parametrize("text", ["abc", "0123456789ab", "no such name", "../../x", ""])
def test_rm_knows_only_what_is_there(full, text, capsys):
    code, _, err = call(full, "rm", text, capsys=capsys)
    assert code == 2
    assert repr(text) in err
    assert len(full.done(map(ref, CELLS))) == 3
