from __future__ import annotations

import dataclasses
import logging

import pytest

from persona_lora.models.load_options import LoadOptions
from persona_lora.steering.bank import warn_of_other_template

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
