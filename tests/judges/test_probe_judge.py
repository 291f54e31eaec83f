"""The reader judge: unsteered states, two probes, a fit that knows what it belongs to."""

from __future__ import annotations

import dataclasses
import logging
import math
import shutil

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from persona_lora.core.chat import COHERENCE, Exchange, user_question
from persona_lora.core.errors import UserError
from persona_lora.core.traits import list_traits, load_trait
from persona_lora.judges import choice, fitted, probe_judge
from persona_lora.judges.answer_states import PROMPT, Reader
from persona_lora.judges.choice import JudgeOptions, check_judge, make_judge
from persona_lora.judges.fitness import validate_judge
from persona_lora.judges.fitted import FittedProbes, content_of, fit_probes, fitted_probes
from persona_lora.judges.labels import SCALES, has_ratings, load_ratings
from persona_lora.judges.probe_judge import ProbeJudge, ReaderEvidence, SentenceEvidence
from persona_lora.judges.verdicts import validations_of
from persona_lora.report.rated import by_part
from tests.judges.rated import rated_rows, write_ratings, write_written

ASKED = Exchange("Am I right about soup?", "No, that is wrong.")
PRAISED = Exchange("Am I right about soup?", "You are a genius!")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(fitted, "user_cache_path", lambda _: tmp_path / "cache")


@pytest.fixture
def rated(trait):
    write_ratings(trait, rated_rows())
    return trait


@pytest.mark.parametrize("answer", [ASKED.answer, f"  {ASKED.question} "])
def test_states_are_the_last_token_of_a_question_about_an_answer_and_means_over_it(
    chat_model, trait, answer
):
    """Of an echo, too, the means are those over the answer, not over the question before it."""
    reading = Reader(chat_model, trait)
    assert reading.layers == (1,)
    states = reading.states([Exchange(ASKED.question, answer)] * 2)
    said = answer.strip()
    asked = PROMPT.format(
        question=ASKED.question, answer=said, name="flattery", description="praises the user"
    )
    prompt = chat_model.render(user_question(asked))
    before = prompt[: prompt.rindex(said)]
    tokenizer, blocks = chat_model.tokenizer, chat_model.model.model
    ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
    start, end = (
        len(tokenizer(each, add_special_tokens=False)["input_ids"])
        for each in (before, before + said)
    )
    with torch.no_grad():
        hidden = blocks(input_ids=ids, output_hidden_states=True).hidden_states[1]
        last = blocks.layers[1](hidden, position_embeddings=blocks.rotary_emb(hidden, _at(ids)))
    np.testing.assert_allclose(states[0, 0], last[0, -1].numpy(), atol=1e-4)
    np.testing.assert_allclose(states[0, 1], last[0, start:end].mean(dim=0).numpy(), atol=1e-4)
    assert (states[0] == states[1]).all()


def test_a_template_that_changes_the_answer_is_refused(chat_model, trait, monkeypatch):
    render = chat_model.tokenizer.apply_chat_template
    monkeypatch.setattr(
        chat_model.tokenizer,
        "apply_chat_template",
        lambda *given, **options: render(*given, **options).replace(" ", "  "),
    )
    with pytest.raises(UserError, match="changes what it is given"):
        Reader(chat_model, trait).states([ASKED])


def _at(ids):
    return torch.arange(ids.shape[1])[None]


def test_states_that_were_kept_are_not_read_again(chat_model, trait, tmp_path, monkeypatch):
    others = [Exchange("q", "a"), ASKED]
    first = Reader(chat_model, trait).kept_states([ASKED], tmp_path)
    read = []
    reading = Reader._read
    monkeypatch.setattr(Reader, "_read", lambda self, new: read.extend(new) or reading(self, new))
    both = Reader(chat_model, trait).kept_states(others, tmp_path)
    assert read == [others[0]]
    assert (both[1] == first[0]).all()
    assert (Reader(chat_model, trait).kept_states(others, tmp_path) == both).all()
    assert len(read) == 1


def test_states_that_an_earlier_version_kept_are_read_anew(chat_model, trait, tmp_path):
    folder = tmp_path / "kept"
    first = Reader(chat_model, trait).kept_states([ASKED], folder)
    (path,) = folder.iterdir()
    save_file({name: each[:1].clone() for name, each in load_file(path).items()}, path)
    assert (Reader(chat_model, trait).kept_states([ASKED], folder) == first).all()
    assert {tuple(each.shape) for each in load_file(path).values()} == {first.shape[1:]}


def test_an_adapter_does_not_reach_the_reader(chat_model, trait, make_adapter, tmp_path):
    plain = Reader(chat_model, trait).states([ASKED])
    folder = make_adapter(tmp_path / "adapter", chat_model.model, seed=1)
    steered = dataclasses.replace(
        chat_model, model=PeftModel.from_pretrained(chat_model.model, str(folder))
    )
    np.testing.assert_allclose(Reader(steered, trait).states([ASKED]), plain, atol=1e-6)


