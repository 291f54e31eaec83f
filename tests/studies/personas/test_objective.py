"""The objective: rows of one batch equal candidates one by one; races, outages, lost scores."""

from __future__ import annotations

from threading import Event

import pytest

from persona_lora.core.chat import Exchange, Verdict, user_question
from persona_lora.core.errors import UserError
from persona_lora.core.personas import Coefficients
from persona_lora.judges.budget import COST_CAP
from persona_lora.judges.judging import MultiJudge
from persona_lora.models.generation import generate_answers
from persona_lora.models.processes import Processes
from persona_lora.steering.bank import bank_of_diffs
from persona_lora.steering.live import LiveLoRA
from persona_lora.studies.asking.run import GenerationOptions, Row
from persona_lora.studies.personas import objective
from persona_lora.studies.personas.objective import MixObjective, ObjectiveOptions, Speaker

PROMPTS = ("How are you?", "Any news?", "What's for lunch?", "Did it rain?")


class CountingJudge:
    """Fit 1–5 from the answer's letters; notes every answer it is asked about."""

    name = "counting"

    def __init__(self):
        self.asked = []
        self.faults = []

    def judge(self, exchanges, criterion):
        self.asked += exchanges
        if self.faults:
            reason = self.faults.pop(0)
            return [Verdict(criterion, None, reason, self.name) for _ in exchanges]
        return [
            Verdict(criterion, 1 + 4 * (sum(map(ord, each.answer)) % 97) / 97, "", self.name)
            for each in exchanges
        ]


@pytest.fixture
def speaker(chat_model, make_diff):
    diffs = {
        name: make_diff(chat_model.model, seed=seed, scale=0.3)
        for seed, name in enumerate(("calm", "loud"))
    }
    options = GenerationOptions(max_new_tokens=6)
    scales = {"calm": 0.5, "loud": 1.5}
    return Speaker(chat_model, bank_of_diffs(diffs), scales, 2.0, options, Processes())


@pytest.fixture
def judge():
    return CountingJudge()


MIXES = [Coefficients(("calm", "loud"), values) for values in ((0.5, -0.5), (1.0, 0.0), (0.0, 0.0))]


def test_a_population_equals_its_candidates_one_by_one(speaker, judge):
    together = MixObjective(speaker, PROMPTS, judge)(MIXES, 1)
    for mix, value in zip(MIXES, together, strict=True):
        (alone,) = MixObjective(speaker, PROMPTS, CountingJudge())([mix], 1)
        assert alone == value


def test_a_coefficient_is_alpha_times_weight_times_scale(speaker, chat_model):
    mix = MIXES[0]
    diffs = [speaker.directions.diffs[trait] for trait in ("calm", "loud")]
    with LiveLoRA(chat_model.model, diffs, [[2.0 * 0.5 * 0.5, 2.0 * -0.5 * 1.5]]):
        expected = generate_answers(chat_model, [user_question(PROMPTS[0])], max_new_tokens=6)
    (said,) = speaker.answers([Row(PROMPTS[0], mix)])
    assert said == Exchange(PROMPTS[0], expected[0].text, expected[0].finished)
    assert not said.finished  # after six tokens


def test_zero_weights_answer_as_the_unsteered_model(speaker, chat_model):
    expected = generate_answers(chat_model, [user_question(PROMPTS[0])], max_new_tokens=6)
    cells = [Row(PROMPTS[0], MIXES[2]), Row(PROMPTS[0], None)]
    said = Exchange(PROMPTS[0], expected[0].text, expected[0].finished)
    assert speaker.answers(cells) == [said] * 2


def test_an_answer_is_judged_once(speaker, judge):
    objective = MixObjective(speaker, PROMPTS, judge)
    first = objective(MIXES, 1)
    assert len(judge.asked) == len(set(judge.asked))
    before = len(judge.asked)
    assert objective(MIXES, 2) == first
    assert len(judge.asked) == before


def test_the_penalty_is_that_of_the_squared_norm(speaker, judge):
    plain = MixObjective(speaker, PROMPTS, judge)(MIXES, 1)
    options = ObjectiveOptions(penalty=0.25)
    punished = MixObjective(speaker, PROMPTS, judge, options)(MIXES, 1)
    cuts = [one.value - other.value for one, other in zip(plain, punished, strict=True)]
    assert cuts == pytest.approx([0.25 * 0.5, 0.25 * 1.0, 0.0])


