"""Pieces that need namespaces of their own: `alone.py PIECE FOLDER` plays one and prints JSON as its last line."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import yaml
from nodes import NET, bridge

TOKEN = "0123456789abcdef" * 2
SIMULATED = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
HEAD = "f" * 51 + "00000"  # the name that Ray's simulated machines give to the head
FAKE: dict[str, object] = {
    "cluster_name": "fake", "max_workers": 2, "upscaling_speed": 1.0, "idle_timeout_minutes": 0.2, "auth": {},
    "docker": {}, "file_mounts": {}, "cluster_synced_files": [], "file_mounts_sync_continuously": False,
    "initialization_commands": [], "setup_commands": [], "head_setup_commands": [], "worker_setup_commands": [],
    "head_start_ray_commands": [], "worker_start_ray_commands": [], "rsync_exclude": [], "rsync_filter": [],
}  # fmt: skip


def listening(folder: Path) -> dict[str, list[str]]:
    """What a grid's own Ray listens on, on a machine with a network: address of each socket, without its port."""
    os.environ["RAY_AUTH_TOKEN"] = TOKEN
    import ray

    from ctp.scheduling.cluster import join

    with join(None) as machines:
        ray.get(ray.remote(lambda: None).remote())
        lines = subprocess.run(["ss", "-Hltn"], capture_output=True, text=True, check=True).stdout.splitlines()
        slots = machines.slots({"CPU": 1})
    return {"listening": [line.split()[3].rpartition(":")[0] for line in lines], "slots": [str(slots)]}


def empty(folder: Path) -> dict[str, object]:
    """A grid on a cluster that has no worker yet: Ray's autoscaler starts two, and ends them when nothing is to do."""
    sorts = {"ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
             "cpu": {"resources": {"CPU": 2}, "node_config": {}, "min_workers": 0, "max_workers": 2}}  # fmt: skip
    config = Path(os.environ["HOME"], "ray_bootstrap_config.yaml")
    provider = {"type": "external", "module": SIMULATED, "launch_multiple": True, "head_node_id": HEAD}
    types = {"available_node_types": sorts, "head_node_type": "ray.head.default", "provider": provider}
    config.write_text(yaml.safe_dump(types | FAKE))
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
    own = {"AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_FAKE_CLUSTER": "1", "RAY_enable_autoscaler_v2": "1",
           "RAY_CLOUD_INSTANCE_ID": HEAD, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD}  # fmt: skip
    _ray(f"start --head --port=6379 --num-cpus=0 --include-dashboard=false --autoscaling-config={config}", **own)
    before = _nodes()
    command = [sys.executable, "-m", "ctp.grid", "demo", "--set", "models=tiny-llama", "--set", "recovery.0.steps=20",
               "--store", str(folder / "store"), "--device", "cpu"]  # fmt: skip
    with (folder / "log").open("w") as log:
        grid = subprocess.Popen([*command, "--address", f"{NET}.1:6379"], stdout=log, stderr=log)
    most = before
    while grid.poll() is None:
        most = max(most, _nodes())
        time.sleep(1)
    left, end = most, time.monotonic() + 120
    while left > 1 and time.monotonic() < end:
        time.sleep(2)
        left = _nodes()
    _ray("stop --force")
    return {"code": grid.returncode, "printed": (folder / "log").read_text(), "nodes": [before, most, left]}


def _ray(words: str, **env: str) -> str:
    """What a command of Ray prints. Raises RuntimeError with it where the command fails."""
    asked = subprocess.run(["ray", *words.split()], env=os.environ | env, capture_output=True, text=True, check=False)
    if asked.returncode:
        raise RuntimeError(f"ray {words}: {asked.stdout}{asked.stderr}")
    return asked.stdout


def _nodes() -> int:
    """How many machines the cluster has."""
    active = _ray("status").partition("Active:")[2].partition("Pending:")[0]
    return sum(int(n) for n in re.findall(r"^ (\d+) \S+", active, re.M))


def open_cluster(folder: Path) -> dict[str, object]:
    """A grid sent to a cluster that asks for no token, as `ray start --head` starts it."""
    _ray("start --head --port=6379 --num-cpus=1 --include-dashboard=false", RAY_AUTH_MODE="disabled")
    told = {}
    grid = [sys.executable, "-m", "ctp.grid", "demo", "--set", "models=tiny-llama", "--where", "kind=compress",
            "--where", "compression=dense", "--device", "cpu", "--store", str(folder / "store")]  # fmt: skip
    for name, more in (("refused", []), ("insecure", ["--insecure-ray"])):
        done = subprocess.run([*grid, "--address", "auto", *more], capture_output=True, text=True, check=False)
        told[name] = [done.returncode, done.stderr, done.stdout]
    _ray("stop --force")
    return told


if __name__ == "__main__":
    Path("/tmp/ray").mkdir(exist_ok=True)  # not that of this machine's own Ray: it names the cluster of `auto`
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", "/tmp/ray"], check=True)
    bridge()
    piece = {"listening": listening, "empty": empty, "open": open_cluster}[sys.argv[1]]
    print(json.dumps(piece(Path(sys.argv[2]))))
