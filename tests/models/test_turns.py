"""What one thread steers, another neither generates with nor reads with."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from persona_lora.core.chat import Exchange, user_question
from persona_lora.models.generation import generate_answers
from persona_lora.models.hidden_states import stream_hidden_means
from persona_lora.models.last_states import last_states
from persona_lora.models.likelihood import TokenizedExchange, mean_logprobs, token_divergences
from persona_lora.steering.live import LiveLoRA

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
    "ends": lambda chat: last_states(
        chat, [[*IDS, 7], [*IDS, 8]], ["", ""], [1], [range(20, 21)] * 2
    ),
}


@pytest.mark.parametrize("kind", READERS)
def test_a_thread_waits_until_another_has_left_its_steering(chat_model, make_diff, kind):
    read, model = READERS[kind], chat_model.model
    plain = read(chat_model)
    with ThreadPoolExecutor(1) as pool:
        with LiveLoRA(model, [make_diff(model, scale=1.0)], [[2.0]]):
            steered = read(chat_model)
            waiting = pool.submit(read, chat_model)
            with pytest.raises(TimeoutError):
                waiting.result(timeout=0.3)
        found = waiting.result(timeout=60)
    torch.testing.assert_close(found, plain, rtol=0, atol=0)
    assert kind == "divergence" or str(steered) != str(plain)