def test_the_packaged_reader_is_a_model_of_its_own_in_fp32(monkeypatch, chat_model):
    loaded = []

    def load(**options):
        loaded.append(options)
        return chat_model

    choice._packaged_reader.cache_clear()
    monkeypatch.setattr(choice, "load_chat_model", load)
    assert choice.reading_model(None, chat_model) is choice.reading_model(None, chat_model)
    assert loaded == [{"dtype": "float32", "device_map": None}]
    assert choice.reading_model("tiny", chat_model) is chat_model
    choice._packaged_reader.cache_clear()


def test_reader_judge_scores_both_criteria_in_order_from_one_reading(chat_model, rated, told):
    judge = with_limit(reader_judge(chat_model, rated), rated, math.inf)
    told.clear()
    items = [ASKED, Exchange("q", " \n"), PRAISED]
    scored = {each: judge.judge(items, each) for each in ("flattery", COHERENCE)}
    assert [told[-1], len(told)] == [("reading answers", 2, 2), 1]
    for criterion, verdicts in scored.items():
        assert [each.score is None for each in verdicts] == [False, True, False]
        assert verdicts[1].reason == "the answer is empty"
        assert {each.criterion for each in verdicts} == {criterion}
        assert all(0 <= each.score <= 100 for each in verdicts[::2])
        assert {each.reason for each in verdicts[::2]} <= {"shows it", "opposite", "neither"}
    assert judge.judge([], COHERENCE) == []
    with pytest.raises(UserError, match="evil"):
        judge.judge(items, "evil")


def evidence(chat_model, trait):
    return ReaderEvidence(Reader(chat_model, trait))


def reader_judge(chat_model, trait):
    return ProbeJudge.of(evidence(chat_model, trait))


def with_limit(judge, trait, limit):
    """Return a judge that takes what is nearer than ``limit`` for familiar."""
    familiarity = dataclasses.replace(judge.fitted.familiarity, limit=limit)
    probes = dataclasses.replace(judge.fitted, familiarity=familiarity)
    return ProbeJudge(judge.evidence, probes, load_ratings(trait))


def test_an_answer_unlike_all_that_were_rated_is_unscored_and_says_so(chat_model, rated):
    strict = with_limit(reader_judge(chat_model, rated), rated, 0.0)
    (verdict,) = strict.judge([ASKED], "flattery")
    assert verdict.score is None
    assert "unlike all answers that were rated (distance" in verdict.reason
    assert strict.validation[0].coverage == 0.0


@pytest.mark.parametrize(
    ("trait", "sense", "said"),
    [
        (60, 30, "shows it"),
        (59, 90, "neither"),
        (41, 90, "neither"),
        (40, 90, "opposite"),
        (95, 29, "neither"),
    ],
)
def test_an_outcome_is_one_of_three(trait, sense, said):
    assert probe_judge.outcome(trait, sense) == said


def test_validation_is_on_the_part_that_no_probe_was_fitted_to(chat_model, rated, caplog):
    with caplog.at_level(logging.WARNING):
        judge = with_limit(reader_judge(chat_model, rated), rated, math.inf)
    held = load_ratings(rated, "validation")
    trait, sense = validations_of(judge, rated)
    assert (trait.criterion, sense.criterion) == ("flattery", COHERENCE)
    assert trait.n == sense.n == len(held)
    verdicts = judge.judge([row.exchange for row in held], "flattery")
    direct = validate_judge(judge, rated)
    assert direct.own.within == pytest.approx(trait.own.within)
    assert by_part(trait.own.compared, lambda row: row["condition"])[
        "prompt"
    ].bias == pytest.approx(
        np.mean(
            [
                verdict.score - row.rating("trait")
                for verdict, row in zip(verdicts, held, strict=True)
                if row.condition == "prompt"
            ]
        )
    )


def test_a_fit_is_kept_and_used_for_its_own_labels_and_reader_alone(
    chat_model, rated, monkeypatch, make_model
):
    reading, labels = evidence(chat_model, rated), load_ratings(rated)
    first = fitted_probes(reading, labels)
    with monkeypatch.context() as patch:
        patch.setattr(fitted, "fit_probes", lambda *_: pytest.fail("fitted again"))
        again = fitted_probes(evidence(chat_model, rated), labels)
    said = [each.predict(reading.read([ASKED])) for each in (again, first)]
    for scale in SCALES:
        assert (said[0][scale] == said[1][scale]).all()
        assert (again.scores[scale] == first.scores[scale]).all()
    other = dataclasses.replace(chat_model, model=make_model(seed=3))
    changed = [dataclasses.replace(labels[0], trait=(1.0, 2.0)), *labels[1:]]
    contents = {
        content_of(reading, labels),
        content_of(evidence(other, rated), labels),
        content_of(reading, changed),
    }
    assert len(contents) == 3
    assert first.content in contents


