"""A race of wordings: the planted best one wins, on tuning questions alone; resume; mistakes."""

from __future__ import annotations

import dataclasses

import pytest

from persona_lora.core.chat import COHERENCE, Exchange, Verdict
from persona_lora.core.errors import UserError
from persona_lora.core.runs import Output, Run
from persona_lora.core.traits import load_trait, neutral_prompt
from persona_lora.judges import choice
from persona_lora.studies.asking import prompt_tuning
from persona_lora.studies.asking.prompt_tuning import tune_prompt, tuned_table, wordings_of


class PlantedJudge:
    """Likes answers that one wording was asked for; some are no sense."""

    name = "planted"

    def __init__(self, best, senseless=()):
        self.best, self.senseless, self.asked = best, senseless, set()

    def judge(self, exchanges, criterion):
        self.asked |= {each.question for each in exchanges}
        if criterion == COHERENCE:
            scores = [10.0 if each.answer in self.senseless else 90.0 for each in exchanges]
        else:
            scores = [80.0 if self.best in each.answer else 40.0 for each in exchanges]
        return [Verdict(criterion, score, "", self.name) for score in scores]


@pytest.fixture
def trait(make_world, tmp_path):
    make_world(tmp_path)
    trait = load_trait("cheer", tmp_path / "datasets")
    pairs = trait.instructions * 2
    pairs = (pairs[0], dataclasses.replace(pairs[1], pos="Sing.", neg="Weep."))
    many = {split: tuple(f"{split} {at}?" for at in range(20)) for split in ("extract", "eval")}
    return dataclasses.replace(trait, instructions=pairs, questions=many)


@pytest.fixture
def echoed(monkeypatch):
    """Let every answer be the system prompt that it was asked under; count them."""
    seen = []

    def answer(chat_model, plan, steerer, run, options):
        rows = [
            {
                "row": at,
                "question_id": row.stream // 1000,
                "question": row.question,
                "sample": 0,
                "method": row.condition.method,
                "coefficient": None,
                "layer": None,
                "prompt": row.question,
                "answer": row.system_prompt or "so",
            }
            for at, row in enumerate(plan)
        ]
        seen.extend(rows if not run.read("answers") else [])
        run.write("answers", rows)

    monkeypatch.setattr(prompt_tuning, "answer_rows", answer)
    monkeypatch.setattr(prompt_tuning, "judge_answers", judged)
    return seen


def judged(run, make, trait):
    judge, answers = make(), run.read("answers")
    exchanges = [exchange_of(each) for each in answers]
    run.write("verdicts", [
        {"row": row["row"], **dataclasses.asdict(verdict)}
        for criterion in (trait.name, COHERENCE)
        for row, verdict in zip(answers, judge.judge(exchanges, criterion), strict=True)
    ])  # fmt: skip


def exchange_of(row):
    return Exchange(row["question"], row["answer"])


