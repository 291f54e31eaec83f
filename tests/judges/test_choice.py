"""Judging a run: what nobody could score is no result, and one account holds for a command."""

from __future__ import annotations

import dataclasses
import math
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from persona_lora.core.chat import COHERENCE, Exchange, Verdict
from persona_lora.core.errors import UserError
from persona_lora.core.resources import resource_path
from persona_lora.core.runs import Run
from persona_lora.core.settings import read_yaml
from persona_lora.core.traits import list_traits, load_pairs, load_trait
from persona_lora.judges import choice
from persona_lora.judges.choice import JudgeOptions, make_judge, second_name
from persona_lora.judges.embedding import exchanges_of
from persona_lora.judges.labels import load_ratings
from persona_lora.judges.openai import Limits
from persona_lora.judges.persona_judges import make_readers
from persona_lora.judges.verdicts import Judges, judge_answers
from persona_lora.models import embeddings, loading
from persona_lora.steering.bank import steer_live
from tests.judges.rated import rated_rows, write_ratings


class ScriptedJudge:
    """Scores what is in ``scores`` by the criterion, and nothing else."""

    name = "scripted"

    def __init__(self, **scores):
        self.scores = scores

    def judge(self, exchanges, criterion):
        score = self.scores.get(criterion)
        reason = "" if score is not None else "no reply within 1 s"
        return [Verdict(criterion, score, reason, self.name) for _ in exchanges]


@pytest.fixture
def trait(datasets):
    return load_trait("cheer", datasets)


@pytest.fixture
def run(tmp_path):
    run = Run.open(tmp_path / "run", command="evaluate", config={}, seed=0)
    run.write("answers", [{"row": row, "question": "q?", "answer": f"a{row}"} for row in range(3)])
    return run


@pytest.mark.parametrize("scores", [{}, {"cheer": 50.0}], ids=["nothing", "the trait alone"])
def test_nothing_scored_is_no_result(run, trait, scores):
    with pytest.raises(UserError, match=r"none of 3 answers on \w+: no reply within 1 s \(3\)"):
        judge_answers(run, lambda: ScriptedJudge(**scores), trait)
    assert {row["reason"] for row in run.read("verdicts") if row["score"] is None} == {
        "no reply within 1 s"
    }
    mended = ScriptedJudge(**{"cheer": 50.0, COHERENCE: 80.0})
    judge_answers(run, lambda: mended, trait)
    assert {row["score"] for row in run.read("verdicts")} == {50.0, 80.0}


@pytest.mark.parametrize(("model", "fit"), [("hub/Small", False), ("large", True), ("new", True)])
def test_a_judge_that_is_unfit_on_the_run_s_own_model_is_marked(
    tmp_path, trait, model, fit, caplog
):
    rows = [
        {**row, "model": "large" if at % 5 else "small", "condition": "unsteered"}
        for at, row in enumerate(rated_rows())
    ]
    write_ratings(trait, rows)
    rated = {each.exchange: each for each in load_ratings(trait, "validation")}

    class Biased(ScriptedJudge):
        """Right about the large model, of the small one it says the opposite."""

        def judge(self, exchanges, criterion):
            said = [rated.get(each) for each in exchanges]
            signs = [1 if row is None or row.model == "large" else -1 for row in said]
            scores = [
                50.0 if row is None else 50 + sign * (row.rating("trait") - 50)
                for row, sign in zip(said, signs, strict=True)
            ]
            return [Verdict(criterion, score, "", self.name) for score in scores]

    run = Run.open(tmp_path / "run", command="sweep", config={"model": model}, seed=0)
    run.write("answers", [{"row": 0, "question": "q?", "answer": "a"}])
    judge_answers(run, Biased, trait)
    validation, coherence = run.read("validation")
    assert validation["own"]["within"] > 0.5
    assert (validation["fit"], coherence["fit"]) == (fit, False)  # it knows nothing of sense
    assert ("answers of hub/Small is" in caplog.text) is not fit
    (judge,) = {row["judge"] for row in run.read("verdicts") if row["criterion"] == "cheer"}
    assert judge == ("scripted" if fit else "scripted (unfit for cheer)")


