"""`ray up` on three machines: a head, two workers, one of them lost at work; and what nobody may do without the token.

The machines are namespaces (nodes.py) which share no home, no /tmp and no cache: only the store, on a server that
speaks S3. Run by `make test-cluster`; it takes some minutes and needs root, openssh-server, rsync and iproute2.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from nodes import ALONE

HERE = Path(__file__).parent
pytestmark = pytest.mark.cluster
CELLS = 4 + 4 + 4 * 5 * 2  # compressions, prompts, each of those and none on every model and text
NEEDED = ("sshd", "rsync", "ip", "ss", "curl", "unshare")


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    """(what happened, all that was typed and printed)."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    if missing := [n for n in NEEDED if not shutil.which(n, path=path)]:
        pytest.skip(f"not installed here: {', '.join(missing)} (openssh-server, rsync, iproute2, curl, util-linux)")
    if os.geteuid() != 0 or subprocess.run([*ALONE, "true"], capture_output=True, check=False).returncode:
        pytest.skip("namespaces are root's, and not allowed here")
    if missing := [n for n in ("moto", "boto3", "opencensus") if find_spec(n) is None]:
        pytest.skip(f"not installed: {', '.join(missing)}; `make test-cluster` does")
    folder = Path(os.environ.get("CTP_TRANSCRIPT") or tmp_path_factory.mktemp("cluster"))
    env = os.environ | {"PYTHONPATH": f"{HERE.parent}:{HERE}", "PATH": path}
    scene = [*ALONE, sys.executable, str(HERE / "scene.py"), str(folder)]
    done = subprocess.run(scene, env=env, stdin=subprocess.DEVNULL, timeout=1500, check=False)
    text = (folder / "transcript.txt").read_text()
    assert done.returncode == 0, text[-3000:]
    return json.loads((folder / "told.json").read_text()), text


def test_every_cell_is_done_though_a_machine_was_lost(played):
    told, text = played
    assert re.search(rf"demo: {CELLS} done in", text)
    assert "Job 'demo' succeeded" in told["status"]
    manifests = [p for p in told["store"] if p.endswith("/manifest.json")]
    assert len(manifests) == len({p.split("/")[-2] for p in manifests}) == CELLS
    assert not [p for p in told["store"] if "/partial/" in p or "/failed/" in p]


def test_the_lost_machine_is_gone(played):
    told, _ = played
    assert re.search(r"^ 2 local\.cluster\.node$", told["nodes"], re.M)  # the head, and the worker that is left


def test_the_prompts_it_learned_went_on_elsewhere(played):
    """From their saved states: the steps before them were not taken again."""
    told, _ = played
    lost, moved = told["lost"]["address"], 0
    for saves in told["saves"].values():
        before = [step for address, step in saves if address == lost]
        after = [step for address, step in saves if address != lost]
        if before and after:
            assert min(after) > max(before)
            moved += 1
    assert moved


def test_a_second_run_has_nothing_to_do(played):
    _, text = played
    assert "Nothing to run. Store: s3://ctp-test/study  MLflow: http://127.0.0.1:5000" in text


def test_nobody_gets_in_without_the_token(played):
    told, text = played
    assert "InvalidAuthToken" in told["stranger"]["status"]
    assert "Unauthorized" in told["stranger"]["agent"]
    assert "ConnectionError" in told["stranger"]["client"]
    assert len(re.findall(r"curl: \(7\) Failed to connect to 10\.77\.0\.2 port (?:8265|5000)", text)) == 2
    head = told["listening"]["head"]
    assert re.search(r" 127\.0\.0\.1:8265 ", head)
    assert re.search(r" 127\.0\.0\.1:5000 ", head)
    assert not re.search(r" (?:\*|0\.0\.0\.0|10\.77\.0\.2):(?:8265|5000) ", head)
