"""The likelihood judge: anchored on held-out utterances, by what makes an answer likelier."""

from __future__ import annotations

import numpy as np
import pytest
from peft import PeftModel

from persona_lora.core.chat import Exchange
from persona_lora.core.errors import UserError
from persona_lora.core.personas import Persona, PersonaConversation
from persona_lora.judges.coherence import CoherenceScorer
from persona_lora.judges.persona_judges import (
    fit_coherence,
    fit_likelihood_judge,
    likelihood_contrast,
)
from persona_lora.models.likelihood import mean_logprobs
from persona_lora.models.loading import ChatModel


def person(name, tmp_path, lines):
    turns = [
        {"role": role, "content": text}
        for line in lines
        for role, text in (("assistant", "And?"), ("user", line))
    ]
    return Persona(name, tmp_path, (PersonaConversation("t", "test", turns),))


@pytest.fixture
def people(tmp_path):
    shouts = person("ann", tmp_path, ["So great!!", "Go on!", "Yes!!!"])
    return [shouts, person("bob", tmp_path, ["perhaps", "i suppose", "well"])]


def marks(exchanges):
    return [each.answer.count("!") for each in exchanges]


def test_what_is_likelier_of_the_person_fits_better(people):
    judge, (check,) = fit_likelihood_judge(people[0], people, marks, seed=0)
    answers = ("Never!!", "never", "?!", "")
    loud, calm, no_word, empty = judge.judge([Exchange("Hi?", each) for each in answers])
    assert loud.score == pytest.approx(4.5)  # two marks are the mean of ann's
    assert calm.score == pytest.approx(1.5)  # none are that of bob's
    assert (no_word.score, empty.score) == (None, None)
    assert (check.auc, check.n_own, check.n_others) == (1.0, 3, 3)
    with pytest.raises(UserError, match="'evil'"):
        judge.judge([Exchange("Hi?", "Yes.")], "evil")


def test_a_person_whom_the_model_does_not_know_is_refused(people):
    with pytest.raises(UserError, match="--report-judge embedding"):
        fit_likelihood_judge(people[1], people, marks, seed=0)


def test_the_contrast_is_what_being_told_changes(chat_model):
    exchanges = [Exchange("Hi?", "Yes."), Exchange("Why?", "No, never.")]
    told = mean_logprobs(chat_model, exchanges, "You are Ann.")
    plain = mean_logprobs(chat_model, exchanges)
    found = likelihood_contrast(chat_model, "You are Ann.")(exchanges)
    assert found == pytest.approx(list(np.subtract(told, plain)))
    assert found != [0.0, 0.0]


def test_contrast_and_coherence_ask_the_model_without_its_adapter(
    chat_model, make_adapter, tmp_path, monkeypatch
):
    exchanges = [Exchange("Hi?", "Yes."), Exchange("Why?", "No, never.")]
    bare = mean_logprobs(chat_model, exchanges)
    plain = likelihood_contrast(chat_model, "You are Ann.")(exchanges)
    adapter = make_adapter(tmp_path / "adapter", chat_model.model, seed=1)
    worn = ChatModel(
        PeftModel.from_pretrained(chat_model.model, adapter), chat_model.tokenizer, "tiny"
    )
    assert likelihood_contrast(worn, "You are Ann.")(exchanges) == pytest.approx(plain)
    monkeypatch.setattr(CoherenceScorer, "fit", lambda _, *, mean_logprob, **others: mean_logprob)
    assert fit_coherence(worn, ["evil"])(exchanges) == pytest.approx(bare)
    assert mean_logprobs(worn, exchanges) != pytest.approx(bare)
