"""Caps on requests and money."""

from __future__ import annotations

import pytest

from persona_lora.core.chat import Exchange, Verdict
from persona_lora.core.errors import UserError
from persona_lora.judges.budget import (
    COST_CAP,
    REQUEST_CAP,
    Budget,
    CapReached,
    Prices,
    Reservation,
    cap_behind,
    refuse_spent,
)
from persona_lora.judges.judging import MultiJudge

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


def test_a_cap_is_found_behind_what_is_unscored_whoever_says_so():
    class Says:
        def __init__(self, name, score, reason):
            self.name, self.told = name, (score, reason)

        def judge(self, exchanges, criterion):
            return [Verdict(criterion, *self.told, self.name) for _ in exchanges]

    paid, free = Says("openai", None, COST_CAP), Says("embedding", 2.0, "")
    (both,) = MultiJudge([free, paid]).judge([Exchange("q", "a")], "evil")
    assert both.score is None
    assert cap_behind(both.score, both.reason) == COST_CAP
    assert cap_behind(None, "no words") is None
    assert cap_behind(3.0, f"the answer speaks of a {REQUEST_CAP}") is None
    with pytest.raises(UserError, match=r"cost cap reached.*--max-judge-cost"):
        refuse_spent([Verdict("evil", 2.0, "", "embedding"), both])
    refuse_spent([Verdict("evil", None, "no words", "embedding")])