def test_one_account_holds_for_all_judges_of_a_command(trait, server):
    server.replies.extend(["50"] * 10)
    options = JudgeOptions(
        judge="openai",
        judge_model="m",
        judge_url=server.url,
        judge_mode="number",
        limits=Limits(max_requests=3),
    )
    judges = [make_judge(trait, None, options) for _ in range(2)]
    run = [
        judge.judge([Exchange("q?", f"{name}{at}") for at in range(2)], "cheer")
        for name, judge in zip("ab", judges, strict=True)
    ]
    assert len(server.bodies) == 3
    assert [verdict.reason for verdicts in run for verdict in verdicts].count(
        "request cap reached"
    ) == 1


def test_a_run_is_of_its_embedder_and_of_its_judge_s_commit(tmp_path, monkeypatch):
    def embedded() -> str:
        embeddings.embedder_content.cache_clear()
        return choice.judge_inputs(JudgeOptions("embedding"))["the sentence embedder"]

    def judged(name: str) -> dict[str, str]:
        found = choice.judge_inputs(JudgeOptions("local", judge_model=name))
        yes = choice.judge_inputs(JudgeOptions("local-yes", judge_model=name))
        assert found["the judge's model"] == yes["the judge's model"]
        assert found["the judge"] != yes["the judge"]
        return found

    ours = embedded()
    (tmp_path / "model.safetensors").write_bytes(b"other weights")
    with monkeypatch.context() as patch:
        patch.setattr(embeddings, "packaged_embedder_folder", lambda: tmp_path)
        assert embedded() != ours
    assert embedded() == ours
    assert "the sentence embedder" not in judged(str(tmp_path))
    before = judged(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"trained on")
    assert judged(str(tmp_path)) != before
    for commit in ("abc", "def"):
        place = tmp_path / "snapshots" / commit / "config.json"
        monkeypatch.setattr(loading, "hf_hub_download", lambda *_, place=place: str(place))
        assert judged("somebody/judge")["the judge's model"] == commit


def test_a_local_judge_that_there_is_not_is_refused_before_anything_is_asked():
    with pytest.raises(UserError, match="'nobody/nothing' is not a local folder and the model hub"):
        choice.judge_inputs(JudgeOptions("local", judge_model="nobody/nothing"))


class Named(ScriptedJudge):
    """Counts what it is asked."""

    def __init__(self, name, **scores):
        super().__init__(**scores)
        self.name, self.asked = name, []

    def judge(self, exchanges, criterion):
        self.asked += [(each.question, each.answer, criterion) for each in exchanges]
        return super().judge(exchanges, criterion)


def test_a_second_judge_stands_apart_and_equal_answers_are_asked_once(run, trait):
    run.write("answers", [{"row": row, "question": "q?", "answer": "a"} for row in range(3)])
    first, second = Named("one", cheer=50.0, coherence=80.0), Named("two", cheer=10.0)
    judges = Judges(lambda: first, lambda: second)
    judge_answers(run, judges, trait)
    rows = {each: run.read(f"{each}verdicts") for each in ("", "second_")}
    assert [(row["judge"], row["score"]) for row in rows["second_"]] == [("two", 10.0)] * 3
    assert {row["score"] for row in rows[""]} == {50.0, 80.0}
    for judge, criteria in ((first, ["cheer", COHERENCE]), (second, ["cheer"])):
        assert [each for each in judge.asked if each[1] == "a"] == [
            ("q?", "a", criterion) for criterion in criteria
        ]
        assert {each[2] for each in judge.asked} == set(criteria)
    assert {row["judge"] for row in run.read("second_canaries")} == {"two"}
    assert [(row["judge"], row["answers"]) for row in run.read("judging")] == [
        ("one", 2),
        ("two", 1),
    ]
    judge_answers(run, Judges(pytest.fail, pytest.fail), trait)  # nothing is left to judge
    run.write("second_verdicts", rows["second_"][:2])
    third = Named("two", cheer=30.0)
    judge_answers(run, Judges(pytest.fail, lambda: third), trait)
    assert [row["score"] for row in run.read("second_verdicts")] == [10.0, 10.0, 30.0]


