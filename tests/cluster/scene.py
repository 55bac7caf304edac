"""A cluster from `ray up` to `ray down`, with a machine lost between; writes what happened to FOLDER.

`ray up` and `ray down` kill every Ray process they can see: this runs in namespaces of its own (see test_ray_up.py).
"""

import json
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from nodes import NET, Node, bridge, key_pair
from support.onprem import on_premises

ROOT = Path(__file__).parents[2]
S3 = f"http://{NET}.1:5555"
STORE = "s3://ctp-test/study"
KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_ENDPOINT_URL": S3,
        "AWS_DEFAULT_REGION": "us-east-1"}  # fmt: skip
STYLE = "--log-style pretty --log-color false"
JOB = ("python -m ctp.grid demo --set models=tiny-llama --set recovery.0.k=[8,16] --set recovery.0.steps=400 "
       "--checkpoint-seconds 2 --device cpu")  # fmt: skip


class Scene:
    """The user's machine: its home, its copy of cluster.yaml, and all it typed and saw."""

    def __init__(self, base: Path) -> None:
        self.base, self.told = base, dict[str, Any]()
        self.home, self.checkout = base / "laptop", base / "checkout"
        ignored = shutil.ignore_patterns(".*", "results", "__pycache__", "tests", "benchmarks")
        shutil.copytree(ROOT, self.checkout, ignore=ignored)
        (self.home / ".ray").mkdir(parents=True)
        self.env = {n: v for n, v in os.environ.items() if not n.startswith(("RAY_", "CTP_", "MLFLOW_"))}
        self.env |= {"HOME": str(self.home), "RAY_TMPDIR": str(self.home / "tmp"), "RAY_UP_enable_autoscaler_v2": "0",
                     "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "RAY_USAGE_STATS_ENABLED": "0",
                     "NO_COLOR": "1", **KEYS}  # fmt: skip
        (self.home / "tmp").mkdir()

    def run(self, command: str, code: int | None = 0, timeout: float = 300) -> str:
        """What a command prints; both go into the transcript. Raises RuntimeError unless it exits with `code`."""
        begun = time.monotonic()
        self.tell(f"$ {command}")
        done = subprocess.run(command, shell=True, cwd=self.checkout, env=self.env, text=True, timeout=timeout,
                              stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
        text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "", done.stdout)
        self.tell(f"{text.rstrip()}\n[{time.monotonic() - begun:.0f} s, exit code {done.returncode}]\n")
        if code is not None and done.returncode != code:
            raise RuntimeError(f"{command}: exit code {done.returncode}, not {code}")
        return text

    def tell(self, line: str) -> None:
        with (self.base / "transcript.txt").open("a") as f:
            print(line, file=f, flush=True)

    def on_head(self, command: str, **how: Any) -> str:
        """The same on the cluster's head."""
        return self.run(f"ray exec {STYLE} cluster.yaml {shlex.quote(command)}", **how)

    def write_cluster_yaml(self, nodes: list[Node], env: Path, also: Path) -> None:
        """The file of the repository, on premises, with this store; packages are there instead of installed."""
        head, *workers = (n.address for n in nodes)
        text = on_premises(head, workers, "root", str(self.home / "key"))
        text = text.replace("s3://CHANGE-ME/ctp", " ".join([STORE, *(f"{n}={v}" for n, v in KEYS.items())]))
        # Instead of an hour of pip on three machines that share one disk: the environment that runs this test.
        begin, end = text.index("  # torch first"), text.index("\n# Ray's dashboard")
        there = f"ln -sfn {env} ~/ctp-env && echo 'export PYTHONPATH=$HOME/ctp PATH=$PATH:{also}' >> ~/ctp.env"
        (self.checkout / "cluster.yaml").write_text(text[:begin] + f"  - {there}\n" + text[end:])

    def s3(self) -> Any:
        """The store's bucket, listed anew at every call."""
        import fsspec

        return fsspec.filesystem("s3", endpoint_url=S3, key="test", secret="test", use_listings_cache=False,
                                 skip_instance_cache=True)  # fmt: skip

    def wait(self, what: str, ready: Any, seconds: float) -> Any:
        """Until ready() is true. Raises TimeoutError."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if found := ready():
                return found
            time.sleep(1)
        raise TimeoutError(f"{what}: not within {seconds:.0f} s")


def play(scene: Scene) -> None:
    """The whole piece."""
    env = Path(sys.prefix)
    mlflow = find_spec("mlflow")
    assert mlflow is not None
    assert mlflow.origin is not None
    also = Path(mlflow.origin).parents[4]
    bridge()
    serve_s3(scene.base / "s3.log")
    public = key_pair(scene.home / "key")
    keep = list(dict.fromkeys([env, also, Path(sys.base_prefix)]))
    nodes = [Node(i + 2, n, scene.base, public, keep, [ROOT]) for i, n in enumerate(("head", "worker1", "worker2"))]
    scene.write_cluster_yaml(nodes, env, also / "bin")
    scene.wait("S3", lambda: make_bucket(scene), 60)
    scene.run("ray get-auth-token --generate > /dev/null")
    scene.run(f"ray up -y {STYLE} cluster.yaml", timeout=400)
    guarded(scene, nodes)
    scene.on_head(f"ray job submit --no-wait --submission-id demo -- {JOB}")
    lost = lose_one(scene, nodes[1:])
    scene.on_head("ray status")
    scene.on_head("ray job logs --follow demo", timeout=500)
    scene.told["status"] = scene.on_head("ray job status demo")
    scene.told["nodes"] = scene.wait("the lost machine is off the list", lambda: _listed(scene), 180)
    scene.on_head("python -m analysis.transfer_matrix demo --dataset newswire")
    scene.on_head(JOB)
    scene.told["copies"] = {n.name: scene.run(ssh(scene, n, "ls ~/.cache/ctp/artifacts | wc -l"))
                            for n in nodes if n is not lost and n is not nodes[0]}  # fmt: skip
    scene.run(f"ray down -y {STYLE} cluster.yaml", timeout=400)
    left = [n for n in nodes if n is not lost]
    scene.wait("nothing of Ray runs", lambda: not any(_ray(n) for n in left), 180)
    scene.told["store"] = sorted(p for p in scene.s3().find("ctp-test/study"))
    scene.told["saves"] = _saves((scene.base / "s3.log").read_text())


def _listed(scene: Scene) -> str | None:
    """What `ray status` says, once it counts the head and one worker: the autoscaler looks again every few seconds."""
    said: str = scene.on_head("ray status")
    return said if re.search(r"^ 2 local\.cluster\.node$", said, re.M) else None


def _saves(log: str) -> dict[str, list[tuple[str, int]]]:
    """Of every prompt: which machine saved its state, and as of which step, by the log of the S3 server."""
    found: dict[str, list[tuple[str, int]]] = {}
    for address, prompt, step in re.findall(r'(?m)^(\S+) .*"PUT /\S+/partial/(\S+)/step-(\d+)/manifest\.json', log):
        found.setdefault(prompt, []).append((address, int(step)))
    return found


def serve_s3(log: Path) -> None:
    """A store that speaks S3, for all machines; every request is a line of the log."""
    from moto.server import ThreadedMotoServer

    logger = logging.getLogger("werkzeug")
    logger.setLevel(logging.INFO)
    logger.addHandler(logging.FileHandler(log))
    logger.propagate = False
    ThreadedMotoServer(ip_address="0.0.0.0", port=5555, verbose=False).start()


def make_bucket(scene: Scene) -> bool:
    try:
        scene.s3().mkdir("ctp-test")
    except Exception:  # not up yet
        return False
    return True


def ssh(scene: Scene, node: Node, command: str) -> str:
    quiet = "-o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR"
    return f"ssh -i {scene.home / 'key'} {quiet} root@{node.address} {shlex.quote(command)}"


def _ray(node: Node) -> list[str]:
    return [line for line in node.processes() if re.search(r"raylet|gcs_server|ray::", line)]


def guarded(scene: Scene, nodes: list[Node]) -> None:
    """What someone on the same network gets without the token, and what listens where."""
    head = nodes[0].address
    for port in (8265, 5000):
        scene.run(f"curl -sS -m 5 http://{head}:{port}", code=7)
    asked = {
        "status": f"RAY_AUTH_MODE=disabled ray status --address {head}:6379 2>&1 | tail -1",
        "client": f"RAY_AUTH_MODE=disabled python -c 'import ray; ray.init(\"ray://{head}:10001\")' 2>&1 | tail -1",
        "agent": f'curl -sS -m 5 -d \'{{"entrypoint": "id"}}\' http://{head}:52365/api/job_agent/jobs/',
        "metrics": f"curl -sS -m 5 http://{head}:44217/metrics | head -3",
    }
    scene.told["stranger"] = {name: scene.run(command, code=None) for name, command in asked.items()}
    scene.told["listening"] = {n.name: scene.run(ssh(scene, n, "ss -Hltnp")) for n in nodes}


def lose_one(scene: Scene, workers: list[Node]) -> Node:
    """A worker disappears while it learns a prompt of which it has saved some states."""
    lost: Node = scene.wait("a prompt that is being learned", lambda: _learning(scene, workers), 600)
    scene.told["lost"] = {"name": lost.name, "address": lost.address}
    scene.tell(f"# {lost.name} ({lost.address}) is lost here.\n")
    lost.lose()
    return lost


def _learning(scene: Scene, workers: list[Node]) -> Node | None:
    """The worker that has just saved the third or a later state of a prompt, of which half at most is learned."""
    for saves in _saves((scene.base / "s3.log").read_text()).values():
        for node in workers:
            steps = [step for address, step in saves if address == node.address]
            if len(steps) >= 3 and steps[-1] <= 200:
                return node
    return None


def main(folder: str) -> None:
    scene = Scene(Path(folder))
    try:
        play(scene)
    except BaseException as e:
        scene.told["error"] = f"{type(e).__name__}: {e}"
        scene.on_head("ray job logs demo | tail -n 30; ray status", code=None)
        raise
    finally:
        (scene.base / "told.json").write_text(json.dumps(scene.told, indent=1))


if __name__ == "__main__":
    main(sys.argv[1])
