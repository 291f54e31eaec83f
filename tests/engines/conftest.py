"""What tests with servers share."""

from __future__ import annotations

import pytest

from persona_lora.engines import remote


@pytest.fixture
def quick(monkeypatch):
    """Let pauses be short, and few rows be under way at once."""
    monkeypatch.setattr(remote, "PAUSE", 0.01)
    monkeypatch.setattr(remote, "LONGEST_PAUSE", 0.02)
    monkeypatch.setattr(remote, "IN_FLIGHT", 2)
