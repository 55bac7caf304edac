"""A cluster with no worker yet, one that lets anyone in, what a grid's own Ray listens on; and cluster.yaml on AWS."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from nodes import ALONE
from support.onprem import FILE

HERE = Path(__file__).parent
pytestmark = pytest.mark.cluster


def play(piece, folder):
    """What a piece of alone.py tells. Its home is a new folder: it makes tokens, caches, configuration."""
    if os.geteuid() != 0 or subprocess.run([*ALONE, "true"], capture_output=True, check=False).returncode:
        pytest.skip("namespaces are root's, and not allowed here")
    own = {n: v for n, v in os.environ.items() if not n.startswith(("RAY_", "CTP_", "MLFLOW_"))}
    env = own | {"PYTHONPATH": f"{HERE.parents[1]}:{HERE}", "HOME": str(folder), "RAY_USAGE_STATS_ENABLED": "0",
                 "PATH": f"{Path(sys.executable).parent}:{own['PATH']}:/usr/sbin:/sbin"}  # fmt: skip
    command = [*ALONE, sys.executable, str(HERE / "alone.py"), piece, str(folder)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=580, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_grids_own_ray_listens_on_loopback_alone(tmp_path):
    told = play("listening", tmp_path)
    assert len(told["listening"]) >= 5  # GCS, raylet, agent, driver, worker
    assert {a.strip("[]").removeprefix("::ffff:") for a in told["listening"]} == {"127.0.0.1"}
    assert told["slots"] == [str(os.cpu_count())]


def test_workers_come_to_an_empty_cluster_and_go(tmp_path):
    told = play("empty", tmp_path)
    assert told["code"] == 0, told["printed"]
    assert "demo: 30 done" in told["printed"]
    assert told["nodes"] == [1, 3, 1]


def test_a_cluster_that_lets_anyone_in_is_refused(tmp_path):
    told = play("open", tmp_path)
    code, errors, _ = told["refused"]
    assert code == 2
    assert [line for line in errors.splitlines() if line.startswith("error: ")] == errors.splitlines()
    assert "10.77.0.1:6379 takes work from anyone who can reach it" in errors
    code, errors, printed = told["insecure"]
    assert (code, errors) == (0, "")
    assert "demo: 1 done" in printed


def test_aws_starts_head_and_worker(tmp_path, monkeypatch):
    """Ray's own AWS code with cluster.yaml, against moto instead of AWS: the machines are what the file says."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".ssh").mkdir()
    for name, value in {"ACCESS_KEY_ID": "x", "SECRET_ACCESS_KEY": "x", "DEFAULT_REGION": "us-west-2"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    moto, boto3 = pytest.importorskip("moto"), pytest.importorskip("boto3")
    with moto.mock_aws():
        iam = boto3.client("iam")
        for name in ("ctp-head", "ctp-worker"):
            iam.create_role(RoleName=name, AssumeRolePolicyDocument="{}")
            iam.create_instance_profile(InstanceProfileName=name)
            iam.add_role_to_instance_profile(InstanceProfileName=name, RoleName=name)
        from ray.autoscaler._private.aws.config import bootstrap_aws
        from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
        from ray.autoscaler._private.util import prepare_config

        config = bootstrap_aws(prepare_config(yaml.safe_load(FILE.read_text())))
        provider = AWSNodeProvider(config["provider"], config["cluster_name"])
        for name, sort in config["available_node_types"].items():
            tags = {"ray-node-name": name, "ray-node-type": "head" if name == "head" else "worker"}
            provider.create_node(sort["node_config"], tags, 1)
        ec2 = boto3.client("ec2")
        made = {i["InstanceType"]: i for r in ec2.describe_instances()["Reservations"] for i in r["Instances"]}
        (group,) = (g for g in ec2.describe_security_groups()["SecurityGroups"] if g["GroupName"] == "ctp")
    head, gpu = made["m6i.xlarge"], made["g6.2xlarge"]
    assert (head.get("InstanceLifecycle"), gpu["InstanceLifecycle"]) == (None, "spot")
    assert head["IamInstanceProfile"]["Arn"].endswith("/ctp-head")
    assert gpu["IamInstanceProfile"]["Arn"].endswith("/ctp-worker")
    assert {i["MetadataOptions"]["HttpTokens"] for i in made.values()} == {"required"}
    assert {i["SecurityGroups"][0]["GroupId"] for i in made.values()} == {group["GroupId"]}
    outside = [(p["FromPort"], p["ToPort"]) for p in group["IpPermissions"] if p["IpRanges"]]
    assert outside == [(22, 22)]
