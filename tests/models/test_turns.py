"""What one thread steers, another neither generates with nor reads with."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from persona_lora.core.chat import Exchange, user_question
from persona_lora.core.errors import UserError
from persona_lora.models.generation import generate_answers
from persona_lora.models.hidden_states import stream_hidden_means
from persona_lora.models.last_states import last_states
from persona_lora.models.likelihood import TokenizedExchange, mean_logprobs, token_divergences
from persona_lora.models.structure import decoder_layers
from persona_lora.projections.inputs import measure_inputs
from persona_lora.steering.live import LiveLoRA
from persona_lora.steering.task_vectors import mean_inputs

IDS = [*range(40, 60)]
READERS = {
    "generation": lambda chat: [
        [*map(ord, each.text)]
        for each in generate_answers(chat, [user_question("Hi?")], max_new_tokens=4)
    ],
    "likelihood": lambda chat: mean_logprobs(chat, [Exchange("Hi?", "no")]),
    "divergence": lambda chat: token_divergences(chat, TokenizedExchange(IDS, [7, 8]), num_rows=1),
    "means": lambda chat: [
        each.means for each in stream_hidden_means(chat, [TokenizedExchange(IDS, [7])])
    ],
    "inputs": lambda chat: [*measure_inputs(chat, ["Hi?", "No?"]).roots.values()],
    "mean inputs": lambda chat: [*mean_inputs(chat, [TokenizedExchange(IDS, [7])]).values()],
    "ends": lambda chat: last_states(
        chat, [[*IDS, 7], [*IDS, 8]], ["", ""], [1], [range(20, 21)] * 2
    ),
}


@pytest.mark.parametrize("kind", READERS)
def test_a_thread_steers_only_when_another_has_read(chat_model, make_diff, kind):
    """What is steered in the midst of a reading would be read by halves."""
    model, entered = chat_model.model, []
    diff = make_diff(model, scale=1.0)

    def steer():
        with LiveLoRA(model, [diff], [[2.0]]):
            entered.append(True)

    with ThreadPoolExecutor(1) as pool:
        waiting = []

        def meanwhile(*_):
            if not waiting:
                waiting.append(pool.submit(steer))
                time.sleep(0.3)
                assert not entered

        handle = decoder_layers(model)[0].register_forward_hook(meanwhile)
        READERS[kind](chat_model)
        handle.remove()
        waiting[0].result(timeout=60)
    assert entered


@pytest.mark.parametrize("kind", READERS)
def test_a_thread_waits_until_another_has_left_its_steering(chat_model, make_diff, kind):
    read, model = READERS[kind], chat_model.model
    plain = read(chat_model)
    with ThreadPoolExecutor(1) as pool:
        with LiveLoRA(model, [make_diff(model, scale=1.0)], [[2.0]]):
            if kind == "inputs":  # of the model itself alone
                with pytest.raises(UserError, match="it is steered now"):
                    read(chat_model)
                steered = None
            else:
                steered = read(chat_model)
            waiting = pool.submit(read, chat_model)
            with pytest.raises(TimeoutError):
                waiting.result(timeout=0.3)
        found = waiting.result(timeout=60)
    torch.testing.assert_close(found, plain, rtol=0, atol=0)
    assert kind == "divergence" or str(steered) != str(plain)


@pytest.mark.parametrize("kind", sorted(READERS.keys() - {"divergence", "inputs"}))
def test_rows_steered_apart_are_read_only_where_each_is_told(chat_model, make_diff, kind):
    """What sorts its rows by length would give one another's steering."""
    model = chat_model.model
    with LiveLoRA(model, [make_diff(model)], [[2.0], [1.0]]) as steerer:
        steerer.select_rows([0, 1])
        with pytest.raises(UserError, match="2 rows of coefficients"):
            READERS[kind](chat_model)


def test_rows_that_another_thread_keeps_apart_are_waited_for(chat_model, make_diff):
    read, model = READERS["generation"], chat_model.model
    plain = read(chat_model)
    with ThreadPoolExecutor(1) as pool:
        with LiveLoRA(model, [make_diff(model, scale=1.0)], [[2.0], [1.0]]):
            waiting = pool.submit(read, chat_model)
            with pytest.raises(TimeoutError):
                waiting.result(timeout=0.3)
        assert waiting.result(timeout=60) == plain
