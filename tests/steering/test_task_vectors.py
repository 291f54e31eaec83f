"""Task vectors of rank 1: the identity that defines them, against loops; what they do; mistakes."""

from __future__ import annotations

import pytest
import torch

from persona_lora.core.chat import Exchange
from persona_lora.core.errors import UserError
from persona_lora.core.lora_diff import LoRADiff
from persona_lora.models.hidden_states import stream_hidden_means
from persona_lora.models.likelihood import tokenize_exchange
from persona_lora.models.structure import decoder_linear_modules
from persona_lora.steering.bank import steer_live, steer_merged
from persona_lora.steering.task_vectors import mean_inputs, task_vector

QUESTIONS = ["Is tea good?", "Why do birds sing so early?", "Who?"]
YES = [Exchange(each, "Yes! Yes, of course!") for each in QUESTIONS]
NO = [Exchange(each, "no. no, nothing at all.") for each in QUESTIONS]


@pytest.fixture
def sides(chat_model):
    return [[tokenize_exchange(chat_model, each) for each in side] for side in (YES, NO)]


def inputs_by_loop(chat_model, texts):
    """One text at a time, without padding: the mean over texts of the answer tokens' mean."""
    found = {}
    for text in texts:
        handles = [
            module.register_forward_pre_hook(
                lambda _, given, name=name, start=len(text.prompt): found.setdefault(
                    name, []
                ).append(given[0][0, start:].mean(dim=0))
            )
            for name, module in decoder_linear_modules(chat_model.model).items()
        ]
        with torch.no_grad():
            chat_model.model(input_ids=torch.tensor([[*text.prompt, *text.answer]]))
        for handle in handles:
            handle.remove()
    return {name: torch.stack(each).mean(dim=0) for name, each in found.items()}


def test_inputs_are_those_of_a_loop_over_texts(chat_model, sides):
    expected = inputs_by_loop(chat_model, sides[0])
    found = mean_inputs(chat_model, sides[0])
    assert found.keys() == expected.keys()
    for name, each in found.items():
        torch.testing.assert_close(each, expected[name], rtol=1e-4, atol=1e-5)


def test_the_mean_input_gets_the_difference_of_outputs(chat_model, sides, tmp_path):
    diff = task_vector(chat_model, *sides, trait="cheer")
    yes, no = (inputs_by_loop(chat_model, side) for side in sides)
    modules = decoder_linear_modules(chat_model.model)
    assert diff.factors.keys() == modules.keys()
    assert diff.rank == 1
    for name, factors in diff.factors.items():
        wanted = modules[name].weight @ (yes[name] - no[name])
        got = factors.delta() @ ((yes[name] + no[name]) / 2)
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-5)
    swapped = task_vector(chat_model, *reversed(sides))
    assert (diff + swapped).norm() < 1e-5 * diff.norm()
    again = LoRADiff.load(diff.save(tmp_path / "diff"))
    assert (again - diff).norm() == 0
    assert again.trait == "cheer"


@pytest.mark.parametrize("steer", [steer_live, steer_merged])
def test_it_moves_states_from_negative_towards_positive_answers(chat_model, sides, steer):
    diff = task_vector(chat_model, *sides).at(0)

    def state(texts):
        found = stream_hidden_means(chat_model, texts, positions=["response_avg"], layers=[0])
        return torch.cat([each.means for each in found])[:, 0, 0].mean(dim=0)

    towards, before, along = state(sides[0]) - state(sides[1]), state([*sides[0], *sides[1]]), []
    for coefficient in (-0.1, 0.1):
        with steer(chat_model, {diff: coefficient}):
            moved = state([*sides[0], *sides[1]]) - before
        along.append(float(torch.cosine_similarity(moved, towards, dim=0)))
    assert along[0] < -0.5
    assert along[1] > 0.5


def test_sides_that_say_nothing_are_refused(chat_model, sides):
    with pytest.raises(UserError, match="same inputs everywhere"):
        task_vector(chat_model, sides[0], sides[0])
    with pytest.raises(UserError, match="both sides"):
        task_vector(chat_model, sides[0], [])
    with pytest.raises(UserError, match="answer 1 has no token"):
        task_vector(chat_model, [sides[0][0], sides[0][1]._replace(answer=[])], sides[1])
