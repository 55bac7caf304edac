"""The Ray cluster that a grid runs on: one on this machine, which listens on loopback alone, or one at an address,
which asks for a token. Only this module and `ctp.scheduling.tune` import Ray.
"""

import contextlib
import ipaddress
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import ray
import yaml
from ray._private import ray_constants, services, worker
from ray._raylet import Config  # type: ignore[attr-defined]

from ctp.common.exit_codes import Exit
from ctp.machine import signals
from ctp.planning.resources import Fleet, fleet
from ctp.storage.drivers import About

TOKEN = Path("~/.ray/auth_token")
CONFIG = Path("~/ray_bootstrap_config.yaml")  # where `ray up` puts the cluster's configuration on the head
HEARD_SECONDS = 10.0  # until the death of a process of Ray's is signalled again
NEEDED = {"raylet": "raylet", "gcs_server": "GCS"}  # of Ray's processes: what they are called
WORKERS_SECONDS = 600.0  # `ray up` starts local machines one by one, by ssh
INSECURE = (
    "the Ray cluster at {} takes work from anyone who can reach it: it asks for no token. `ray get-auth-token "
    "--generate` makes one; copy ~/.ray/auth_token to every node and start them with RAY_AUTH_MODE=token "
    "(cluster.yaml does), or say --insecure-ray"
)
# Does the cluster answer one who shows no token? Exit code 0: yes; 3: it asks for one.
ASK = """
import sys
from ray._raylet import GcsClient
from ray.exceptions import AuthenticationError
try:
    GcsClient(address=sys.argv[1]).internal_kv_keys(b"", None, 10)
except AuthenticationError:
    sys.exit(3)
"""


class ResourceError(Exception):
    """No cluster is at the address, it lets anyone in, or a cell needs more than any of its machines has."""


@contextmanager
def join(address: str | None, insecure: bool = False, last: Callable[[], object] = lambda: None) -> Iterator[Fleet]:
    """The cluster at `address`, or a new one on this machine; yields its machines. Nested calls join the same one.

    insecure: the cluster need not ask for a token. last: as in `watched`. Raises ResourceError.
    """
    find = machines if address else lambda: fleet(_alive())
    if ray.is_initialized():
        yield find()
        return
    for name in ("ray", "ray.tune", "ray.train"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        with signals.terminable():  # Ray installs its own handler; this restores ours
            _connect(address, insecure)
    except (OSError, RuntimeError, ValueError, ray.exceptions.AuthenticationError) as e:
        raise ResourceError(f"no Ray cluster at {address or 'this machine'}: {type(e).__name__}: {e}") from e
    lost = False
    try:
        with contextlib.nullcontext() if address else watched(last=last):
            yield find()
    except signals.RayLost:
        lost = True  # shutting down would wait for dead processes; the others end with this one
        raise
    finally:
        if not lost:
            ray.shutdown()


@contextmanager
def watched(every: float = 0.5, last: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Raises RayLost in the main thread once one of this machine's Ray processes dies that a run needs. By itself Ray
    would wait for a minute, and then end the driver without a message.

    every: seconds between two checks. last: called from another thread before the process ends, where the main thread
    hangs in a call to the dead process.
    """
    over, message = threading.Event(), ""

    def hear(number: int, frame: FrameType | None) -> None:
        if not over.is_set():
            raise signals.RayLost(message)

    def check() -> None:
        nonlocal message
        while not (message := _dead()):
            if over.wait(every):
                return
        if not _interrupted(over):
            os.write(2, f"error: {message}\n".encode())
            with contextlib.suppress(Exception):
                last()
            os._exit(Exit.RAY_LOST)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGUSR2, hear)
    thread = threading.Thread(target=check, name="ray-watch", daemon=True)
    try:
        thread.start()  # in here: the first signal may come before this returns
        yield
    except BaseException as e:  # from within Ray's compiled code it comes as a SystemError
        if message:
            raise signals.RayLost(message) from e
        raise
    finally:
        over.set()
        thread.join(timeout=5)
        signal.signal(signal.SIGUSR2, before)


def _interrupted(over: threading.Event) -> bool:
    """Signal the main thread until `over` is set: someone may catch what it raises, or it may be cleaning up."""
    for _ in range(3):
        # To the main thread itself: taken late by another thread, it would find no handler and end the process.
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR2)
        if over.wait(HEARD_SECONDS):
            return True
    return False


def _dead() -> str:
    """Which needed process of Ray's has died, and how; empty while all live."""
    node = worker._global_node
    for name, what in NEEDED.items():
        for info in node.all_processes.get(name, ()) if node else ():
            if (code := info.process.poll()) is not None:
                how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
                return (f"Ray ended: its {what} on this machine died ({how}; out of memory, or somebody ended it). "
                        "What is done is in the store: the same command goes on from there")  # fmt: skip
    return ""


def _connect(address: str | None, insecure: bool) -> None:
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.CRITICAL}
    worker.print_to_stdstream = lambda *_, **__: None  # raylets' reports would be printed between a grid's lines
    if address:
        _knock(address)
        authenticate(address, insecure)
        ray.init(address=address, **quiet)
    else:
        with _loopback():
            ray.init(address="local", include_dashboard=False, object_store_memory=256 * 2**20, **quiet)


def _knock(address: str) -> None:
    """Raises OSError where nobody listens: Ray itself would try for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


@contextmanager
def _loopback() -> Iterator[None]:
    """Inside, Ray's new processes bind 127.0.0.1 alone. On Linux they would bind every interface."""
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def _show_token() -> None:
    """Have Ray show this machine's token: by itself it shows it only to clusters that it starts."""
    if _has_token() and "RAY_AUTH_MODE" not in os.environ:
        os.environ["RAY_AUTH_MODE"] = "token"
        Config.initialize("")  # Ray read its environment when it was imported


def _has_token() -> bool:
    """Is there a token where Ray looks for it?"""
    given = any(os.environ.get(name) for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))
    return given or TOKEN.expanduser().is_file()