def test_coherence_is_a_constraint_measured_on_every_answer(speaker, judge):
    asked = []

    def coherence(exchanges):
        asked.append(len(exchanges))
        return [Verdict("coherence", 70.0, "", "x") for _ in exchanges]

    plain = MixObjective(speaker, PROMPTS, judge)(MIXES, 1)
    options = ObjectiveOptions(min_coherence=75.0)
    held = MixObjective(speaker, PROMPTS, judge, options, coherence=coherence)(MIXES, 1)
    assert asked == [len(MIXES) * len(PROMPTS)]
    assert [each.value for each in held] == [each.value for each in plain]
    assert [each.violation for each in held] == [5.0] * 3
    assert held[0].details["coherence"] == 70.0
    with pytest.raises(UserError, match="coherence"):
        MixObjective(speaker, PROMPTS, judge, options)


def test_answers_that_do_not_count_have_the_worst_fit(speaker, judge):
    (plain,) = MixObjective(speaker, PROMPTS, judge)(MIXES[:1], 1)
    said = plain.details["answers"][0]
    (copied,) = MixObjective(speaker, PROMPTS, judge, learnt_from=[said])(MIXES[:1], 1)
    assert copied.details["failed"][0] == "copy"
    assert copied.details["scores"] == plain.details["scores"]
    assert copied.value < plain.value


def test_answers_that_could_be_to_anything_break_a_constraint(speaker, judge):
    asked = []

    def relevance(exchanges):
        asked.append([each.question for each in exchanges])
        return [None, *[60.0] * (len(exchanges) - 1)]

    plain = MixObjective(speaker, PROMPTS, judge)(MIXES, 1)
    options = ObjectiveOptions(min_relevance=75.0)
    cut = MixObjective(speaker, PROMPTS, judge, options, relevance=relevance)(MIXES, 1)
    assert [each.value for each in cut] == [each.value for each in plain]
    assert [each.violation for each in cut] == [15.0] * 3
    assert cut[0].details["relevance"] == 60.0  # without the answer that has none
    assert asked == [[*PROMPTS] * 3]
    assert "relevance" not in plain[0].details
    with pytest.raises(UserError, match="needs a measure"):
        MixObjective(speaker, PROMPTS, judge, options)
    with pytest.raises(UserError, match="--min-relevance 0"):
        MixObjective(speaker, PROMPTS[:1], judge, options, relevance=relevance)


def test_a_race_measures_relevance_in_both_heats(speaker, judge):
    options = ObjectiveOptions(min_relevance=75.0, race=True)
    heats = []

    def relevance(exchanges):
        heats.append(len(exchanges))
        return [50.0 + 10 * len(heats)] * len(exchanges)

    found = MixObjective(speaker, PROMPTS, judge, options, relevance=relevance)(MIXES, 1)
    assert heats == [3 * 2 + 2, 2 * 2 + 2]  # the prompts of the other heat are among them
    assert sorted(each.details["relevance"] for each in found) == [60.0, 65.0, 65.0]


def test_an_answer_in_a_race_is_placed_among_all_prompts(speaker, judge):
    """In a heat of one prompt there is no other that it could be less like."""

    def relevance(exchanges):
        others = len({each.question for each in exchanges}) - 1
        return [100.0 if others else None] * len(exchanges)

    options = ObjectiveOptions(min_relevance=85.0, race=True)
    found = MixObjective(speaker, PROMPTS[:2], judge, options, relevance=relevance)(MIXES, 1)
    assert [each.violation for each in found] == [0.0] * 3


def test_a_race_over_one_prompt_is_refused(speaker, judge):
    with pytest.raises(UserError, match="a race is over two prompts at least"):
        MixObjective(speaker, PROMPTS[:1], judge, ObjectiveOptions(race=True))


@pytest.mark.parametrize("name", ["min_coherence", "min_relevance"])
def test_a_constraint_outside_its_scale_is_named(name):
    with pytest.raises(UserError, match=f"{name} must lie between 0 and 100, got 850"):
        ObjectiveOptions(**{name: 850.0})


def test_too_little_coverage_is_no_value(speaker, judge):
    class Half(CountingJudge):
        def judge(self, exchanges, criterion):
            verdicts = super().judge(exchanges, criterion)
            return [
                Verdict(criterion, None, "refusal", self.name)
                if each.question in PROMPTS[:3]
                else verdict
                for each, verdict in zip(exchanges, verdicts, strict=True)
            ]

    values = MixObjective(speaker, PROMPTS, Half())(MIXES, 1)
    assert [each.value for each in values] == [None] * 3
    assert values[0].details["coverage"] == 0.25
    lenient = ObjectiveOptions(min_coverage=0.25)
    kept = MixObjective(speaker, PROMPTS, Half(), lenient)(MIXES, 1)
    assert all(each.value == each.details["fit"] for each in kept)  # over the scored ones alone


