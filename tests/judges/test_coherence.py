"""Coherence from repetition and likelihood."""

from __future__ import annotations

import itertools
import random

import pytest

from persona_lora.core.chat import COHERENCE, Exchange
from persona_lora.core.errors import UserError
from persona_lora.judges.coherence import (
    CoherenceScale,
    CoherenceScorer,
    distinct_share,
    fit_scale,
    looped_words,
    shuffled_words,
)

SCALE = CoherenceScale(natural_share=0.8, fluent=-2.0, scrambled=-6.0)
LINE = "the cat sat on a mat while rain fell over seven quiet hills"
NATURAL = [
    Exchange(f"q{number}", " ".join([str(number), *LINE.split()[number % 5 :]]))
    for number in range(20)
]


def in_order(exchanges):
    """Likelihood that falls with the number of words that left the line's order."""
    line = LINE.split()
    values = []
    for exchange in exchanges:
        words = [word for word in exchange.answer.split() if word in line]
        broken = sum(line.index(b) != line.index(a) + 1 for a, b in itertools.pairwise(words))
        values.append(-2.0 - broken)
    return values


def test_distinct_share_of_loops_falls_as_one_over_the_repeats():
    once = "one two three four five six seven eight"
    assert distinct_share(once) == 1.0
    assert distinct_share(" ".join([once] * 10)) == pytest.approx(0.1, abs=0.01)
    assert distinct_share("so right, so right, so right, so right") < 0.4


def test_distinct_share_catches_runs_of_marks_and_of_one_long_word():
    assert distinct_share("!" * 50) < 0.05
    assert distinct_share("a" * 800) < 0.05


@pytest.mark.parametrize("text", ["", "one", "one two"])
def test_distinct_share_of_short_texts_is_one(text):
    assert distinct_share(text) == 1.0


def test_scale_is_linear_between_its_anchors_and_cut_outside():
    for mean_logprob, score in ((-1.0, 100), (-2.0, 100), (-4.0, 50), (-6.0, 0), (-9.0, 0)):
        assert SCALE.score(LINE, mean_logprob) == pytest.approx(score)


def test_scale_takes_the_worse_of_variety_and_fluency():
    loop = " ".join(["one two three four"] * 10)
    variety = 100 * distinct_share(loop) / 0.8
    assert SCALE.score(loop, -0.5) == pytest.approx(variety)
    assert SCALE.score(loop, -6.0) == 0.0


def test_broken_versions_keep_words_and_length():
    salad = shuffled_words(LINE, random.Random(0))
    assert salad != LINE
    assert sorted(salad.split()) == sorted(LINE.split())
    text = " ".join(str(number) for number in range(40))
    loop = looped_words(text).split()
    assert loop == [str(number % 8) for number in range(40)]


def test_fit_scale_refuses_a_likelihood_that_cannot_tell_shuffled_words():
    with pytest.raises(UserError, match="unsteered"):
        fit_scale([LINE], [-3.0], [-3.0])


def test_scorer_validates_itself_on_held_out_answers():
    scorer = CoherenceScorer.fit(NATURAL, mean_logprob=in_order, judge_name="j", seed=0)
    assert scorer.shuffled.auc > 0.95
    assert scorer.looped.auc > 0.95
    assert scorer.shuffled.n == 2 * len(NATURAL)
    assert scorer.shuffled.criterion == "coherence: natural vs shuffled"
    again = CoherenceScorer.fit(NATURAL, mean_logprob=in_order, judge_name="j", seed=0)
    assert again == scorer


def test_scorer_gives_one_verdict_each_and_none_for_the_unscorable():
    scorer = CoherenceScorer.fit(NATURAL, mean_logprob=in_order, judge_name="j", seed=0)
    broken = CoherenceScorer(
        scorer.scale, lambda items: [float("nan")] * len(items), scorer.shuffled, scorer.looped
    )
    items = [NATURAL[0], Exchange("q", "  \n"), NATURAL[5]]
    verdicts = scorer.verdicts(items, "j")
    assert [verdict.score is None for verdict in verdicts] == [False, True, False]
    assert verdicts[1].reason == "the answer is empty"
    assert verdicts[0].score == pytest.approx(100)
    assert {verdict.criterion for verdict in verdicts} == {COHERENCE}
    assert "nan" in broken.verdicts(items, "j")[0].reason
    assert scorer.verdicts([], "j") == []


@pytest.mark.parametrize("values", [[], [float("nan")] * 20])
def test_scorer_refuses_a_likelihood_of_the_wrong_length_or_not_finite(values):
    with pytest.raises(UserError, match="mean_logprob"):
        CoherenceScorer.fit(NATURAL, mean_logprob=lambda _: values, judge_name="j", seed=0)
