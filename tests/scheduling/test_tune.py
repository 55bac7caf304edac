"""The walk over the graph, without a cluster: what is handed out when, and what a failure does."""

from dataclasses import replace

import pytest
from ray.tune.search import Searcher
from support.plans import make
from support.tinygrid import grid

from ctp.cells.cell import Compress, Evaluate, Learn
from ctp.cells.events import Done, Drained, Failed, Skipped, Started
from ctp.cells.labels import slug
from ctp.planning import cost
from ctp.planning.resources import BUSY, GIB, Resources, bundles
from ctp.scheduling.tune import GraphSearch
from ctp.scheduling.walk import Settings, expected


class Walk:
    """Plays Tune's part: asks for tasks and reports their ends."""

    def __init__(self, plan, todo=None, done=(), slots=2, fail_fast=False, **how):
        self.plan, self.events, self.count = plan, [], 0
        bundles = {k: {"CPU": 1} for k in plan.nodes}
        todo = set(plan.nodes) - set(done) if todo is None else todo
        settings = Settings(slots, bundles, fail_fast=fail_fast, **how)
        self.search = GraphSearch(plan, todo, set(done), settings, self.events.append)

    def ask(self):
        self.count += 1
        found = self.search.suggest(str(self.count))
        return (str(self.count), self.search.tasks[str(self.count)]) if isinstance(found, dict) else found

    def end(self, trial, keys, failed=(), **more):
        for k in keys:
            event = Failed(k, "ValueError: no") if k in failed else Done(k, **more)
            self.search.on_trial_result(trial, {"events": [event]})
        self.search.on_trial_complete(trial, {"events": [event]})

    def names(self, keys):
        return [slug(self.plan.nodes[k].cell).removeprefix("tiny-llama_") for k in keys]


def work(plan):
    """Expected work of every cell, as a run has it."""
    return expected(plan, {k: cost.of(n.cell, n.facts) for k, n in plan.nodes.items()})


@pytest.fixture
def plan(tmp_path, llama_folder):
    return make(tmp_path / "g.yaml", **grid(llama_folder))


def cells(plan, kind):
    return [k for k, n in plan.nodes.items() if isinstance(n.cell, kind)]


def test_inputs_come_first_and_everything_once(plan):
    walk, order = Walk(plan), []
    while isinstance(task := walk.ask(), tuple):
        order += task[1]
        walk.end(*task)
    assert task == Searcher.FINISHED
    assert sorted(order) == sorted(plan.nodes)
    assert all(order.index(i) < order.index(k) for k in order for i in plan.nodes[k].inputs)
    assert walk.search.outcome.done == set(plan.nodes)


def test_the_longest_path_goes_first(plan):
    walk = Walk(plan)
    assert walk.names(walk.ask()[1]) == ["gptq-3bit"]


def test_what_computes_longest_goes_first_wherever_it_stands(tmp_path, llama_folder):
    spec = grid(llama_folder, sources=["gptq-3bit", "sparsegpt-50-4bit"])
    spec["recovery"] = [{**spec["recovery"], "k": k, "steps": steps} for k, steps in ((2, 6), (4, 600), (3, 60))]
    plan = make(tmp_path / "g.yaml", **spec)
    walk = Walk(plan, done=cells(plan, Compress), slots=9, weights=work(plan))
    asked = [plan.nodes[walk.ask()[1][0]].cell for _ in range(6)]
    assert [c.recovery.steps for c in asked] == [600, 600, 60, 60, 6, 6]