def authenticate(address: str, insecure: bool) -> None:
    """Show the cluster this machine's token if it asks for one (otherwise this process would refuse the calls of the
    cluster's machines). Of ray://… only whether a token is shown can be known here.

    Raises ResourceError where, unless `insecure`, a cluster that other machines can reach asks for no token, or there
    is none here.
    """
    if address.startswith("ray://"):
        place = address.removeprefix("ray://")
        _show_token()
        near, asks = _is_loopback(place), os.environ.get("RAY_AUTH_MODE") == "token"
    else:
        place = services.canonicalize_bootstrap_address(address) or ""
        near = _is_loopback(place)
        asks = (_has_token() or not (near or insecure)) and _asks(place)
        if asks:
            _show_token()
    if insecure or near:
        return
    if not asks:
        raise ResourceError(INSECURE.format(place))
    if not _has_token():
        raise ResourceError(f"the Ray cluster at {place} asks for a token, and there is none: copy the cluster's "
                            f"{TOKEN} here, or set RAY_AUTH_TOKEN")  # fmt: skip


def _is_loopback(place: str) -> bool:
    """Is this host:port on this machine's loopback?"""
    host = place.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _asks(place: str) -> bool:
    """Does the cluster refuse callers without a token? Raises OSError where it does not answer."""
    env = {n: v for n, v in os.environ.items() if not n.startswith("RAY_AUTH")} | {"RAY_AUTH_MODE": "disabled"}
    command = [sys.executable, "-c", ASK, place]
    asked = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
    if asked.returncode not in (0, 3):
        raise OSError(asked.stderr.strip().rpartition("\n")[2] or "no answer")
    return asked.returncode == 3


def machines() -> Fleet:
    """The machines of the joined cluster, with those that its autoscaler may start. Waits for the first worker where
    none runs trials yet.
    """
    config, end = _config(), time.monotonic() + WORKERS_SECONDS
    found = fleet(_alive(), config)
    coming = int((config or {}).get("max_workers", 0)) > 0
    if coming and not found.fits({"CPU": 1}):
        print("waiting for the cluster's first worker", flush=True)
        while time.monotonic() < end and not found.fits({"CPU": 1}):
            time.sleep(2)
            found = fleet(_alive(), config)
    return found


def _alive() -> list[dict[str, float]]:
    return [n["Resources"] for n in ray.nodes() if n["Alive"]]


def describe(about: About) -> None:
    """Fill in the joined cluster as it is now."""
    there, page = _alive(), worker.get_dashboard_url()
    about.machines, about.ray = len(there), f"http://{page}" if page else ""
    about.cpus, about.gpus = (sum(m.get(resource, 0) for m in there) for resource in ("CPU", "GPU"))


def _config() -> dict[str, Any] | None:
    """The configuration of the cluster's autoscaler: known on the head, where `ray up` leaves it and jobs run."""
    path = CONFIG.expanduser()
    heads = [n["NodeManagerAddress"] for n in ray.nodes() if "node:__internal_head__" in n["Resources"]]
    with contextlib.suppress(OSError, yaml.YAMLError):
        if ray.util.get_node_ip_address() in heads and path.is_file():
            config = yaml.safe_load(path.read_text())
            return config if isinstance(config, dict) else None
    return None
