"""An S3 server of this process (moto), and in front of it what may answer first: errors, silence, lost answers."""

import threading
import time
from collections.abc import Callable
from contextlib import contextmanager

from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server


class Quiet(WSGIRequestHandler):
    def log_request(self, *args: object) -> None:
        """Not a line for each."""


class Server:
    """`url` is its endpoint. `faults`: each says of a request (method, path, query) what is to happen instead."""

    def __init__(self) -> None:
        self.app = DomainDispatcherApplication(create_backend_app)
        self.server = make_server("127.0.0.1", 0, self._answer, threaded=True, request_handler=Quiet)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.faults: list[Callable[[str, str], object]] = []
        self.requests: list[tuple[str, str]] = []
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def _answer(self, environ, start_response):
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        self.requests.append((method, path))
        for fault in list(self.faults):
            what = fault(method, path)
            if what == "silence":
                time.sleep(30)
            if isinstance(what, int):
                start_response(f"{what} Not now", [("Content-Type", "text/plain"), ("Content-Length", "0")])
                return [b""]
            if what == "lost":  # it was done, but nobody is told
                b"".join(self.app(environ, lambda *a, **k: None))
                start_response("503 Lost", [("Content-Length", "0")])
                return [b""]
        return self.app(environ, start_response)

    @contextmanager
    def fault(self, what: object, times: float = float("inf"), method: str = "", path: str = ""):
        """The first so many requests with that method and part of a path are answered so."""
        left = [times]

        def happens(m: str, p: str) -> object:
            if left[0] > 0 and method in m and path in p:
                left[0] -= 1
                return what
            return None

        self.faults.append(happens)
        try:
            yield
        finally:
            self.faults.remove(happens)

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()
