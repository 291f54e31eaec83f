"""A timed generation: its parts, and the number of tokens that it says it made."""

from __future__ import annotations

from itertools import count
from types import SimpleNamespace

from persona_lora.models.decoding import Decoding
from persona_lora.studies.steering.latency import timed_generation


def test_the_first_token_is_a_part_of_the_whole(chat_model, monkeypatch):
    """A clock that goes on by one at each look: at the start, the first token, the end."""
    clock = SimpleNamespace(perf_counter=map(float, count()).__next__)
    monkeypatch.setattr("persona_lora.studies.steering.latency.time", clock)
    first, tokens = timed_generation(chat_model, ["Hi.", "A longer one?"], 4)
    assert first == 1.0
    assert tokens == 2 * 3 / 1.0  # two rows, three tokens after the first


def test_all_rows_run_to_the_end_and_a_system_prompt_is_read(chat_model, monkeypatch):
    seen = []
    run = Decoding._run

    def noted(self, tokens, places):
        seen.append(tuple(tokens.shape))
        return run(self, tokens, places)

    monkeypatch.setattr(Decoding, "_run", noted)
    for system in (None, "Be very rude, whatever anybody asks of you."):
        assert min(timed_generation(chat_model, ["Hi.", "Why?"], 5, system=system)) > 0
    plain, prompted = seen[:5], seen[5:]
    assert plain[1:] == prompted[1:] == [(2, 1)] * 4
    assert prompted[0][1] > plain[0][1]
