import contextlib
import socket

import pytest
from support.plans import make
from support.tinygrid import grid

from ctp.storage.store import Store


@pytest.fixture
def graph(tmp_path, llama_folder):
    """The plan of a grid of ten cells."""
    return make(tmp_path / "g.yaml", **grid(llama_folder))


@pytest.fixture
def store(tmp_path):
    """An empty store."""
    return Store(str(tmp_path / "store"))


@pytest.fixture
def listening():
    """A port that takes connections, and how many it has been asked for until now."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)

        def asked():
            n = 0
            with contextlib.suppress(TimeoutError):
                while True:
                    server.accept()[0].close()
                    n += 1
            return n

        yield server.getsockname()[1], asked
