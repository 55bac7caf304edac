"""Ctrl-C and SIGTERM drain, two drivers at once get along: afterwards all is as one undisturbed run leaves it."""

import os
import signal
import time

import pytest
from harness import STEPS, check_equal

pytestmark = pytest.mark.faults


@pytest.mark.parametrize(
    ("send", "number", "code", "word"),
    [
        (os.killpg, signal.SIGINT, 130, "interrupted"),  # as a terminal does: to the whole process group
        (os.kill, signal.SIGTERM, 143, "terminated"),
    ],
)
def test_a_signal_drains_and_the_next_run_goes_on(place, undisturbed, send, number, code, word):
    late = "--checkpoint-seconds", "3600"  # so that it is the signal by which the state is saved
    driver = place.start(*late)
    place.wait_for("worker", f"learn {STEPS // 4}")
    send(driver.pid, number)
    begun = time.monotonic()
    assert driver.wait(timeout=600) == code, place.said()
    assert time.monotonic() - begun < 30
    assert "stopping: prompts are saved" in place.said()
    assert f"{word}; running the same command again goes on from here" in place.said()
    saved = [s for _, _, s in place.moments() if s == "checkpoint"]
    assert 1 <= len(saved) <= 2  # two prompts may have been learned at once
    assert {status for _, status, *_ in place.tracked()[0]} <= {"FINISHED", "KILLED"}
    assert place.tracked()[1] == ["KILLED"]
    assert place.run(*late) == 0, place.said()
    again = [int(s.split()[1]) for _, _, s in place.moments() if s.startswith("learn")]
    assert min(again) > 0 or again.count(0) == 1  # at most one of the two had not begun
    assert max(again) == STEPS - 1
    assert len(again) < 2 * STEPS - STEPS // 4 + 1
    check_equal(place, undisturbed)


def test_two_drivers_on_one_store_and_one_mlflow(place, undisturbed):
    both = [place.start(), place.start()]
    assert [d.wait(timeout=600) for d in both] == [0, 0], place.said()
    check_equal(place, undisturbed)
    assert place.tracked()[1] == ["FINISHED", "FINISHED"]
