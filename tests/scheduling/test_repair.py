"""A damaged artifact is told, moved aside and made again in the same run; what was made from it stays."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.bench import Bench
from support.gridruns import manifests, run, runs
from support.tinygrid import grid, write_grid

from ctp.cells.cell import Compress, Evaluate, Learn, key
from ctp.execution import loading
from ctp.planning.states import Outcome, runnable
from ctp.scheduling.repair import complete, past_damage
from ctp.storage.manifest import Damaged
from ctp.storage.ref import ref
from ctp.storage.store import Store
from ctp.tracking.tracker import Tracker


def by_hand(bench, rounds):
    """Plays the schedule's part: cells in turn, failures told, what needs them skipped."""

    def run(todo, done):
        rounds.append(set(todo))
        loading.forget()
        store, out = Store(bench.store.uri), Outcome(skipped=dict(runnable(bench.plan, todo, done)))
        bench.store = store
        for k, node in bench.plan.nodes.items():
            if k not in todo or k in out.skipped:
                continue
            if any(i in out.failed or i in out.skipped for i in node.inputs):
                out.skipped[k] = "needs another"
                continue
            try:
                bench.execute(node.cell)
                out.done.add(k)
            except Exception as e:
                out.failed[k] = f"{type(e).__name__}: {e}"
        return out

    return run


def broken(path):
    """One bit of a file's middle byte is another."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_flipped_bit_in_an_input_costs_that_input_and_what_waits_for_it(tmp_path, llama_folder, capsys):
    bench = Bench(tmp_path, llama_folder)
    small = next(c for c in bench.all(Compress) if c.compression.label == "gptq-3bit")
    late = [c for c in bench.all(Evaluate) if c.target == small]
    for cell in bench.cells:
        if cell not in late:
            bench.execute(cell)
    before = {p: p.read_bytes() for p in (tmp_path / "store" / "learn").rglob("*") if p.is_file()}
    weights = max((tmp_path / "store" / "compress").glob("*gptq-3bit*/*"), key=lambda p: p.stat().st_size)
    whole = weights.read_bytes()
    broken(weights)
    todo, rounds = {key(c) for c in late}, []
    done = set(bench.plan.nodes) - todo
    outcome = complete(bench.plan, todo, done, Store(bench.store.uri), by_hand(bench, rounds))
    assert not outcome.failed
    assert not outcome.skipped
    assert outcome.done == todo | {key(small)}
    assert rounds == [todo, todo | {key(small)}]  # the prompt that was learned through it is not learned again
    assert {p: p.read_bytes() for p in before} == before
    assert weights.read_bytes() == whole
    [kept] = (tmp_path / "store" / "damaged" / "compress").iterdir()
    assert (kept / weights.name).read_bytes() != whole
    assert "its bytes have changed" in (kept / "damaged.json").read_text()
    assert re.search(
        r"damaged and moved to .*/damaged: tiny-llama_gptq-3bit. Running again .* 3 cells", capsys.readouterr().out
    )


def test_damage_to_a_prompt_and_its_source_is_found_together(tmp_path, llama_folder):
    bench = Bench(tmp_path, llama_folder)
    for cell in (*bench.all(Compress), *bench.all(Learn)):
        bench.execute(cell)
    for file in ("compress/*gptq-3bit*/**/compressed.safetensors", "learn/*/**/adapter_model.safetensors"):
        [path] = (tmp_path / "store").glob(file)
        broken(path)
    todo, rounds = {key(c) for c in bench.all(Evaluate)}, []
    outcome = complete(bench.plan, todo, set(bench.plan.nodes) - todo, bench.store, by_hand(bench, rounds))
    assert not outcome.failed
    assert not outcome.skipped
    [small] = [key(c) for c in bench.all(Compress) if c.compression.label == "gptq-3bit"]
    [learned] = map(key, bench.all(Learn))
    assert outcome.done == todo | {small, learned}
    assert bench.store.done(map(ref, bench.cells)) == set(bench.plan.nodes)
    failed = {key(c) for c in bench.all(Evaluate) if c.recovery or key(c.target) == small}
    assert rounds == [todo, {small, learned} | failed]


def test_other_failures_are_not_tried_again(tmp_path, llama_folder):
    bench = Bench(tmp_path, llama_folder)
    for cell in bench.cells[:-1]:
        bench.execute(cell)
    last, rounds = key(bench.cells[-1]), []

    def run(todo, done):
        rounds.append(todo)
        return Outcome(failed={last: "ValueError: no"})

    outcome = complete(bench.plan, {last}, set(bench.plan.nodes) - {last}, bench.store, run)
    assert outcome.failed == {last: "ValueError: no"}
    assert rounds == [{last}]


def test_what_reads_many_artifacts_goes_on_past_damaged_ones():
    store, left = SimpleNamespace(damaged=[]), ["a", "b"]

    def read():
        if left:
            store.damaged.append(left.pop())
            raise Damaged(store.damaged[-1])
        return 3

    assert past_damage(store, read) == 3
    assert store.damaged == ["b", "a"]

    def stuck():
        raise Damaged("cannot be moved")

    with pytest.raises(Damaged, match="cannot be moved"):
        past_damage(store, stuck)


def test_mlflow_is_brought_up_to_date_past_a_torn_manifest(copied, uri):
    bench = copied
    last = bench.cells[-1]
    path = Path(bench.store.folder(ref(last)), "manifest.json")
    path.write_bytes(path.read_bytes()[:100])
    tracker = Tracker(uri, bench.plan, bench.store)
    past_damage(bench.store, lambda: tracker.sync(whole=True))
    assert bench.store.done(map(ref, bench.cells)) == set(bench.plan.nodes) - {key(last)}
    [line] = bench.store.damaged
    assert "is not JSON" in line
    assert "computes it again" in line
    bench.execute(last)
    assert tracker.sync(whole=True) == 1
    assert len(runs(tracker.uri, "g")) == len(bench.plan.nodes)


@pytest.mark.slow
def test_a_run_says_what_was_damaged_and_computes_it_again(tmp_path, llama_folder):
    file = write_grid(tmp_path / "tiny.yaml", grid(llama_folder))
    assert run("ctp.grid", file, cwd=tmp_path).returncode == 0
    before, store = manifests(tmp_path), tmp_path / "results" / "store"
    broken(max(store.folders.glob("compress/*gptq-3bit*/*"), key=lambda p: p.stat().st_size))
    for path in store.folders.glob("evaluate/*gptq-3bit_*/manifest.json"):
        path.unlink()  # they are to be done again, and need what is damaged
    found = run("ctp.grid", file, cwd=tmp_path)
    assert found.returncode == 0, found.stdout + found.stderr
    assert "its bytes have changed" in found.stdout
    assert "Running again what is missing now" in found.stdout
    after = manifests(tmp_path)
    assert {n: (m["key"], m["metrics"].get("ppl")) for n, m in after.items()} == {
        n: (m["key"], m["metrics"].get("ppl")) for n, m in before.items()
    }
