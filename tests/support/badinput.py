"""What tests share: see the names."""

import time

import pytest
import yaml

from ctp import grid

SECONDS = 3


@pytest.fixture
def refused(tmp_path, capsys):
    """Plan a grid that is wrong; gives the one line that tells it, without the file's name."""

    def plan(content, *args) -> str:
        file = tmp_path / "grid.yaml"
        if isinstance(content, dict):
            content = yaml.safe_dump(content, sort_keys=False)
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        begun = time.process_time()  # other work on the machine does not count
        code = grid.main([str(file), "--plan", "--store", str(tmp_path / "store"), *args])
        seconds = time.process_time() - begun
        out, err = capsys.readouterr()
        assert (code, out) == (2, "")
        [line] = err.splitlines()
        assert line.startswith("error: ")
        assert line.isprintable()
        assert len(line) < 2000
        assert seconds < SECONDS
        assert not (tmp_path / "store").exists()
        return line.removeprefix(f"error: {file}: ")

    return plan