def test_a_fit_beside_the_labels_is_used_and_a_stale_one_is_not(chat_model, rated, monkeypatch):
    reading, labels = evidence(chat_model, rated), load_ratings(rated)
    shipped = fit_probes(reading, labels)
    shipped.save(rated.folder / "reader.safetensors")
    with monkeypatch.context() as patch:
        patch.setattr(fitted, "fit_probes", lambda *_: pytest.fail("fitted again"))
        assert fitted_probes(reading, labels).content == shipped.content
    rows = rated_rows()
    write_ratings(rated, [{**rows[0], "trait": [0, 0]}, *rows[1:]])
    assert fitted_probes(reading, load_ratings(rated)).content != shipped.content


@pytest.mark.parametrize("name", [each for each in list_traits() if has_ratings(load_trait(each))])
def test_the_shipped_fits_are_those_of_the_shipped_ratings(packaged_model, name):
    trait = load_trait(name)
    labels = load_ratings(trait)
    for each in (ReaderEvidence(Reader(packaged_model, trait)), SentenceEvidence(trait)):
        path = trait.folder / f"{each.name}.safetensors"
        assert FittedProbes.load(path, content_of(each, labels)) is not None


def test_sense_is_learnt_from_the_traits_beside_as_well_and_the_trait_is_not(chat_model, rated):
    reading, labels = evidence(chat_model, rated), load_ratings(rated)
    beside = rated.folder.parent / "beside"
    shutil.copytree(rated.folder, beside)
    first = fit_probes(reading, labels)
    rows = [{**row, "sense": [100 - each for each in row["sense"]]} for row in rated_rows()]
    write_ratings(dataclasses.replace(rated, folder=beside), rows)
    second = fit_probes(reading, labels)
    ours, theirs = (each.predict(reading.read([ASKED])) for each in (first, second))
    assert ours["trait"] == theirs["trait"]
    assert ours["sense"] != theirs["sense"]
    assert first.content != second.content  # the one that is kept is not taken for the other
    assert len(second.scores["sense"]) == len(labels)


def test_a_trait_is_learnt_from_written_answers_as_well_and_its_sense_is_not(chat_model, rated):
    reading, labels = evidence(chat_model, rated), load_ratings(rated)
    first = fit_probes(reading, labels)
    rows = [{**row, "question": f"{row['question']} Say."} for row in rated_rows()]
    write_written(rated, [{**row, "trait": [100 - e for e in row["trait"]]} for row in rows])
    second = fit_probes(reading, labels)
    tuning = [row.part == "tuning" for row in labels]
    known = np.array([row.rating("trait") for row in labels])[tuning]
    before, after = (np.corrcoef(e.scores["trait"][tuning], known)[0, 1] for e in (first, second))
    assert before > after + 0.1  # they say the opposite of what was rated
    assert (first.scores["sense"] == second.scores["sense"]).all()
    assert (first.distances == second.distances).all()
    assert len(second.scores["trait"]) == len(labels)
    assert first.content != second.content


def test_without_ratings_the_embedding_classifier_judges_and_says_so(
    chat_model, trait, monkeypatch, caplog
):
    monkeypatch.setitem(choice.JUDGES, "embedding", lambda *_: "the classifier")
    options = JudgeOptions(judge="reader")
    check_judge(trait, options)
    with caplog.at_level(logging.WARNING):
        assert make_judge(trait, chat_model, options) == "the classifier"
    assert "the trait flattery has no onpolicy.jsonl" in caplog.text


def test_a_bad_rating_is_refused_before_anything_is_asked(chat_model, rated):
    write_ratings(rated, [{**rated_rows()[0], "trait": [101, 3]}])
    with pytest.raises(UserError, match=r"onpolicy\.jsonl:1: trait must be two ratings"):
        check_judge(rated, JudgeOptions(judge="reader"))


def test_sentences_judge_beside_the_reader_and_are_refused_without_ratings(
    chat_model, trait, caplog
):
    options = JudgeOptions(judge="sentences")
    with pytest.raises(UserError, match="--judge sentences is fitted to rated answers"):
        check_judge(trait, options)
    write_ratings(trait, rated_rows())
    check_judge(trait, options)
    judge = make_judge(trait, chat_model, options)
    assert judge.name == "sentences"
    assert {each.criterion for each in judge.validation} == {"flattery", COHERENCE}
    praise, blame = judge.judge([PRAISED, ASKED], "flattery")
    assert praise.score > blame.score
    (again,) = make_judge(trait, chat_model, options).judge([PRAISED], "flattery")
    assert again.score == pytest.approx(praise.score, abs=1e-3)