def test_hours_of_learning_wait_for_the_compression_of_a_longer_path(tmp_path, llama_folder, monkeypatch):
    monkeypatch.setattr("ctp.scheduling.walk.BUSY", BUSY / 1000)
    spec = grid(llama_folder, sources=["gptq-3bit", "sparsegpt-50-4bit"])
    spec["recovery"] |= {"steps": 10**9}
    plan = make(tmp_path / "g.yaml", **spec)
    walk = Walk(plan, slots=4, weights=work(plan))
    first, second = walk.ask(), walk.ask()
    names = walk.names([*first[1], *second[1]])
    assert sorted(names) == ["gptq-3bit", "sparsegpt-50-4bit"]
    assert walk.names(walk.ask()[1]) == ["dense"]
    walk.end(*second)
    assert walk.ask() is None  # its learning would take a slot for hours, and the first's is as long
    walk.end(*first)
    assert sorted(walk.names(walk.ask()[1])[0].split("_")[0] for _ in range(2)) == sorted(names)


def test_nothing_is_suggested_before_its_inputs(plan):
    walk = Walk(plan)
    running = [walk.ask() for _ in range(3)]
    assert walk.ask() is None
    walk.end(*running[0])
    assert isinstance(plan.nodes[walk.ask()[1][0]].cell, Learn)


def test_evaluations_of_one_target_travel_together(plan):
    walk = Walk(plan, done=set(plan.nodes) - set(cells(plan, Evaluate)), slots=1)
    task = walk.ask()
    assert len(task[1]) == 2
    assert len({plan.nodes[k].cell.target for k in task[1]}) == 1


def test_what_one_prompt_is_asked_comes_in_a_row(tmp_path, llama_folder):
    """The model keeps one prompt's keys and values: measures of several prompts must not alternate."""
    texts = [{"dataset": name, "split": "test", "seq_len": 24, "count": 2} for name in ("pydoc", "newswire")]
    prompts = [{"method": "random_prompt", "k": 3, "seed": seed} for seed in (0, 1)]
    measures = [{"method": "perplexity", "text": text} for text in texts]
    plan = make(tmp_path / "g.yaml", **grid(llama_folder, sources=[], recovery=prompts, measures=measures))
    walk = Walk(plan, done=set(plan.nodes) - set(cells(plan, Evaluate)), slots=1)
    asked = [plan.nodes[k].cell for k in walk.ask()[1]]
    assert len({c.target for c in asked}) == 1
    seeds = [c.recovery and c.recovery.recovery.seed for c in asked]
    assert seeds == [None, None, 0, 0, 1, 1]
    assert [c.measure.text.dataset for c in asked] == ["pydoc", "newswire"] * 3


def test_a_failure_skips_what_needs_it_and_nothing_else(plan):
    walk = Walk(plan)
    gptq = next(k for k in cells(plan, Compress) if plan.nodes[k].cell.compression.label == "gptq-3bit")
    while isinstance(task := walk.ask(), tuple):
        walk.end(*task, failed={gptq})
    outcome = walk.search.outcome
    assert outcome.failed == {gptq: "ValueError: no"}
    needing = {k for k, n in plan.nodes.items() if "gptq-3bit" in slug(n.cell)} - {gptq}
    assert set(outcome.skipped) == needing
    assert outcome.skipped[cells(plan, Learn)[0]] == "needs tiny-llama_gptq-3bit"
    assert outcome.done == set(plan.nodes) - needing - {gptq}
    assert [type(e) for e in walk.events].count(Skipped) == len(needing)


def test_a_dead_worker_is_a_failure_of_the_cell_it_died_on(plan):
    walk = Walk(plan, done=set(plan.nodes) - set(cells(plan, Evaluate)), slots=1)
    trial, (first, second) = walk.ask()
    walk.search.on_trial_result(trial, {"events": [Started(first)]})
    walk.search.on_trial_result(trial, {"events": [Done(first)]})
    walk.search.on_trial_result(trial, {"events": [Started(second)]})
    walk.search.on_trial_complete(trial, None, error=True)
    assert set(walk.search.outcome.failed) == {second}
    assert "worker died" in walk.search.outcome.failed[second]


