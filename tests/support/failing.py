"""What tests share: see the names."""

import pytest
from support.remotes import remote  # noqa: F401 (a fixture)
from support.tinygrid import write_grid

from ctp import grid as command
from ctp.cells.cell import to_json
from ctp.execution import worker
from ctp.scheduling import tune
from ctp.scheduling.walk import Settings, Walk
from ctp.storage.store import Store


def run_here(plan, todo, done, *, store, runtime, options, on_event):
    """A run in this process instead of Ray's workers, where a test can break what it likes."""
    settings = Settings(1, {k: {"CPU": 1} for k in plan.nodes}, fail_fast=options.fail_fast)
    walk = Walk(plan, todo, done, settings, on_event)
    place, count = Store(store), 0
    while task := walk.next_task(str(count)):
        for k in task:
            data = to_json(plan.nodes[k].cell) | {"key": k}
            worker.do(data, place, runtime, lambda event, name=str(count): walk.receive(name, event))
        walk.end(str(count))
        count += 1
    return walk.outcome


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"  # made once: that takes seconds


@pytest.fixture
def grid_run(tmp_path, monkeypatch, capsys, database):
    """Run a grid: (exit code, lines printed, lines of errors). Its experiment is called as its file."""
    monkeypatch.setattr(tune, "run", run_here)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", database)
    monkeypatch.chdir(tmp_path)

    def runner(name, content, *args):
        capsys.readouterr()  # what a test's own models have said
        code = command.main([str(write_grid(tmp_path / f"{name}.yaml", content)), "--device", "cpu", *args])
        printed = capsys.readouterr()
        return code, printed.out.splitlines(), printed.err.splitlines()

    return runner


def starting(lines, word):
    return [line.strip() for line in lines if line.strip().startswith(word)]
