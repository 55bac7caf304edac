"""The text of a grid file: definitions, what it extends, overrides by path."""

import pytest

from ctp.planning import gridtext
from ctp.planning.gridtext import GridError, assign, define


def test_a_name_stands_for_its_definition_at_any_depth():
    raw = {"define": {"small": {"seq_len": 64}, "both": ["$small", 3]}, "a": "$both", "b": {"c": ["$small"]}}
    assert define(raw) == {"a": [{"seq_len": 64}, 3], "b": {"c": [{"seq_len": 64}]}}


def test_from_takes_a_definition_and_changes_it():
    raw = {
        "define": {"p": {"k": 100, "text": {"split": "train", "n": 1}}},
        "x": {"from": "$p", "k": 5, "text": {"n": 2}},
    }
    assert define(raw) == {"x": {"k": 5, "text": {"split": "train", "n": 2}}}


def test_two_dollars_are_one():
    assert define({"x": "$$5", "y": "costs $5"}) == {"x": "$5", "y": "costs $5"}


def test_every_unknown_name_is_told_with_its_place_and_the_nearest():
    with pytest.raises(GridError) as caught:
        define({"define": {"llama-7b": "x", "other": "$lama"}, "studies": {"a": {"models": ["$llama-7", "$llama-7b"]}}})
    assert caught.value.problems == [
        "studies.a.models[0] = '$llama-7': unknown definition 'llama-7'; did you mean 'llama-7b'? "
        "Allowed: llama-7b, other",
        "define.other = '$lama': unknown definition 'lama'; did you mean 'llama-7b'? Allowed: llama-7b, other",
    ]


def test_a_definition_that_comes_back_to_itself_is_an_error():
    with pytest.raises(GridError, match="comes back to itself"):
        define({"define": {"a": ["$b"], "b": {"c": "$a"}}, "x": "$a"})


def test_from_must_name_a_mapping():
    with pytest.raises(GridError, match=r"x\.from = '\$a': must name the definition of a mapping"):
        define({"define": {"a": 3}, "x": {"from": "$a"}})


def test_what_is_extended_can_be_left_out_in_part(tmp_path):
    (tmp_path / "base.yaml").write_text("define: {k: 5, m: 1}\nstudies: {one: {models: x}, two: {models: y}}\n")
    (tmp_path / "top.yaml").write_text(
        "extends: {grid: base, without: studies}\ndefine: {k: 6}\nstudies: {three: {models: z}}\n"
    )
    raw, folders = gridtext.read(tmp_path / "top.yaml")
    assert raw == {"define": {"k": 6, "m": 1}, "studies": {"three": {"models": "z"}}}
    assert folders == [tmp_path, tmp_path]


@pytest.mark.parametrize("value", ["{grid: base, with: studies}", "[base]", "{without: studies}"])
def test_extends_says_what_it_takes(tmp_path, value):
    (tmp_path / "top.yaml").write_text(f"extends: {value}\n")
    with pytest.raises(GridError, match=r"extends = .*: a grid, or \{grid: …, without"):
        gridtext.read(tmp_path / "top.yaml")


def test_a_path_finds_names_with_dots_in_them():
    raw = {"define": {"opt-1.3b": {"name": "a"}}, "recovery": [{"k": 1}]}
    assign(raw, "define.opt-1.3b.name=b")
    assign(raw, "recovery.0.k=2")
    assign(raw, "new.deep=3")
    assert raw == {"define": {"opt-1.3b": {"name": "b"}}, "recovery": [{"k": 2}], "new": {"deep": 3}}


def test_a_path_that_leads_nowhere_names_the_step():
    with pytest.raises(GridError, match=r"no 'recovery.7' here \(its parent is a list of 1\)"):
        assign({"recovery": [{"k": 1}]}, "recovery.7.k=2")


def test_a_mistyped_definition_is_no_silence(tmp_path):
    (tmp_path / "base.yaml").write_text("define: {prompt: {k: 5}}\nx: $prompt\n")
    (tmp_path / "top.yaml").write_text("extends: base\ndefine: {promt: {k: 6}}\n")
    with pytest.raises(GridError, match=r"define\.promt: nothing uses it; .* did you mean 'prompt'"):
        gridtext.read(tmp_path / "top.yaml")
    raw, _ = gridtext.read(tmp_path / "base.yaml")
    with pytest.raises(GridError, match=r"--set define\.promt\.k=6: unknown definition 'promt'; did you mean 'prompt'"):
        assign(raw, "define.promt.k=6")


def test_what_is_left_out_must_be_there(tmp_path):
    (tmp_path / "base.yaml").write_text("recovery: bos\n")
    (tmp_path / "top.yaml").write_text("extends: {grid: base, without: recovry}\n")
    with pytest.raises(GridError, match=r"extends\.without: unknown key 'recovry'; did you mean 'recovery'"):
        gridtext.read(tmp_path / "top.yaml")