def test_cells_that_travelled_with_a_killer_get_another_worker(plan):
    walk = Walk(plan, done=set(plan.nodes) - set(cells(plan, Evaluate)), slots=1)
    trial, (first, second) = walk.ask()
    walk.search.on_trial_result(trial, {"events": [Started(first)]})
    walk.search.on_trial_complete(trial, None, error=True)
    assert set(walk.search.outcome.failed) == {first}
    assert second in walk.search.waiting
    tried = []
    while isinstance(task := walk.ask(), tuple):
        tried += task[1]
        walk.end(*task)
    assert second in tried
    assert first not in tried


def test_a_prompt_that_learned_on_outlives_its_workers(plan):
    """Machines that are taken away every hour must not end a prompt of ten hours; one that kills them does."""
    [learned] = cells(plan, Learn)
    saved = iter([30, 70, 70])
    walk = Walk(plan, done=cells(plan, Compress), reached=lambda k: next(saved))
    tries = 0
    while learned not in walk.search.outcome.failed:
        trial, keys = walk.ask()
        if keys == [learned]:
            tries += 1
            walk.search.on_trial_complete(trial, None, error=True)
        else:
            walk.end(trial, keys)
    assert tries == 3
    assert len(walk.search.outcome.skipped) == 3


def test_draining_hands_out_nothing_and_blames_nobody(plan):
    walk = Walk(plan)
    (first, keys), (second, _) = walk.ask(), walk.ask()
    walk.search.drain()
    assert walk.ask() is None  # two still run
    walk.search.on_trial_result(first, {"events": [Drained(keys[0])]})
    walk.search.on_trial_complete(first, {"done": True})
    walk.search.on_trial_complete(second, None, error=True)
    assert walk.ask() == Searcher.FINISHED
    assert not walk.search.outcome.failed
    assert not walk.search.outcome.done
    assert walk.events == []


def test_fail_fast_starts_nothing_more(plan):
    walk = Walk(plan, fail_fast=True)
    first, second = walk.ask(), walk.ask()
    walk.end(*first, failed=set(first[1]))
    assert walk.ask() is None  # the second one is still running
    walk.end(*second)
    assert walk.ask() == Searcher.FINISHED


def test_a_dead_workers_last_words_are_looked_up_in_the_store(plan):
    """A worker tells what happened some times a second: what it had finished since is done, the next one killed it."""
    evaluations = set(cells(plan, Evaluate))
    landed = set()
    walk = Walk(plan, done=set(plan.nodes) - evaluations, slots=1, landed=landed.__contains__)
    trial, (first, second) = walk.ask()
    landed.add(first)
    walk.search.on_trial_complete(trial, None, error=True)
    assert (walk.search.outcome.done, set(walk.search.outcome.failed)) == ({first}, {second})
    assert [(type(e), e.key) for e in walk.events] == [(Done, first), (Failed, second)]


@pytest.fixture
def many(tmp_path, llama_folder):
    """A hundred compressions and nothing else."""
    compression = {"method": "gptq", "bits": 3, "damping": [(i + 1) / 1000 for i in range(100)]}
    return make(tmp_path / "g.yaml", **grid(llama_folder, compression=compression, sources=[], measures=[]))


def test_short_cells_share_a_task_once_one_was_measured(many):
    walk, sizes = Walk(many, slots=2), []
    while isinstance(task := walk.ask(), tuple):
        sizes.append(len(task[1]))
        walk.end(*task, seconds=0.1)
    assert sizes[0] == 1
    assert max(sizes) == 25  # its share: of 99 ready cells a quarter, by two slots
    assert sizes[1:] == sorted(sizes[1:], reverse=True)
    assert sizes[-1] == 1
    assert sum(sizes) == 100


@pytest.mark.parametrize(("seconds", "size"), [(0.3, 10), (2.0, 1), (60.0, 1)])
def test_a_task_of_short_cells_takes_about_three_seconds(many, seconds, size):
    walk = Walk(many, slots=2)
    walk.end(*walk.ask(), seconds=seconds)
    assert len(walk.ask()[1]) == size