@pytest.mark.parametrize(("sign", "wanted"), [("pos", "Sing."), ("neg", "Weep.")])
def test_the_best_wording_wins_and_is_reported_held_out(
    sign, wanted, trait, chat_model, echoed, tmp_path
):
    best = f"{wanted} This comes before everything else"
    judge = PlantedJudge(best)
    if sign == "neg":  # against the trait: the lowest scores win
        judge.judge = lambda exchanges, criterion: [
            Verdict(
                criterion, 10.0 if best in e.answer and criterion != COHERENCE else 60.0, "", "p"
            )
            for e in exchanges
        ]
    output = Output(tmp_path / "out")
    found = tune_prompt(chat_model, trait, lambda: judge, output, sign=sign)
    assert found.wording == "stressed 1"
    assert (
        found.prompt
        == (tmp_path / "out/prompt.txt").read_text()
        == wordings_of(trait, sign)["stressed 1"]
    )
    tuning = [row for row in echoed if row["question"].startswith("extract")]
    assert (
        len(tuning) == (1 + 8) * 4 + (1 + 4) * 4 + (1 + 2) * 8
    )  # no prompt, and what is halved twice, each time on as many questions again
    assert {row["question"].split()[0] for row in echoed[len(tuning) :]} == {"eval"}
    cells = {row[0]: row for row in tuned_table(found, "cheer").rows}
    assert cells["tuned"][1].startswith("80" if sign == "pos" else "10")
    assert cells["the trait's own"][1].startswith("40" if sign == "pos" else "60")
    assert cells["tuned"][3].startswith("40" if sign == "pos" else "−50"), cells
    assert [cells[name][4:] for name in ("no prompt", "tuned")] == [
        ("20", "1.000"), ("20", "< 0.001"),
    ]  # fmt: skip
    assert cells["neutral"][5] == "–"  # described, and no test takes from the tuned prompt's
    held_out = [row for row in echoed if row["question"].startswith("eval")]
    told = [row["answer"] for row in held_out if row["method"] == "prompt_neutral"]
    assert told == [neutral_prompt(at) for at in range(len(told))]
    asked = len(echoed)
    again = tune_prompt(chat_model, trait, lambda: judge, output, sign=sign)
    assert (again.prompt, len(echoed)) == (found.prompt, asked)


def test_a_wording_that_makes_no_sense_does_not_win(trait, chat_model, echoed, tmp_path):
    plain = wordings_of(trait, "pos")["plain 1"]
    judge = PlantedJudge(plain, senseless={plain})  # in all wordings of it, one of them is no sense
    found = tune_prompt(chat_model, trait, lambda: judge, Output(tmp_path / "out"))
    assert found.wording != "plain 1"
    assert plain in found.prompt


@pytest.mark.parametrize(("plain", "wins"), [(90.0, False), (28.0, True)])
def test_sense_is_asked_of_a_wording_as_of_the_unprompted_model(
    plain, wins, trait, chat_model, echoed, tmp_path
):
    best = "Sing. This comes before everything else"
    planted = PlantedJudge(best)

    def judge(exchanges, criterion):
        if criterion != COHERENCE:
            return PlantedJudge.judge(planted, exchanges, criterion)
        sense = {"so": plain}
        sense |= {each.answer: 21.0 for each in exchanges if best in each.answer}
        scores = [sense.get(each.answer, 90.0) for each in exchanges]
        return [Verdict(criterion, score, "", "planted") for score in scores]

    planted.judge = judge
    found = tune_prompt(chat_model, trait, lambda: planted, Output(tmp_path / "out"))
    assert (found.wording == "stressed 1") is wins


def test_a_trait_without_prompts_is_refused(trait):
    with pytest.raises(UserError, match="no system prompts"):
        wordings_of(dataclasses.replace(trait, instructions=()), "pos")


def test_from_the_command_line_answers_are_those_of_evaluate(run, trait, tmp_path, monkeypatch):
    class Letters:
        name = "letters"

        def judge(self, exchanges, criterion):
            return [
                Verdict(criterion, float(sum(map(ord, e.answer)) % 101), "", self.name)
                for e in exchanges
            ]

    monkeypatch.setitem(choice.JUDGES, "embedding", lambda *_: Letters())
    words = (
        *("--trait", "cheer", "--datasets-dir", "datasets", "--model", "model"),
        *("--dtype", "float32", "--max-new-tokens", 4),
    )
    status, out, error = run("tune-prompt", *words, "--output", "out")
    assert status == 0, error
    prompt = (tmp_path / "out/prompt.txt").read_text()
    assert prompt.splitlines()[0] in out
    assert all(name in out for name in ("no prompt", "the trait's own", "tuned"))
    status, _, error = run("evaluate", *words, "--system-prompt", prompt, "--output", "e.csv")
    assert status == 0, error
    held_out = Run(tmp_path / "out/held_out").read("answers")
    tuned = [row["answer"] for row in held_out if row["method"] == "prompt"]
    assert tuned == [row["answer"] for row in Run(tmp_path / "e").read("answers")]
