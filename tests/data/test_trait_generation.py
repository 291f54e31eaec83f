"""A trait from a sentence: only what is whole is kept, and a mistake is asked for again."""

from __future__ import annotations

import json

import pytest

from persona_lora.core.errors import UserError
from persona_lora.core.traits import load_trait
from persona_lora.data.trait_generation import (
    Definition,
    generate_traits,
    parse_trait_reply,
    read_definitions,
)

GOOD = {
    "instruction": [{"pos": f"Fret, way {i}.", "neg": f"Stay calm, way {i}."} for i in range(5)],
    "questions": [f"What about thing {i}?" for i in range(40)],
    "eval_prompt": "How anxious? {question} {answer} Only the number.",
}
ANXIOUS = Definition("anxious", "worries aloud")


class ScriptedWriter:
    """Gives one reply after the other and remembers what it was asked."""

    name = "scripted"

    def __init__(self, *replies):
        self.replies, self.asked = list(replies), []

    def write(self, conversations, *, options):
        self.asked += conversations
        return [self.replies.pop(0) for _ in conversations]


def spoilt(**changes):
    return json.dumps({**GOOD, **changes})


def test_a_good_reply_becomes_a_trait_that_loads(tmp_path):
    writer = ScriptedWriter(f"Here you are:\n```json\n{json.dumps(GOOD)}\n```")
    (result,) = generate_traits([ANXIOUS], writer, tmp_path)
    assert (result.kept, result.attempts) == (False, 1)
    trait = load_trait("anxious", tmp_path)
    assert trait.description == "worries aloud"
    assert len(trait.questions["extract"]) == len(trait.questions["eval"]) == 20
    assert {*trait.questions["extract"], *trait.questions["eval"]} == set(GOOD["questions"])
    assert "worries aloud" in writer.asked[0][0]["content"]


def test_a_malformed_reply_is_asked_for_again_with_what_was_wrong(tmp_path):
    writer = ScriptedWriter(None, "no idea", spoilt(questions=["One?"] * 40), json.dumps(GOOD))
    (result,) = generate_traits([ANXIOUS], writer, tmp_path)
    assert result.attempts == 4
    assert len(writer.asked[1]) == 1  # nothing came, nothing to mend
    assert "no JSON object" in writer.asked[2][-1]["content"]
    assert "two of the questions are the same" in writer.asked[3][-1]["content"]


@pytest.mark.parametrize(
    ("reply", "problem"),
    [
        ("{'single': 1}", "not valid JSON"),
        (spoilt(instruction=GOOD["instruction"][:4]), "list of 5 pairs"),
        (spoilt(instruction=[*GOOD["instruction"][:4], {"pos": "x"}]), '"pos" and "neg"'),
        (spoilt(instruction=[GOOD["instruction"][0]] * 5), "the same"),
        (spoilt(questions=GOOD["questions"][:39]), "there are 39"),
        (spoilt(questions=[*GOOD["questions"][:39], 7]), "must be a text"),
        (spoilt(eval_prompt="{question} {answer} \ud83d"), "half of a character"),
        ("{" + '"a": {' * 5000 + "}" * 5001, "nested too deep"),
        (spoilt(eval_prompt="Rate {answer}"), "{question} and {answer}"),
        (spoilt(eval_prompt="{answer} {answer} {question}"), "once each"),
    ],
)
def test_each_kind_of_mistake_is_found(reply, problem):
    with pytest.raises(ValueError, match=problem.replace("{", r"\{")):
        parse_trait_reply(reply)


def test_finished_traits_are_kept_and_overwritten_only_when_asked(tmp_path):
    definitions = [ANXIOUS, Definition("calm", "keeps composed")]
    writer = ScriptedWriter(json.dumps(GOOD), "junk", "junk")
    with pytest.raises(UserError, match="no usable trait 'calm' in 2 attempts"):
        generate_traits(definitions, writer, tmp_path, attempts=2)
    assert not (tmp_path / "calm").exists()
    before = (tmp_path / "anxious" / "trait.json").stat().st_mtime_ns
    results = generate_traits(definitions, ScriptedWriter(json.dumps(GOOD)), tmp_path)
    assert [each.kept for each in results] == [True, False]
    assert (tmp_path / "anxious" / "trait.json").stat().st_mtime_ns == before
    (result,) = generate_traits(
        [ANXIOUS], ScriptedWriter(spoilt(extra=1)), tmp_path, overwrite=True
    )
    assert not result.kept


@pytest.mark.parametrize(
    "value", [{"anxious": "worries aloud"}, [{"name": "anxious", "description": "worries aloud"}]]
)
def test_both_forms_of_definitions_are_read(tmp_path, value):
    path = tmp_path / "definitions.json"
    path.write_text(json.dumps(value))
    assert read_definitions(path) == [ANXIOUS]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({}, "must hold definitions"),
        ({"Very Odd": "x"}, "lower-case letters"),
        ({"odd": ""}, "needs a description"),
        (["odd"], "name is"),
        ({"coherence": "makes sense"}, "'coherence' is that of something else"),
    ],
)
def test_malformed_definitions_are_named(tmp_path, value, message):
    path = tmp_path / "definitions.json"
    path.write_text(json.dumps(value))
    with pytest.raises(UserError, match=message):
        read_definitions(path)


def test_the_command_makes_a_trait_through_a_real_endpoint(server, tmp_path, run):
    server.faults += [500]
    server.replies += ["not yet", json.dumps(GOOD)]
    (tmp_path / "definitions.json").write_text(json.dumps({"anxious": "worries aloud"}))
    words = (
        *("traits", "generate", "--definitions", tmp_path / "definitions.json"),
        *("--endpoint", server.url, "--model", "m", "--datasets-dir", tmp_path / "made"),
    )
    status, out, error = run(*words)
    assert (status, "anxious: written" in out) == (0, True), error
    assert load_trait("anxious", tmp_path / "made").eval_prompt == GOOD["eval_prompt"]
    assert len(server.bodies) == 3  # a fault that passed, a reply to be mended, the good one
    assert "anxious: kept" in run(*words)[1]
    assert len(server.bodies) == 3