def test_what_runs_next_is_decided_when_a_slot_is_free(many):
    walk = Walk(many, slots=2, ahead=0)
    first, second = walk.ask(), walk.ask()
    assert walk.ask() is None  # both slots are spoken for
    for trial, keys in (first, second):
        walk.search.on_trial_result(trial, {"events": [Started(keys[0])]})
    assert walk.ask() is None
    walk.end(*first, seconds=0.1)
    assert len(walk.ask()[1]) > 1
    assert walk.ask() is None


def test_a_free_worker_gets_what_it_has_loaded(plan):
    evaluations = cells(plan, Evaluate)
    walk = Walk(plan, done=set(plan.nodes) - set(evaluations), slots=6, ahead=0)
    targets = [plan.nodes[k].cell.target for k in evaluations]
    running = [walk.ask() for _ in range(3)]
    assert [len(keys) for _, keys in running] == [1, 1, 1]
    last = running[2]
    walk.end(*last)
    again = plan.nodes[walk.ask()[1][0]].cell.target
    assert again == plan.nodes[last[1][0]].cell.target or targets.count(plan.nodes[last[1][0]].cell.target) == 1


def test_heavy_cells_go_first_and_what_runs_alone_last(tmp_path, llama_folder):
    whole = grid(llama_folder)
    latency = {"method": "latency", "seq_len": 16, "new_tokens": 4}
    plan = make(tmp_path / "g.yaml", **{**whole, "measures": [latency, whole["measures"]]})
    evaluations = cells(plan, Evaluate)
    heavy = evaluations[-1]
    weights = {k: 50.0 if k == heavy else 1.0 for k in plan.nodes}
    walk = Walk(plan, done=set(plan.nodes) - set(evaluations), slots=2, weights=weights)
    assert walk.ask()[1][0] == heavy
    order = []
    while isinstance(task := walk.ask(), tuple):
        order += [plan.nodes[k].cell.measure.method for k in task[1]]
        walk.end(*task)
    assert order == sorted(order, reverse=True)
    assert order[-6:] == ["latency"] * 6


def test_a_stage_alone_skips_what_its_inputs_lack(plan):
    todo = set(cells(plan, Evaluate))
    walk = Walk(plan, todo=todo)
    assert walk.ask() == Searcher.FINISHED
    assert set(walk.search.outcome.skipped) == todo


def test_a_report_that_comes_twice_counts_once(plan):
    walk = Walk(plan)
    task = walk.ask()
    walk.end(*task)
    assert [type(e) for e in walk.events] == [Done]


@pytest.mark.parametrize(("needed", "device", "share"), [(0.5, 24, 0.25), (8, 24, 0.5), (13, 80, 0.25), (18, 24, 1.0),
                                                        (24, 24, 2.0)])  # fmt: skip
def test_gpu_shares_are_quarters_or_whole(needed, device, share):
    assert Resources(1, device * GIB).of(needed * GIB, gpus=True) == {"CPU": 1, "GPU": share}
    assert Resources(2).of(needed * GIB, gpus=False) == {"CPU": 2}


def test_hours_of_learning_take_a_whole_gpu(tmp_path, llama_folder):
    for steps, share in ((6, 0.25), (10**7, 1.0)):
        spec = grid(llama_folder)
        spec["recovery"] |= {"steps": steps}
        plan = make(tmp_path / "g.yaml", **spec)
        large = replace(next(iter(plan.nodes.values())).facts, parameters=10**9)
        nodes = {k: replace(n, facts=large) for k, n in plan.nodes.items()}
        found = bundles(replace(plan, nodes=nodes), Resources(1, 80 * GIB), True, 4, 8)
        assert {found[k]["GPU"] for k in cells(plan, Learn)} == {share}
        assert {found[k]["GPU"] for k in cells(plan, Evaluate)} == {0.25}


def test_what_runs_alone_gets_a_machine():
    assert Resources(1).of(GIB, gpus=False, alone=8) == {"CPU": 8}
    assert Resources(1, 24 * GIB).of(GIB, gpus=True, alone=8) == {"CPU": 8, "GPU": 1.0}
