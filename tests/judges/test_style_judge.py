"""The embedded persona judge, on two made-up voices and on the shipped personas."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from persona_lora.core.chat import Exchange
from persona_lora.core.errors import UserError
from persona_lora.core.personas import (
    Persona,
    PersonaConversation,
    list_personas,
    load_persona,
)
from persona_lora.judges.persona_judges import check_style_judge
from persona_lora.judges.style_judge import (
    FitScale,
    LetterFeatures,
    TextFeatures,
    Voices,
    fit_judges,
    validate_judges,
)
from persona_lora.models.embeddings import SentenceEmbedder

LOUD = [f"Wow!! I love {word} so much, what a day!" for word in "abcdefghijkl"]
CALM = [f"perhaps the {word} was moved, i suppose" for word in "mnopqrstuvwx"]


@pytest.fixture(scope="module")
def features():
    return TextFeatures(SentenceEmbedder())


def fitted(said, features):
    voices = Voices.fit(said, features=features)
    return {name: voices.judge_of(name) for name in said}


@pytest.fixture(scope="module")
def judge(features):
    return fitted({"loud": LOUD, "calm": CALM}, features)["loud"]


def ask(judge, *answers):
    return judge.judge([Exchange("How was it?", answer) for answer in answers], "persona_fit")


def test_own_manner_scores_above_another(judge):
    own, other = ask(
        judge, "Wow!! I love this soup so much!", "perhaps the soup was cold, i suppose"
    )
    assert own.score > 4
    assert other.score < 2


def test_scores_stay_on_the_scale_and_their_anchors_are_where_they_say():
    scale = FitScale(own=3.0, others=-5.0)
    assert scale.scores(np.array([3.0, -1.0, -5.0])) == pytest.approx([4.5, 3.0, 1.5])
    extremes = scale.scores(np.array([-1e3, 1e3]))
    assert extremes.min() >= 1
    assert extremes.max() <= 5


def test_an_answer_without_words_has_no_score(judge):
    empty, marks, fine = ask(judge, "", "?! …", "Wow, fine!")
    assert (empty.score, marks.score) == (None, None)
    assert "no words" in empty.reason
    assert fine.score is not None


def test_equal_seeds_give_equal_judges(judge, features):
    again = fitted({"loud": LOUD, "calm": CALM}, features)["loud"]
    assert np.array_equal(again.voices.weights, judge.voices.weights)
    assert again.scale == judge.scale


def test_verdicts_do_not_depend_on_their_neighbours(judge):
    together = ask(judge, "Wow!", "i suppose so")
    alone = [ask(judge, text)[0].score for text in ("Wow!", "i suppose so")]
    assert [each.score for each in together] == pytest.approx(alone, abs=1e-4)


def test_what_it_was_fitted_on_is_scored_as_if_it_had_not_been(judge, features):
    whole = judge.logits([f"{text} " for text in LOUD])  # all but what it was fitted on
    assert not np.allclose(judge.logits(LOUD), whole)
    assert judge.scale.own == pytest.approx(float(judge.logits(LOUD).mean()))


def test_whom_a_judge_tells_worst_from_its_own_is_named(features, tmp_path):
    def person(name, lines):
        half = len(lines) // 2
        talks = (
            PersonaConversation(split, split, [{"role": "user", "content": each} for each in part])
            for split, part in (("train", lines[:half]), ("test", lines[half:]))
        )
        return Persona(name, tmp_path, tuple(talks))

    loud, calm = ([f"{line} {more}" for line in lines for more in ("So!", "Then.")]
                  for lines in (LOUD, CALM))  # fmt: skip
    hush = [line.replace("the", "that") for line in calm]
    people = [person("loud", loud), person("calm", calm), person("hush", hush)]
    found = validate_judges(people, fit_judges(people, "train", features=features), "train")
    assert (found.nearest["calm"].persona_id, found.nearest["hush"].persona_id) == ("hush", "calm")
    assert found.nearest["calm"].auc < found.auc["calm"]


class Letters:
    """How often "a", "b" and "c" stand in a text, with a little noise of its own."""

    name, standardised = "abc", 0

    def of(self, texts):
        noise = [np.random.default_rng(list(each.encode())).normal(size=3) for each in texts]
        return np.array([[each.count(x) for x in "abc"] for each in texts]) + 0.1 * np.array(noise)


def test_who_sounds_like_a_third_person_does_not_sound_more_like_the_first():
    """One against all others gives "b" to the second, and more "b" to whoever has more of it."""
    said = {
        name: [f"{letters} {at}" for at in range(12)]
        for name, letters in (("ann", "b"), ("bob", "bbbb"), ("cat", "aa"), ("dan", "cc"))
    }
    ann = fitted(said, Letters())["ann"]
    mine, stronger = ann.logits(["b here", "bbbb here"])
    assert mine > 0 > stronger


def test_persons_who_say_too_little_are_one_voice_together():
    said = {"ann": [f"aa {at}" for at in range(12)], "bob": [f"b {at}" for at in range(6)],
            "cat": [f"b {at} c" for at in range(6)]}  # fmt: skip
    voices = Voices.fit(said, features=Letters())
    assert len(voices.persons) == 2
    assert voices.judge_of("ann").logits(["aa then"])[0] > 0
    with pytest.raises(UserError, match="cat needs at least 10"):
        voices.judge_of("cat")


def test_letters_alone_tell_voices_apart():
    judge = fitted({"loud": LOUD, "calm": CALM}, LetterFeatures())["loud"]
    own, other = ask(judge, "Wow!! I love this soup so much!", "perhaps it was cold, i suppose")
    assert judge.name == own.judge == "letters"
    assert own.score > 4
    assert other.score < 2


def test_too_few_utterances_and_other_criteria_are_named(judge, features):
    with pytest.raises(UserError, match="at least 10"):
        fitted({"loud": LOUD[:9], "calm": CALM, "hush": CALM}, features)
    with pytest.raises(UserError, match="persona_fit"):
        judge.judge([Exchange("q", "a")], "evil")


def test_one_and_the_same_voice_is_refused(features):
    with pytest.raises(UserError, match="cannot be told"):
        fitted({"echo": LOUD, "loud": LOUD}, features)


@pytest.fixture(scope="module")
def personas():
    return [load_persona(each) for each in list_personas()]


@pytest.fixture(scope="module")
def far_apart(personas):
    return [each for each in personas if each.id.startswith("episode-0001")]


@pytest.mark.parametrize("split", ["train", "test"])
def test_personas_far_apart_are_known_by_utterances_never_fitted_on(far_apart, features, split):
    validation = validate_judges(
        far_apart, fit_judges(far_apart, split, features=features), fitted_on=split
    )
    assert len(far_apart) == 12
    assert validation.chance == 1 / len(far_apart)
    assert validation.top1 > 0.6
    assert validation.top1_conversations > 0.9
    assert min(validation.auc.values()) > 0.8


def test_personas_that_are_nearer_are_harder_to_tell_but_not_by_chance(
    personas, far_apart, features
):
    near = [each for each in personas if each not in far_apart]
    validation = validate_judges(
        near, fit_judges(near, "train", features=features), fitted_on="train"
    )
    assert validation.top1 > 1.5 * validation.chance
    assert (
        validation.top1 < 0.8
    )  # if they were as easily told as the others, they would add nothing
    assert np.mean(list(validation.auc.values())) > 0.6


def test_shipped_personas_are_as_large_as_they_must_be(personas):
    for persona in personas:
        assert len(persona.conversations) >= 4
        assert len(persona.utterances("train")) + len(persona.utterances("test")) >= 40
        assert persona.utterances("test")
        assert not set(persona.utterances("train")) & set(persona.utterances("test"))
        assert persona.read("persona_samples.json")
        assert "{answer_b}" in persona.read("final_judge_prompt.txt")


def test_a_single_persona_has_nobody_to_be_told_from(personas, features):
    with pytest.raises(UserError, match="two personas"):
        fit_judges(personas[:1], "train", features=features)


def test_a_judge_that_no_unseen_conversation_can_check_names_whose_are_missing():
    silent = Persona("ann", Path("ann"), ())
    with pytest.raises(UserError, match=r"ann has 0 utterances in test .* split 'test'"):
        check_style_judge(None, silent, [silent], "train")