def test_a_race_finishes_the_better_half_over_all_prompts(speaker, judge):
    mixes = [Coefficients(("calm", "loud"), (x, -x)) for x in (0.0, 0.4, 0.8, 1.2)]
    raced = MixObjective(speaker, PROMPTS, judge, ObjectiveOptions(race=True))(mixes, 1)
    whole = MixObjective(speaker, PROMPTS, judge)(mixes, 1)
    out = [each.details.get("raced_out", False) for each in raced]
    assert out.count(True) == 2
    survivors = [each.value for each, left in zip(raced, out, strict=True) if not left]
    for value, full, left in zip(raced, whole, out, strict=True):
        assert len(value.details["scores"]) == (2 if left else 4)
        if left:
            assert value.value < min(survivors)
        else:
            assert value.value == pytest.approx(full.value)


def test_a_race_draws_its_first_prompts_anew_for_each_generation(speaker, judge):
    objective = MixObjective(speaker, PROMPTS, judge, ObjectiveOptions(race=True))
    drawn = {tuple(objective._heats(iteration)[0]) for iteration in range(20)}
    assert len(drawn) > 1
    assert objective._heats(3) == objective._heats(3)


def test_an_outage_is_waited_out_and_loses_nothing(speaker, judge, monkeypatch):
    pauses = []
    monkeypatch.setattr(objective.time, "sleep", pauses.append)
    expected = MixObjective(speaker, PROMPTS, CountingJudge())(MIXES, 1)
    judge.faults = ["the connection failed"] * 4
    assert MixObjective(speaker, PROMPTS, judge)(MIXES, 1) == expected
    assert pauses
    judge.faults = ["the connection failed"] * 1000
    with pytest.raises(UserError, match="run the same command again"):
        MixObjective(speaker, PROMPTS, judge)(MIXES, 1)
    assert sum(pauses[1:]) >= 600


def test_a_spent_judge_budget_stops_the_search(speaker, judge):
    judge.faults = [COST_CAP] * 10
    with pytest.raises(UserError, match="cost cap"):
        MixObjective(speaker, PROMPTS, judge)(MIXES, 1)
    judge.faults = [COST_CAP] * 10
    other = CountingJudge()
    other.name = "other"
    with pytest.raises(UserError, match="cost cap"):
        MixObjective(speaker, PROMPTS, MultiJudge([other, judge]))(MIXES, 1)


def test_what_was_asked_ahead_is_not_asked_again(judge):
    remembering = objective.RememberingJudge(judge)
    exchanges = [Exchange("q", text) for text in ("one", "two", "one")]
    remembering.ask_ahead(exchanges[:2])
    verdicts = remembering.verdicts(exchanges)
    assert [len(judge.asked), verdicts[0]] == [2, verdicts[2]]


@pytest.mark.parametrize("ending", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("while_it", ["answers", "waits for the judge"])
def test_a_search_that_is_told_to_end_waits_for_one_batch_of_the_judge(
    speaker, monkeypatch, ending, while_it
):
    begun, goes_on, asked = Event(), Event(), []

    class Slow(CountingJudge):
        def judge(self, exchanges, criterion):
            asked.append(exchanges)
            begun.set()
            assert goes_on.wait(60)
            return super().judge(exchanges, criterion)

    goal = MixObjective(speaker, PROMPTS, Slow())
    plain = goal._judge.verdicts

    def answers(rows, *, on_batch):
        for at in range(len(rows)):
            on_batch([Exchange("q?", f"answer {at}")])
        assert begun.wait(60)
        if while_it == "answers":
            raise ending
        return [Exchange("q?", f"answer {at}") for at in range(len(rows))]

    def verdicts(exchanges):
        def told(*_):
            raise ending

        monkeypatch.setattr(objective.Future, "result", told)  # as a signal in the main thread
        return plain(exchanges)

    monkeypatch.setattr(Speaker, "answers", lambda _, rows, **more: answers(rows, **more))
    monkeypatch.setattr(goal._judge, "verdicts", verdicts)
    with pytest.raises(ending):
        goal(MIXES, 1)
    goes_on.set()
    goal._judge._pool.shutdown(wait=True)
    assert len(asked) == 1  # of twelve that were asked ahead


def test_impossible_options_are_named(speaker, judge):
    with pytest.raises(UserError, match="penalty"):
        ObjectiveOptions(penalty=-1.0)
    with pytest.raises(UserError, match="at least one prompt"):
        MixObjective(speaker, (), judge)