def test_a_second_judge_that_scores_nothing_says_how_to_go_on_without(run, trait):
    first = Named("one", cheer=50.0, coherence=80.0)
    with pytest.raises(UserError, match="goes on without it with --second-judge none"):
        judge_answers(run, Judges(lambda: first, lambda: Named("two")), trait)
    judge_answers(run, Judges(pytest.fail), trait)


def test_who_judges_beside_is_of_another_kind_and_has_what_it_needs(trait):
    def beside(judge, second=None, **more):
        return second_name(trait, JudgeOptions(judge, second_judge=second, **more))

    (trait.folder / "train.jsonl").unlink(missing_ok=True)
    assert beside("openai") is None
    with pytest.raises(UserError, match=r"no train.jsonl, so embedding cannot judge it beside loc"):
        beside("local", "embedding")
    (trait.folder / "train.jsonl").write_text("{}\n")
    assert beside("openai") == "embedding"
    assert beside("reader") is None  # without ratings the classifier judges in its place
    assert beside("embedding", "none") is None
    assert JudgeOptions().second_judge == "none"
    for judge, second, message in (
        ("embedding", "embedding", "--second-judge embedding judges cheer already"),
        ("reader", "embedding", "--second-judge embedding judges cheer already"),
        ("openai", "reader", "no onpolicy.jsonl, so reader cannot judge it beside openai"),
        ("openai", "opnai", "no judge 'opnai' for --second-judge; did you mean 'openai'"),
    ):
        with pytest.raises(UserError, match=message):
            beside(judge, second)
    with pytest.raises(UserError, match="--judge-model names one model"):
        beside("openai", "local", judge_model="m")
    with pytest.raises(UserError, match="both openai and local"):
        beside("local-yes", "openai", judge_model="m")
    assert beside("local", "local-yes", judge_model="m") == "local-yes"


def test_a_run_is_of_its_second_judge_unless_there_is_none():
    def read(second):
        return choice.judge_inputs(JudgeOptions("openai", judge_model="m", second_judge=second))

    assert "the second judge" not in read("none")
    assert len({read(each)["the second judge"] for each in (None, "embedding", "reader")}) == 3


def test_coherence_is_scaled_by_answers_of_every_trait(chat_model, tmp_path, monkeypatch):
    asked = []
    traits = [load_trait(name) for name in list_traits()]
    held = [each for each in traits if (each.folder / "train.jsonl").is_file()]
    written = {
        one.answer for each in held for sign in exchanges_of(load_pairs(each)) for one in sign
    }

    def sentences_are_likelier(model, exchanges):
        asked.append(exchanges)
        whole = [each.answer in written or each.answer.endswith(".") for each in exchanges]
        return [-1.0 - at / 1000 if each else -3.0 for at, each in enumerate(whole)]

    monkeypatch.setattr(choice, "mean_logprobs", sentences_are_likelier)
    scorer = choice.coherence_scorer(chat_model)
    answers = {each.answer for each in asked[0]}
    assert len(held) > 5
    for each in held:
        signs = exchanges_of(load_pairs(each))
        assert all(answers & {one.answer for one in sign} for sign in signs), each.name
    said = Exchange("Why?", "Because the plan is good, and the weather is better.")
    loop = Exchange("Why?", "so good so good so good so good so good so good so good so good.")
    good, bad = (each.score for each in scorer.verdicts([said, loop], COHERENCE))
    assert bad < 50 < good
    with pytest.raises(UserError, match=r"no trait has a train\.jsonl"):
        choice.coherence_scorer(chat_model, tmp_path)


