import shutil

import pytest
from support.gridruns import run_here
from support.tinygrid import write_grid

from ctp import grid as command
from ctp.scheduling import tune


@pytest.fixture(scope="module")
def tracking_uri(tmp_path_factory, database):
    """An MLflow database that the tests of a file share."""
    return f"sqlite:///{shutil.copy(database, tmp_path_factory.mktemp('mlflow') / 'mlflow.db')}"


@pytest.fixture
def grid_run(tmp_path, monkeypatch, capsys, tracking_uri):
    """Run a grid: (exit code, lines printed, lines of errors). Its experiment is called as its file."""
    monkeypatch.setattr(tune, "run", run_here)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_uri)
    monkeypatch.chdir(tmp_path)

    def runner(name, content, *args):
        capsys.readouterr()  # what a test's own models have printed
        code = command.main([str(write_grid(tmp_path / f"{name}.yaml", content)), "--device", "cpu", *args])
        printed = capsys.readouterr()
        return code, printed.out.splitlines(), printed.err.splitlines()

    return runner
