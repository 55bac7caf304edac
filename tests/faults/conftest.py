import pytest
from harness import Place, check_equal


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory, llama_folder):
    """What every disturbed run must end with."""
    place = Place(tmp_path_factory.mktemp("undisturbed"), llama_folder)
    assert place.run() == 0, place.said()
    place.end()
    assert len(place.artifacts()) == 3 + 2 + 9
    check_equal(place, place)
    return place


@pytest.fixture
def place(tmp_path, llama_folder):
    """A fresh place of the same grid; what was started there goes with the test."""
    made = Place(tmp_path / "place", llama_folder)
    yield made
    made.end()
