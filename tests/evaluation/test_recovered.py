"""How much of the loss of compression is won back: one measure, in the report and at the end of a run."""

import pytest

from ctp.evaluation.recovered import won_back


def test_shares_of_the_loss():
    assert won_back(10.0, 20.0, 10.0) == pytest.approx(100)
    assert won_back(10.0, 20.0, 20.0) == 0
    assert won_back(10.0, 20.0, 40.0) == pytest.approx(-100)
    assert won_back(10.0, 40.0, 20.0) == pytest.approx(50)  # half of the log-perplexity that was lost
    assert won_back(10.0, 10.2, 9.0) is None  # nothing was lost
    assert won_back(None, 20.0, 9.0) is None
    assert won_back(10.0, 20.0, float("inf")) == -float("inf")
