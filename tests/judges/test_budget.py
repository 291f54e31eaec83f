"""Caps on requests and money."""

from __future__ import annotations

import pytest

from persona_lora.core.errors import UserError
from persona_lora.judges.budget import (
    COST_CAP,
    REQUEST_CAP,
    Budget,
    CapReached,
    Prices,
    Reservation,
)

PROMPT = "x" * 252  # reserved as 84 + 16 = 100 tokens
PRICES = Prices(1_000_000 / 100, 0.0)  # so that a prompt of 100 tokens costs a dollar hundred
ONE_PROMPT = 100 * PRICES.prompt / 1_000_000


def test_budget_without_caps_counts_requests_and_tokens():
    budget = Budget(Prices(2.0, 8.0))
    reservation = budget.reserve(PROMPT, 1)
    assert reservation == Reservation(100, 1)
    budget.settle(reservation, 500_000, 250_000)
    usage = budget.usage()
    assert usage[:3] == (1, 500_000, 250_000)
    assert usage.dollars == pytest.approx(1.0 + 2.0)


def test_budget_without_prices_has_no_cost():
    budget = Budget()
    budget.count_cache_hit()
    assert budget.usage() == (0, 0, 0, None, 1)


def test_budget_request_cap_counts_every_attempt():
    budget = Budget(max_requests=2)
    for _ in range(2):
        assert isinstance(budget.reserve(PROMPT, 1), Reservation)
    with pytest.raises(CapReached, match=REQUEST_CAP):
        budget.reserve(PROMPT, 1)


def test_budget_cost_cap_holds_for_requests_on_their_way():
    budget = Budget(PRICES, max_cost=2 * ONE_PROMPT)
    first, second = budget.reserve(PROMPT, 0), budget.reserve(PROMPT, 0)
    with pytest.raises(CapReached, match=COST_CAP):
        budget.reserve(PROMPT, 0)
    budget.settle(first, 0, 0)  # it failed and cost nothing
    assert isinstance(budget.reserve(PROMPT, 0), Reservation)
    budget.settle(second, 100, 0)
    assert budget.usage().dollars == pytest.approx(ONE_PROMPT)


def test_budget_refuses_a_cost_cap_without_prices_and_caps_that_are_no_numbers():
    with pytest.raises(UserError, match="leave out --max-judge-cost"):
        Budget(max_cost=1.0)
    for cap in (-1, float("nan"), float("inf")):
        with pytest.raises(UserError, match="max_cost"):
            Budget(PRICES, max_cost=cap)
