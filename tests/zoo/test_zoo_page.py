"""The page of model types says what the table and the refusals say."""

from tools.models import PAGE, page
from tools.zoo import COMMON, MODELS, config


def test_the_page_is_up_to_date():
    assert PAGE.read_text() == page(), "make models"


def test_the_table_has_settings_that_their_configurations_know():
    for name, model in MODELS.items():
        found = config(name)
        known = {**vars(found), **{n: getattr(found, n) for n in type(found).attribute_map}}
        wrong = {n: v for n, v in model.settings.items() if n in known and v != known[n] and not n.endswith("_config")}
        assert not wrong, name
        assert model.settings.keys() <= known.keys(), name
        assert found.get_text_config().vocab_size == COMMON["vocab_size"]
