"""The pages of MLflow and Ray, named only where they answer, or the command that opens one."""

import platform
import shlex
import socket
import time
from functools import lru_cache
from urllib.parse import urlsplit

from ctp.common.redact import scrub

PATIENCE = 0.3  # seconds until a page counts as down
FRESH = 10.0  # seconds for which an answer is kept: a live view asks twice a second
PORTS = {"http": 80, "https": 443}


def where(name: str, uri: str, machine: str = "") -> str:
    """One line, without secrets; "" where there is no URI.

    name: "MLflow" or "Ray". uri: a page, or MLflow's database. machine: that reports it (default: this one); pages on
    its loopback are not asked from here.
    """
    elsewhere = machine if machine and machine != platform.node() else ""
    place = _place(uri)
    if place is None:
        opens = "" if not uri or uri.startswith("databricks") else "mlflow ui --backend-store-uri "
        command = opens + (shlex.quote(scrub(uri)) if opens else scrub(uri))
        return f"{name}: {command}{f'  (on {elsewhere})' if elsewhere else ''}" if uri else ""
    if elsewhere and (place[0] == "localhost" or place[0].startswith("127.") or place[0] == "::1"):
        return f"{name}: port {place[1]} of {elsewhere}, open there alone"
    return f"{name}: {scrub(uri)}" if answers(*place) else f"{name}: no answer from {place[0]}, port {place[1]}"


def answers(host: str, port: int) -> bool:
    """Whether something takes connections there; asked again after FRESH seconds."""
    return _connects(host, port, int(time.monotonic() // FRESH))


@lru_cache(maxsize=16)
def _connects(host: str, port: int, now: int) -> bool:
    try:
        socket.create_connection((host, port), PATIENCE).close()
    except (OSError, UnicodeError):
        return False
    return True


def _place(uri: str) -> tuple[str, int] | None:
    """Host and port of a page; None where it is none."""
    try:
        parts = urlsplit(uri)
        port = parts.port or PORTS.get(parts.scheme, 0)
    except ValueError:  # no number, or no address
        return None
    return (parts.hostname, port) if parts.scheme in PORTS and parts.hostname else None
