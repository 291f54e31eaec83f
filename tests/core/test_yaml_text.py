from __future__ import annotations

import pytest

from persona_lora.core.errors import UserError
from persona_lora.core.settings import read_yaml


def test_numbers_are_read_as_people_write_them(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("a: 5e-1\nb: 1e5\nc: -.5E+1\nd: 2E0\ne: 15\nf: '5e-1'\ng: 5e\nh: {i: [1e-3]}\n")
    assert read_yaml(path) == {
        "a": 0.5, "b": 1e5, "c": -5.0, "d": 2.0, "e": 15, "f": "5e-1", "g": "5e", "h": {"i": [1e-3]}
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", "'a' is given twice.*line 3"),
        ("a: {b: 1, b: 2}", "'b' is given twice"),
        ("a: [", "not valid YAML"),
        ("- a", "one YAML mapping"),
        ("a: 2026-13-45", "not valid YAML"),
        ("a: " + "[" * 5000, "not valid YAML"),
        ("a: !!python/object:os.system x", "not valid YAML"),
        ("a: &x [*x]\n? [1]\n: 2", "not valid YAML"),
    ],
)
def test_mistakes_are_one_line(tmp_path, text, message):
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        read_yaml(path)
    assert "\n" not in str(caught.value)
