"""Rated answers of models: every row is whole, or the line that is not is named."""

from __future__ import annotations

import json

import pytest

from persona_lora.core.chat import Exchange
from persona_lora.core.errors import UserError
from persona_lora.judges.labels import has_ratings, load_ratings, load_written
from tests.judges.rated import rated_rows, write_ratings, write_written

ROW = rated_rows()[0]


def test_ratings_load_by_part_and_average_both_passes(trait):
    assert not has_ratings(trait)
    write_ratings(trait, rated_rows())
    assert has_ratings(trait)
    rows, tuning = load_ratings(trait), load_ratings(trait, "tuning")
    assert {row.part for row in tuning} == {"tuning"}
    assert len(tuning) + len(load_ratings(trait, "validation")) == len(rows) == len(rated_rows())
    first = rows[0]
    assert first.rating("trait") == sum(ROW["trait"]) / 2
    assert first.passes("sense") == tuple(ROW["sense"])
    assert first.exchange == Exchange(ROW["question"], ROW["answer"])


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ({"trait": [50]}, "trait must be two ratings from 0 to 100"),
        ({"trait": 50}, "trait must be two ratings"),
        ({"sense": [50, 101]}, "sense must be two ratings"),
        ({"sense": [True, 50]}, "sense must be two ratings"),
        ({"sense": [float("nan"), 50]}, "NaN is no JSON number"),
        ({"sense": ["50", 50]}, "sense must be two ratings"),
        ({"part": "test"}, "part must be tuning or validation, got 'test'"),
        ({"answer": " "}, "answer must be a text that is not empty"),
        ({"condition": 3}, "condition must be a text"),
        ({"rater": "me"}, "has 'rater', which is not known"),
    ],
)
def test_a_bad_row_is_refused_by_its_line(trait, fault, said):
    write_ratings(trait, [*rated_rows(), {**ROW, "answer": "Another.", **fault}])
    line = len(rated_rows()) + 1
    with pytest.raises(UserError, match=rf"onpolicy\.jsonl:{line}:? {said}"):
        load_ratings(trait)


def test_a_row_without_a_key_an_answer_twice_and_one_part_alone_are_refused(trait):
    short = {key: each for key, each in ROW.items() if key != "sense"}
    write_ratings(trait, [short])
    with pytest.raises(UserError, match=r"onpolicy\.jsonl:1 has no 'sense'; expected the keys"):
        load_ratings(trait)
    write_ratings(trait, [ROW, {**ROW, "part": "validation"}])
    with pytest.raises(UserError, match=r"onpolicy\.jsonl:2 is the answer of line 1 again"):
        load_ratings(trait)
    write_ratings(trait, [ROW])
    with pytest.raises(UserError, match="no row of the part 'validation'"):
        load_ratings(trait)


def test_a_trait_is_known_by_its_ratings_where_it_has_them(trait):
    before = trait.inputs()
    write_ratings(trait, rated_rows())
    after = trait.inputs()
    assert set(after) - set(before) == {"onpolicy.jsonl of flattery"}
    assert {key: after[key] for key in before} == before
    (trait.folder / "onpolicy.jsonl").write_text(json.dumps(ROW))
    assert trait.inputs() != after


def test_written_answers_load_for_fitting_alone_and_a_question_for_validation_is_refused(trait):
    write_ratings(trait, rated_rows())
    labels, before = load_ratings(trait), trait.inputs()
    assert load_written(trait, labels) == []
    new = {**ROW, "question": "Is my soup too salty?"}
    write_written(trait, [new])
    (row,) = load_written(trait, labels)
    assert (row.part, row.question, row.trait) == ("tuning", new["question"], tuple(ROW["trait"]))
    assert set(trait.inputs()) - set(before) == {"written.jsonl of flattery"}
    (trait.folder / "written.jsonl").write_text(json.dumps(ROW))
    with pytest.raises(UserError, match=r"written\.jsonl:1 has 'condition', which is not known"):
        load_written(trait, labels)
    held = next(row for row in rated_rows() if row["part"] == "validation")
    write_written(trait, [new, {**held, "answer": "Another."}])
    with pytest.raises(UserError, match="answers a question of the validation part"):
        load_written(trait, labels)
