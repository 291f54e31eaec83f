"""Directions by name: rows that steer as their directions do alone; another rendering is named."""

from __future__ import annotations

import dataclasses
import logging

import pytest
import torch

from persona_lora.core.errors import UserError
from persona_lora.models.load_options import LoadOptions
from persona_lora.steering.bank import bank_of_diffs, warn_of_other_template
from persona_lora.steering.weights import LoRASteerer

QUICK = {"enable_thinking": False}


@pytest.mark.parametrize("key", ["training", "model"])
@pytest.mark.parametrize("made", [None, {}, QUICK])
@pytest.mark.parametrize("asked", [{}, QUICK])
def test_a_direction_of_another_rendering_is_named(chat_model, make_diff, caplog, key, made, asked):
    chat_model.tokenizer.chat_template += "{{ enable_thinking }}"
    now = dataclasses.replace(chat_model, options=LoadOptions(chat_template_args=asked))
    record = {"chat_template_args": made} if made else {}
    sources = {} if made is None else {key: {"model": "tiny", **record}}
    diff = dataclasses.replace(make_diff(chat_model.model), sources=sources)
    with caplog.at_level(logging.WARNING):
        warn_of_other_template(now, [diff])
    assert ("--chat-template-args" in caplog.text) == (made is not None and made != asked)


def test_a_row_names_its_directions_and_what_it_leaves_out_is_nothing(chat_model, make_diff):
    bank = bank_of_diffs(
        {"b": make_diff(chat_model.model, seed=2), "a": make_diff(chat_model.model)}
    )
    assert bank.names == ("a", "b")  # sorted, whatever the order they came in
    tokens = torch.randint(3, 250, (1, 7), generator=torch.Generator().manual_seed(1))
    with bank.steerer(chat_model, [{}, {"b": 0.5}]) as steerer, torch.no_grad():
        steerer.select_rows([0, 1])
        plain, steered = chat_model.model(tokens.expand(2, -1)).logits
    with LoRASteerer(chat_model.model, bank.diffs["b"], 0.5), torch.no_grad():
        torch.testing.assert_close(
            steered, chat_model.model(tokens).logits[0], atol=1e-4, rtol=1e-3
        )
    with torch.no_grad():
        assert torch.equal(plain, chat_model.model(tokens.expand(2, -1)).logits[0])


def test_a_row_with_an_unknown_direction_is_refused(chat_model, make_diff):
    bank = bank_of_diffs({"calm": make_diff(chat_model.model)})
    with pytest.raises(UserError, match=r"no direction 'clam' to steer with; .*calm"):
        bank.steerer(chat_model, [{"clam": 1.0}])
