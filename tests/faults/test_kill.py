"""kill -9 of anything at any moment: running the same command again ends where an undisturbed run ends."""

import os
import time
from collections import Counter

import pytest
from harness import STEPS, Killer, Place, check_equal, kill

pytestmark = pytest.mark.faults
SEED = 20261123
LEAST = 40
SECONDS = float(os.environ.get("CTP_FAULTS_SECONDS", "600"))  # more where other things run on the machine
WORKER = {"begin": 2, "compress": 4, "learn": 5, "checkpoint": 4, "publish": 5, "published": 4, "evaluate": 4}
DRIVER = {"plan": 1, "open": 1, "invocation": 1, "ray": 1, "hand-out": 1, "log": 3, "close": 2}
BESIDE = {"compress": 1, "learn": 1, "checkpoint": 1, "publish": 1, "evaluate": 1}  # what a worker does meanwhile
RAYLET = {"compress": 1, "learn": 1, "publish": 1, "evaluate": 1}


def targets():
    """Who is to be killed when, as often as said above."""
    for victim, role, stages in (
        ("worker", "worker", WORKER), ("driver", "driver", DRIVER), ("driver", "worker", BESIDE),
        ("raylet", "worker", RAYLET),
    ):  # fmt: skip
        for stage, count in stages.items():
            yield from [(victim, role, stage)] * count


def test_killed_anywhere(tmp_path, llama_folder, undisturbed, capsys):
    killer, begun, rounds = Killer(targets(), SEED), time.monotonic(), 0
    while killer.targets and time.monotonic() - begun < SECONDS:
        place, rounds, drivers = Place(tmp_path / f"round-{rounds}", llama_folder), rounds + 1, 0
        try:
            while (code := killer.watch(place, place.start())) != 0:
                drivers += 1
                assert drivers < 30, place.said()
                assert code in (-9, 1, 4), place.said()  # 1: a cell whose worker died again and again; 4: the raylet
            check_equal(place, undisturbed)
        finally:
            place.end()
    with capsys.disabled():
        print(table(killer, rounds, time.monotonic() - begun))
    assert len(killer.killed) >= LEAST, f"left: {killer.targets}"
    assert {victim for victim, _ in killer.killed} == {"driver", "worker", "raylet"}


def table(killer, rounds, seconds):
    """What was killed, at what point, how often."""
    counts = Counter(killer.killed)
    lines = [f"{victim:<8} {stage:<24} {n:>3}" for (victim, stage), n in sorted(counts.items())]
    total = f"{len(killer.killed)} kills, seed {SEED}, {rounds} grids equal to the undisturbed one, {seconds:.0f} s"
    return "\n".join(["", f"{'killed':<8} {'when':<24} {'n':>3}", *lines, total])


@pytest.mark.parametrize("victim", ["worker", "driver"])
def test_a_prompt_that_was_80_percent_trained_goes_on(tmp_path, llama_folder, undisturbed, victim):
    place = Place(tmp_path / "place", llama_folder)
    try:
        driver = place.start("--where", "k=4")
        reached = int(0.8 * STEPS)
        pid = place.wait_for("worker", f"learn {reached}")
        assert kill(driver.pid if victim == "driver" else pid)
        if victim == "driver":
            driver.wait()
            driver = place.start("--where", "k=4")
        assert driver.wait(timeout=600) == 0, place.said()
        again = [int(stage.split()[1]) for _, _, stage in place.moments() if stage.startswith("learn")]
        first = min(step for step in again if step <= reached + 5)
        assert reached - 1 <= first  # the step that was cut off is the only one that is done again
        whole = undisturbed.artifacts()
        assert {n: files for n, files in whole.items() if n in place.artifacts()} == place.artifacts()
        assert any(n.startswith("learn/") for n in place.artifacts())
    finally:
        place.end()


@pytest.mark.parametrize("victim", [b"raylet/raylet", b"gcs/gcs_server"], ids=["raylet", "gcs"])
def test_a_dead_process_of_rays_is_said_and_closes_every_run(place, undisturbed, victim):
    driver = place.start()
    place.wait_for("worker", "learn")
    assert kill(place.processes(victim)[-1])
    assert driver.wait(timeout=120) == 4, place.said()
    [line] = [x for x in place.said().splitlines() if x.startswith("error: ")]
    assert "Ray ended: its " in line
    assert "killed by SIGKILL" in line
    cells, invocations = place.tracked()
    assert invocations == ["KILLED"]
    assert "RUNNING" not in {c[1] for c in cells}
    assert place.run() == 0, place.said()
    check_equal(place, undisturbed)
