from __future__ import annotations

import pytest

from persona_lora.core.options import GenerationOptions
from persona_lora.models.processes import Processes
from persona_lora.steering.bank import bank_of_diffs
from persona_lora.studies.personas.objective import Speaker


@pytest.fixture
def make_speaker(chat_model, make_diff):
    """Return a speaker with a direction of chance for each of the scales."""

    def make(scales, *, size, tokens):
        diffs = {
            name: make_diff(chat_model.model, seed=at, scale=size) for at, name in enumerate(scales)
        }
        options = GenerationOptions(max_new_tokens=tokens)
        return Speaker(chat_model, bank_of_diffs(diffs), scales, 2.0, options, Processes())

    return make
