"""Reading response bodies that may be anything."""

from __future__ import annotations

import contextlib
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from persona_lora.judges.completions import Completion, read_reply, score_reply
from persona_lora.judges.retries import Fault

TOP = [{"token": "80", "logprob": -0.1}, {"token": "The", "logprob": -3.0}]


def read_completion(text: str, mode) -> Completion:
    return score_reply(read_reply(text), mode)


def body(**choice) -> str:
    message = {"role": "assistant", "content": "80"}
    choice = {"message": message, "logprobs": {"content": [{"top_logprobs": TOP}]}} | choice
    usage = {"prompt_tokens": 7, "completion_tokens": 1}
    return json.dumps({"choices": [choice], "usage": usage})


def test_read_completion_reads_logprobs_tokens_and_usage():
    completion = read_completion(body(), "logprobs")
    assert completion.reading.score == pytest.approx(80)
    assert completion.outcome == "good"
    assert completion.first_tokens == ("80", "The")
    assert read_reply(body()).tokens == (7, 1)


def test_read_completion_reads_the_text_in_number_mode():
    assert read_completion(body(), "number").reading.score == 80
    refused = {"role": "assistant", "content": None, "refusal": "I cannot"}
    assert read_completion(body(message=refused), "number").reading.reason == "refusal"
    filtered = read_completion(body(finish_reason="content_filter"), "number")
    assert "content filter" in filtered.reading.reason
    assert filtered.outcome == "about the text"
    cut = read_completion(body(finish_reason="length"), "number")
    assert "cut off" in cut.reading.reason  # "80" could be the beginning of more


@pytest.mark.parametrize(
    "logprobs",
    [
        None,
        {},
        {"content": None},
        {"content": []},
        {"content": [{"top_logprobs": []}]},
        {"content": [{"top_logprobs": [{"token": "80"}]}]},
        {"content": [{"top_logprobs": [{"token": 80, "logprob": -1.0}]}]},
        {"content": [{"top_logprobs": [{"token": "80", "logprob": "high"}]}]},
        {"content": [{"top_logprobs": ["80"]}]},
        {"content": [{"top_logprobs": [{"token": "80", "logprob": 0.9}]}]},
        {"content": [{"top_logprobs": [{"token": "80", "logprob": float("nan")}]}]},
        {"tokens": ["80"], "top_logprobs": None},
    ],
)
def test_read_completion_without_usable_logprobs_is_no_score(logprobs):
    completion = read_completion(body(logprobs=logprobs), "logprobs")
    assert completion.reading.score is None
    assert "logprobs" in completion.reading.reason
    assert completion.outcome in ("lasting", "fault")


GARBAGE = ["", "<html>", "[]", "{}", "null", '{"choices": []}', '{"a": ', "[" * 100_000]


@pytest.mark.parametrize("text", GARBAGE, ids=range(len(GARBAGE)))
def test_what_is_no_completion_is_a_fault_with_a_reason(text):
    with pytest.raises(Fault, match="the endpoint's reply"):
        read_reply(text)


_json = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(
            st.sampled_from(["choices", "message", "logprobs", "content", "top_logprobs", "usage"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@settings(max_examples=40, deadline=None)
@given(_json)
def test_read_completion_never_raises_whatever_the_json(value):
    for mode in ("logprobs", "number"):
        with contextlib.suppress(Fault):
            assert read_completion(json.dumps(value), mode).reading is not None
