"""Does the invocation that opened an MLflow run still run? Its run's tags name its process and its last sign of life.

On the same machine the process itself is looked up; of another machine only the last sign of life is known.
"""

import os
import socket
import time
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

OWNER, BEAT = "ctp.owner", "ctp.alive"  # tags: machine, process and its start; seconds since 1970
BEAT_SECONDS = 60.0
DEAD_SECONDS = 600.0  # of silence on another machine; more than clocks differ by, and than a server is restarted in


def signs() -> dict[str, str]:
    """Tags by which others tell whether this process lives."""
    return {OWNER: f"{_machine()} {os.getpid()} {_started(os.getpid())}", BEAT: str(int(time.time()))}


def is_alive(tags: Mapping[str, str], started: float) -> bool:
    """Does the process live that gave its run these tags? started: of the run, seconds since 1970."""
    machine, _, process = tags.get(OWNER, "").partition(" ")
    pid, _, start = process.partition(" ")
    if machine == _machine() and start:
        return _started(int(pid)) == start
    return time.time() - last_sign(tags, started) < DEAD_SECONDS


def last_sign(tags: Mapping[str, str], started: float) -> float:
    """When a run's process was last known to live, in seconds since 1970."""
    return max(started, float(tags.get(BEAT, 0)))


@lru_cache
def _machine() -> str:
    """Host, this boot of it, and the namespace that process ids are of; elsewhere than on Linux a random text."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()}/{boot}/{Path('/proc/self/ns/pid').readlink().name}"
    except OSError:  # no Linux: signs of life alone
        return f"{socket.gethostname()}/{os.urandom(8).hex()}"


def _started(pid: int) -> str:
    """When the process started, in ticks since boot; empty where there is none, or only its exit code is left.

    Not from psutil, which gives seconds of a clock that can be set meanwhile: two readings must be equal.
    """
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if state in "ZX" else rest[18]
