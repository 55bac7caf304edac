"""Jobs that share a CPU's threads."""

import threading

import pytest
import torch

from ctp.machine.threads import side_by_side

CPU = torch.device("cpu")


@pytest.fixture
def four_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def test_jobs_run_at_once_on_a_share_of_the_threads(four_threads):
    together = threading.Barrier(2, timeout=20)  # breaks where one job waits for the other to end

    def job(i):
        together.wait()
        return i, torch.get_num_threads()

    assert side_by_side([lambda: job(0), lambda: job(1)], CPU) == [(0, 2), (1, 2)]
    assert torch.get_num_threads() == 4
    new: list[int] = []
    thread = threading.Thread(target=lambda: new.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert new == [4]


def test_more_jobs_than_threads_keep_their_order(four_threads):
    jobs = [lambda i=i: i for i in range(11)]
    assert side_by_side(jobs, CPU) == list(range(11))
    assert side_by_side(jobs[:1], CPU) == [0]
    assert side_by_side([], CPU) == []


def test_the_first_error_is_raised_and_the_threads_come_back(four_threads):
    def wrong(i):
        raise ValueError(f"job {i}")

    with pytest.raises(ValueError, match="job 1"):
        side_by_side([lambda: 0, lambda: wrong(1), lambda: wrong(2)], CPU)
    assert torch.get_num_threads() == 4


def test_elsewhere_jobs_are_drawn_one_by_one():
    """What a job holds can be freed before the next one is made."""
    seen = []

    def jobs():
        for i in range(3):
            seen.append(f"made {i}")
            yield lambda i=i: seen.append(f"ran {i}")

    side_by_side(jobs(), torch.device("meta"))
    assert seen == [f"{what} {i}" for i in range(3) for what in ("made", "ran")]
