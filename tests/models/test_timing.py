"""A timed generation: its parts, and the number of tokens that it says it made."""

from __future__ import annotations

from itertools import count
from types import SimpleNamespace

from persona_lora.models.timing import timed_generation


def test_the_first_token_is_a_part_of_the_whole(chat_model, monkeypatch):
    """A clock that goes on by one at each look: at the start, the first token, the end."""
    clock = SimpleNamespace(perf_counter=map(float, count()).__next__)
    monkeypatch.setattr("persona_lora.models.timing.time", clock)
    first, tokens = timed_generation(chat_model, ["Hi.", "A longer one?"], 4)
    assert first == 1.0
    assert tokens == 2 * 3 / 1.0  # two rows, three tokens after the first


def test_all_rows_run_to_the_end_and_a_system_prompt_is_read(chat_model, monkeypatch):
    seen = []
    generate = chat_model.model.generate

    def noted(**options):
        out = generate(**options)
        seen.append((options["input_ids"].shape, out.shape))
        return out

    monkeypatch.setattr(chat_model.model, "generate", noted)
    for system in (None, "Be very rude, whatever anybody asks of you."):
        assert min(timed_generation(chat_model, ["Hi.", "Why?"], 5, system=system)) > 0
    (plain, plain_out), (prompted, prompted_out) = seen
    assert plain_out == (2, plain[1] + 5)
    assert prompted_out == (2, prompted[1] + 5)
    assert prompted[1] > plain[1]
