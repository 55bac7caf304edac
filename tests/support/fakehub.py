"""A hub on this machine: the routes that huggingface_hub asks, over repositories that are folders."""

import hashlib
import json
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "c" * 40


@dataclass
class FakeHub:
    """repos: id -> folder. gated, cut: ids whose licence is not accepted, whose downloads break off. asked: paths."""

    repos: dict[str, Path] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    cut: set[str] = field(default_factory=set)
    asked: list[str] = field(default_factory=list)
    token_refused: bool = False
    url: str = ""


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def send(self, code, content=b"", body=True, **headers):
        self.send_response(code)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def answer(self, body):
        path = unquote(urlsplit(self.path).path).lstrip("/")
        self.hub.asked.append(path)
        kind, _, rest = path.partition("/")
        rest = rest.partition("/")[2] if kind == "api" else path
        name = "/".join(rest.split("/")[:2])
        rest = rest.removeprefix(name).lstrip("/")
        if self.hub.token_refused:
            self.send(401, X_Error_Message="Invalid credentials in Authorization header")
        elif name not in self.hub.repos:
            self.send(401, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
        elif kind == "api" and (not rest or rest.startswith("revision/")):
            self.info(rest.removeprefix("revision/"))
        elif name in self.hub.gated:  # a gated repository tells its commits, not its files
            self.send(403, X_Error_Code="GatedRepo", X_Error_Message=f"Access to {name} is restricted")
        elif kind == "api" and rest.startswith("tree/"):
            self.tree(self.hub.repos[name])
        elif kind == "api":
            self.send(200)  # auth-check
        else:
            self.file(self.hub.repos[name] / rest.split("/", 2)[2], name, body)

    def info(self, revision):
        if revision in ("", "main", COMMIT):
            self.send(200, json.dumps({"id": "x/y", "sha": COMMIT}).encode(), Content_Type="application/json")
        else:
            self.send(404, X_Error_Code="RevisionNotFound", X_Error_Message="Invalid rev id")

    def tree(self, folder):
        files = [
            {"type": "file", "path": str(f.relative_to(folder)), "size": f.stat().st_size, "oid": _digest(f)[:40]}
            for f in sorted(folder.rglob("*"))
            if f.is_file()
        ]
        self.send(200, json.dumps(files).encode(), Content_Type="application/json")

    def file(self, path, name, body):
        if not path.is_file():
            self.send(404, X_Error_Code="EntryNotFound", X_Error_Message="no such file")
            return
        headers = {"X_Repo_Commit": COMMIT, "ETag": f'"{_digest(path)[:40]}"'}
        if name in self.hub.cut and body and path.suffix not in (".json", ".txt"):
            self.send(503)  # the hub goes away in the middle of a repository
            return
        self.send(200, path.read_bytes(), body, **headers)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@contextmanager
def serving():
    """A FakeHub that answers until the end of the block."""
    hub = FakeHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
