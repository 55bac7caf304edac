"""The machines that a grid may reckon with, and the clusters it refuses; nothing of Ray runs."""

import subprocess
import sys

import pytest
from mlflow.tracking import MlflowClient
from support.plans import make
from support.tinygrid import grid, write_grid

from ctp import grid as cli
from ctp.planning.resources import Fleet, Machine, bundles, fleet
from ctp.planning.resources import Resources as Each
from ctp.scheduling import cluster
from ctp.scheduling.cluster import ResourceError, authenticate

HEAD = {"CPU": 0, "memory": 1e10, "node:__internal_head__": 1}
GPU = {"CPU": 8, "GPU": 1}


def autoscaling(most=8, **sorts):
    return {"max_workers": most, "available_node_types": sorts}


def test_an_empty_cluster_has_the_machines_that_may_come():
    config = autoscaling(8, head={"resources": {"CPU": 0}, "max_workers": 0}, gpu={"resources": GPU, "max_workers": 6})
    machines = fleet([HEAD], config)
    assert machines.gpus
    assert machines.fits({"CPU": 1, "GPU": 1})
    assert not machines.fits({"CPU": 1, "GPU": 2})
    assert machines.cores(1) == 8
    assert machines.slots({"CPU": 1, "GPU": 0.25}) == 24
    assert not fleet([HEAD]).fits({"CPU": 1})


def test_machines_that_came_are_not_counted_twice():
    config = autoscaling(8, gpu={"resources": GPU, "max_workers": 6})
    assert fleet([HEAD, GPU, GPU], config).slots({"CPU": 1, "GPU": 1}) == 6
    assert fleet([HEAD, *[GPU] * 7], config).slots({"CPU": 1, "GPU": 1}) == 7


def test_all_sorts_together_obey_the_clusters_limit():
    config = autoscaling(3, gpu={"resources": GPU, "max_workers": 6}, none={"resources": {"CPU": 4}, "max_workers": 0})
    assert fleet([HEAD], config).slots({"CPU": 4}) == 3 * 2
    assert fleet([HEAD], autoscaling(3, gpu={"resources": GPU})).slots({"CPU": 8}) == 3


def test_own_machines_are_like_the_smallest_that_is_there():
    own = autoscaling(4, **{"local.cluster.node": {"resources": {}, "max_workers": 4}})
    assert not fleet([HEAD], own).fits({"CPU": 1})
    assert fleet([HEAD, {"CPU": 16}, {"CPU": 2}], own).slots({"CPU": 1}) == 18
    assert fleet([HEAD, {"CPU": 2}], own).slots({"CPU": 1}) == 8


def test_a_bundle_is_given_by_one_machine():
    machines = Fleet([Machine({"CPU": 3}), Machine({"CPU": 3})])
    assert machines.slots({"CPU": 2}) == 2
    assert not machines.fits({"CPU": 4})
    assert Fleet([Machine({"CPU": 4, "GPU": 1})]).slots({"CPU": 1, "GPU": 0}) == 4


def test_what_runs_alone_takes_a_whole_machine_that_may_come(tmp_path, llama_folder):
    config = autoscaling(2, gpu={"resources": GPU, "max_workers": 2})
    plan = make(
        tmp_path / "g.yaml", **grid(llama_folder, measures=[{"method": "latency", "seq_len": 8, "new_tokens": 8}])
    )
    machines = fleet([HEAD], config)
    sizes = bundles(plan, Each(), True, 4, machines.cores(1)).values()
    assert {"CPU": 8, "GPU": 1.0} in sizes
    assert all(machines.fits(size) for size in sizes)


# ------------------------------------------------------------------------ who may


@pytest.fixture
def no_token(tmp_path, monkeypatch):
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.mark.parametrize("place", ["127.0.0.1:6379", "[::1]:6379", "localhost:6379"])
def test_loopback_needs_no_token(place, monkeypatch, no_token):
    monkeypatch.setattr(cluster.services, "canonicalize_bootstrap_address", lambda address: address)
    monkeypatch.setattr(cluster, "_asks", lambda place: pytest.fail("asked"))
    authenticate(place, False)


def test_an_open_cluster_is_refused_with_what_to_do(monkeypatch, no_token):
    monkeypatch.setattr(cluster, "_asks", lambda place: False)
    with pytest.raises(ResourceError, match=r"10\.9\.8\.7:6379 takes work from anyone.*get-auth-token.*--insecure-ray"):
        authenticate("10.9.8.7:6379", False)


def test_a_cluster_that_asks_needs_a_token_here(monkeypatch, no_token):
    monkeypatch.setattr(cluster, "_asks", lambda place: True)
    with pytest.raises(ResourceError, match="asks for a token, and there is none"):
        authenticate("10.9.8.7:6379", False)
    monkeypatch.setattr(cluster, "_show_token", lambda: None)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 32)
    authenticate("10.9.8.7:6379", False)


@pytest.mark.parametrize("place", ["127.0.0.1:6379", "10.9.8.7:6379"])
@pytest.mark.parametrize("asks", [True, False])
def test_a_token_is_shown_to_those_who_ask(monkeypatch, no_token, place, asks):
    """To others it would have this process refuse the calls of their machines."""
    shown = []
    monkeypatch.setattr(cluster.services, "canonicalize_bootstrap_address", lambda address: address)
    monkeypatch.setattr(cluster, "_asks", lambda place: asks)
    monkeypatch.setattr(cluster, "_show_token", lambda: shown.append(place))
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 32)
    authenticate(place, True)
    assert bool(shown) == asks


def test_rays_client_must_show_a_token(monkeypatch, no_token):
    with pytest.raises(ResourceError, match="takes work from anyone"):
        authenticate("ray://10.9.8.7:10001", False)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 32)
    authenticate("ray://10.9.8.7:10001", False)


def test_the_command_line_refuses_in_one_line(tmp_path, llama_folder, uri, monkeypatch, no_token, capsys):
    monkeypatch.setattr(cluster, "_knock", lambda address: None)
    monkeypatch.setattr(cluster, "_asks", lambda place: False)
    file = write_grid(tmp_path / "g.yaml", grid(llama_folder))
    assert cli.main([str(file), "--address", "10.9.8.7:6379", "--store", str(tmp_path / "store")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: the Ray cluster at 10.9.8.7:6379 takes work from anyone who can reach it")
    [begun] = MlflowClient(uri).search_runs([MlflowClient(uri).get_experiment_by_name("g").experiment_id])
    assert begun.info.status == "FAILED"


def test_whether_a_cluster_asks_is_asked_without_a_token(monkeypatch):
    """What the one who asks shows to the cluster, and what is made of its answers."""
    seen = []

    def run(command, env, **how):
        seen.append((command[0], command[-1], {n: v for n, v in env.items() if n.startswith("RAY_AUTH")}))
        return subprocess.CompletedProcess(command, code, "", "Traceback\nRpcError: timed out")

    monkeypatch.setattr(cluster.subprocess, "run", run)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    code = 3
    assert cluster._asks("10.9.8.7:6379")
    code = 0
    assert not cluster._asks("10.9.8.7:6379")
    assert seen == [(sys.executable, "10.9.8.7:6379", {"RAY_AUTH_MODE": "disabled"})] * 2
    code = 1
    with pytest.raises(OSError, match="RpcError: timed out"):
        cluster._asks("10.9.8.7:6379")
