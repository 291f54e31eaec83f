"""Personas by the names of models."""

from __future__ import annotations

import pytest

from persona_lora.cli.serving_commands import Mixed
from persona_lora.core.errors import UserError
from persona_lora.core.files import write_json
from persona_lora.serving.mixes import Personas, UnknownPersona


@pytest.fixture
def personas(tmp_path):
    write_json(tmp_path / "candid.json", {"evil": -1.0, "x-2": 0.5})
    write_json(tmp_path / "other.json", {"greed": 1.0})
    write_json(tmp_path / "ann_best_weights.json", {"evil": 0.5})  # in units of the search
    write_json(tmp_path / "list.json", [1.0])
    (tmp_path / "torn.json").write_text('{"evil":')
    return Personas(("evil", "formality", "x-2"), tmp_path, {"evil": lambda nats: 100 * nats.value})


@pytest.mark.parametrize(
    ("name", "mix"),
    [
        ("base", [0, 0, 0]),
        ("base+0.8*formality-1*evil", [-1, 0.8, 0]),
        ("base-.5*x-2", [0, 0, -0.5]),
        ("base+1*x-2-1e-1*evil", [-0.1, 0, 1]),
        ("base+4*evil", [4, 0, 0]),
        ("base-0.05nat*evil+1*x-2", [-5, 0, 1]),
        ("base+1e-2nats*evil", [1, 0, 0]),
        ("candid", [-1, 0, 0.5]),
    ],
)
def test_a_name_is_a_mix(personas, name, mix):
    assert personas.mix(name) == mix


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("gpt-4o", "no persona 'gpt-4o'"),
        ("candit", "did you mean 'candid'"),
        ("../candid", "no persona"),
        ("", "no persona"),
        ("base+1*greed", "no trait 'greed' is served"),
        ("base+1*formalty", "did you mean 'formality'"),
        ("other", "no trait 'greed' is served"),
    ],
)
def test_a_name_of_nothing_is_unknown(personas, name, said):
    with pytest.raises(UnknownPersona, match=said):
        personas.mix(name)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("base+evil", "is no mix; write it like base"),
        ("base+1*", "is no mix"),
        ("base+nan*evil", "is no mix"),
        ("base+ 1*evil", "is no mix"),
        ("base-evil+1*evil", "is no mix"),
        ("base+1*evil+1*evil", "names evil twice"),
        ("base+4.1*evil", "beyond ±4"),
        ("base+1e999*evil", "must be finite"),
        ("base+0.05nut*evil", "is no mix"),
        ("base+0.05nat*formality", "nats of formality are not served here"),
        ("list", "must hold coefficients"),
        ("torn", "torn.json"),
    ],
)
def test_a_mix_that_is_none_is_refused(personas, name, said):
    with pytest.raises(UserError, match=said) as caught:
        personas.mix(name)
    assert not isinstance(caught.value, UnknownPersona)


def test_what_can_be_served_is_listed(personas):
    alone = ["base+1*evil", "base+1*formality", "base+1*x-2"]
    assert personas.names() == ["base", *alone, "candid"]
    assert Personas(("evil",), personas.folder / "none").names() == ["base", "base+1*evil"]
    for name in personas.names():
        personas.mix(name)


def test_a_saved_mix_is_served_as_a_search_found_it_and_what_is_left_out_is_told(personas):
    write_json(personas.folder / "found_mix.json", {"evil": -12.5})
    assert personas.mix("found_mix") == [-12.5, 0, 0]
    assert "found_mix" in personas.names()
    out = personas.left_out()
    assert set(out) == {"list", "other", "torn"}
    assert "greed" in out["other"]


def test_a_part_of_a_diff_is_served_by_the_name_that_a_search_gives_it(make_diff, model, tmp_path):
    make_diff(model, seed=1).save(tmp_path / "evil" / "diff")
    mixed = Mixed(("evil", "evil@0-0"), tmp_path)
    found = mixed.load()
    assert set(found["evil@0-0"].factors) == {
        name for name in found["evil"].factors if ".0." in name
    }
    (tmp_path / "found_mix.json").write_text('{"evil@0-0": 0.5}')
    personas = Personas(tuple(found), tmp_path, mixed.of_nats(found))
    assert personas.mix("found_mix") == personas.mix("base+0.5*evil@0-0") == [0.0, 0.5]
    with pytest.raises(UserError, match="holds no diff of good@0-0"):
        Mixed(("good@0-0",), tmp_path).load()
    with pytest.raises(UserError, match="changes nothing in ''"):
        Mixed(("evil@",), tmp_path).load()
