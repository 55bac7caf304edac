import pytest
from support.gridruns import without_ray
from support.tinygrid import write_grid

from ctp import grid as command


@pytest.fixture(scope="module")
def tracking_uri(tmp_path_factory, new_database):
    """An MLflow database that the tests of a file share."""
    return new_database(tmp_path_factory.mktemp("mlflow"))


@pytest.fixture
def grid_run(tmp_path, monkeypatch, capsys, tracking_uri):
    """Run a grid: (exit code, lines printed, lines of errors). Its experiment is called as its file."""
    without_ray(monkeypatch)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_uri)
    monkeypatch.chdir(tmp_path)

    def runner(name, content, *args):
        capsys.readouterr()  # what a test's own models have printed
        code = command.main([str(write_grid(tmp_path / f"{name}.yaml", content)), "--device", "cpu", *args])
        printed = capsys.readouterr()
        return code, printed.out.splitlines(), printed.err.splitlines()

    return runner
