"""cluster.yaml, without a cluster: does Ray take it, does AWS, and is what it promises in it?"""

import copy
import re
from functools import lru_cache
from importlib.metadata import requires
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from support.onprem import FILE, on_premises

ROOT = FILE.parent
LOCKS = ("requirements.lock", "requirements-cluster.lock")


@pytest.fixture
def aws():
    return yaml.safe_load(FILE.read_text())


@pytest.fixture
def own():
    return yaml.safe_load(on_premises("10.0.0.1", ["10.0.0.2", "10.0.0.3"], "me", "~/.ssh/id"))


def taken_by_ray(config):
    """The configuration as `ray up` goes on with it."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    return prepared


@lru_cache
def run_instances():
    """What EC2's RunInstances takes, as botocore describes it."""
    import botocore.session

    session = botocore.session.get_session()
    model = session.get_component("data_loader").load_service_model("ec2", "service-2")
    from botocore.model import ServiceModel

    return ServiceModel(model).operation_model("RunInstances").input_shape


def ec2_says(node_config):
    from botocore.validate import ParamValidator

    asked = {**node_config, "MinCount": 1, "MaxCount": 1}
    return ParamValidator().validate(asked, run_instances()).generate_report()


def test_ray_takes_it(aws):
    prepared = taken_by_ray(aws)
    assert prepared["available_node_types"]["gpu"]["max_workers"] == aws["max_workers"]


@pytest.mark.parametrize(
    ("path", "value"),
    [(("max_workers",), "many"), (("auth", "key"), "x"), (("available_node_types", "gpu", "min_workers"), 9)],
)
def test_ray_would_not_take_a_mistake(aws, path, value):
    part = aws
    for name in path[:-1]:
        part = part[name]
    part[path[-1]] = value
    with pytest.raises(Exception, match=r"many|key|max_workers"):
        taken_by_ray(aws)


def test_ec2_takes_its_machines(aws):
    for sort in aws["available_node_types"].values():
        assert ec2_says(sort["node_config"]) == ""
    assert "Spot" in ec2_says({"InstanceMarketOptions": {"MarketType": "spot", "Spot": {}}})


def test_workers_come_from_nothing_and_go(aws):
    gpu, head = aws["available_node_types"]["gpu"], aws["available_node_types"]["head"]
    assert (gpu["min_workers"], gpu["resources"]["GPU"]) == (0, 1)
    assert gpu["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot"
    assert head["resources"] == {"CPU": 0}
    assert 0 < aws["idle_timeout_minutes"] <= 15
    assert aws["provider"]["cache_stopped_nodes"] is False


def test_own_machines_get_the_same(aws, own):
    prepared = taken_by_ray(own)
    (sort,) = prepared["available_node_types"].values()
    assert (sort["min_workers"], sort["max_workers"]) == (2, 2)
    assert own["provider"] == {"type": "local", "head_ip": "10.0.0.1", "worker_ips": ["10.0.0.2", "10.0.0.3"]}
    assert own["auth"] == {"ssh_user": "me", "ssh_private_key": "~/.ssh/id"}
    apart = {"provider", "auth", "available_node_types", "head_node_type"}
    assert {n: v for n, v in own.items() if n not in apart} == {n: v for n, v in aws.items() if n not in apart}


def test_nobody_is_let_in(aws):
    starts = [c for kind in ("head", "worker") for c in aws[f"{kind}_start_ray_commands"] if "ray start" in c]
    assert len(starts) == 2
    assert any("RAY_AUTH_MODE=token" in c and c.endswith("> ~/ctp.env") for c in aws["setup_commands"])
    assert any(c.endswith("echo '. ~/ctp.env' >> ~/.bashrc") for c in aws["setup_commands"])  # Ray's shells read it
    assert "chmod 600 ~/.ray/auth_token" in aws["setup_commands"]
    assert aws["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    hosts = [h for c in aws["head_start_ray_commands"] for h in re.findall(r"--(?:dashboard-)?host[= ](\S+)", c)]
    assert hosts == ["127.0.0.1", "127.0.0.1"]  # Ray's dashboard and MLflow


def test_what_is_copied_is_there(aws):
    for there, here in aws["file_mounts"].items():
        assert there == here or (ROOT / here).exists()
    import hatchling.metadata.core as core  # what pip reads of the project must be among it

    project = core.ProjectMetadata(str(ROOT), None).core
    wanted = {project.readme_path, "pyproject.toml", *LOCKS, "ctp"}
    assert wanted <= {Path(here).name for here in aws["file_mounts"].values()}


def test_the_locks_hold_all_that_rays_jobs_and_autoscaler_need():
    first, second = ({n.lower().replace("_", "-"): v for n, v in re.findall(r"(?m)^([\w.-]+)==(\S+)", text)}
                     for text in ((ROOT / n).read_text() for n in LOCKS))  # fmt: skip
    assert not first.keys() & second.keys()
    both = first | second
    for needed in map(Requirement, requires("ray") or []):
        if needed.marker is None or needed.marker.evaluate({"extra": "default"}):
            assert needed.specifier.contains(both[needed.name.lower().replace("_", "-")]), str(needed)
    assert both["boto3"] == both["botocore"]  # they are released together