def local_words(chat_model, trait, as_judge_of):
    """Return what reads the next words of a message, of a trait's local judge or of a person's."""
    if as_judge_of == "a person":
        return make_readers(JudgeOptions(judge="local"), chat_model)["local"].read
    options = JudgeOptions(judge="local-yes" if as_judge_of == "a trait, by yes" else "local")
    return make_judge(trait, chat_model, options).reader.reader.next_token_logprobs


@pytest.mark.parametrize("as_judge_of", ["a trait", "a trait, by yes", "a person"])
def test_a_local_judge_is_the_asked_model_without_its_adapter(
    chat_model, trait, make_adapter, tmp_path, as_judge_of
):
    plain = local_words(chat_model, trait, as_judge_of)(["Is it so?"])
    folder = make_adapter(tmp_path / "adapter", chat_model.model, seed=1)
    worn = PeftModel.from_pretrained(chat_model.model, str(folder))
    finetuned = dataclasses.replace(chat_model, model=worn)
    assert local_words(finetuned, trait, as_judge_of)(["Is it so?"]) == plain


def test_a_local_judge_asks_nothing_twice_and_another_model_anew(
    chat_model, trait, tmp_path, monkeypatch
):
    def judged(judge, model=chat_model):
        options = JudgeOptions(judge=judge, cache=tmp_path / "kept.sqlite")
        return make_judge(trait, model, options).judge([Exchange("Why?", "Because.")], trait.name)

    asked = []

    def first(model, replies, **more):
        asked.append(len(replies))
        return [{"Yes": math.log(0.6), "No": math.log(0.2), "80": math.log(0.2)} for _ in replies]

    monkeypatch.setattr(choice, "next_token_logprobs", first)
    (verdict,) = judged("local-yes")
    assert verdict.score == pytest.approx(75.0)
    assert judged("local-yes") == [verdict]
    assert len(asked) == 1
    judged("local")  # the same model, asked otherwise
    assert len(asked) == 2
    with torch.no_grad():
        chat_model.model.get_input_embeddings().weight[0, 0] += 1
    judged("local-yes")
    assert len(asked) == 3


def test_two_local_judges_share_one_model(chat_model, trait, monkeypatch):
    loaded = []

    def load(name, **more):
        loaded.append(name)
        return dataclasses.replace(chat_model, name=name)

    monkeypatch.setattr(choice, "load_chat_model", load)
    options = JudgeOptions(judge="local", second_judge="local-yes", judge_model="wise")
    judges = choice.make_judges(trait, chat_model, options)
    assert judges.first().name == "local:wise"
    assert judges.second().name == "local-yes:wise"
    assert loaded == ["wise"]


@pytest.mark.parametrize("as_judge_of", ["a trait", "a trait, by yes", "a person"])
def test_a_local_judge_waits_while_another_thread_steers_the_model(
    chat_model, trait, make_diff, as_judge_of
):
    """As in a search, whose judge reads answers while the next batch is generated."""
    read = local_words(chat_model, trait, as_judge_of)
    plain, diff = read(["Is it so?"]), make_diff(chat_model.model, seed=1, scale=0.3)
    with ThreadPoolExecutor(1) as thread:
        with steer_live(chat_model, {diff: 1.0}):
            found = thread.submit(read, ["Is it so?"])
            wait([found], timeout=1)
        assert found.result() == plain


def test_the_configuration_for_an_endpoint_takes_a_model_of_unknown_prices():
    path = resource_path(Path("train_configs/optimize_svd_endpoint.yaml"))
    options = JudgeOptions(**read_yaml(path)["judge"], judge_model="my-model")
    assert options.budget.usage().dollars is None
