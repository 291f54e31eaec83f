"""Reading response bodies that may be anything."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from persona_lora.judges.completions import read_completion

TOP = [{"token": "80", "logprob": -0.1}, {"token": "The", "logprob": -3.0}]


def body(**choice) -> str:
    message = {"role": "assistant", "content": "80"}
    choice = {"message": message, "logprobs": {"content": [{"top_logprobs": TOP}]}} | choice
    usage = {"prompt_tokens": 7, "completion_tokens": 1}
    return json.dumps({"choices": [choice], "usage": usage})


def test_read_completion_reads_logprobs_tokens_and_usage():
    completion = read_completion(body(), "logprobs")
    assert completion.reading.score == pytest.approx(80)
    assert completion.lasting
    assert completion.tokens == (7, 1)
    assert completion.first_tokens == ("80", "The")


def test_read_completion_reads_the_text_in_number_mode():
    assert read_completion(body(), "number").reading.score == 80
    refused = {"role": "assistant", "content": None, "refusal": "I cannot"}
    assert read_completion(body(message=refused), "number").reading.reason == "refusal"
    filtered = read_completion(body(finish_reason="content_filter"), "number")
    assert "content filter" in filtered.reading.reason
    assert filtered.lasting


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
    ],
)
def test_read_completion_without_usable_logprobs_is_a_passing_failure(logprobs):
    completion = read_completion(body(logprobs=logprobs), "logprobs")
    assert completion.reading.score is None
    assert "logprobs" in completion.reading.reason
    assert not completion.lasting


@pytest.mark.parametrize("text", ["", "<html>", "[]", "{}", "null", '{"choices": []}', '{"a": '])
@pytest.mark.parametrize("mode", ["logprobs", "number"])
def test_read_completion_of_garbage_is_unscored_with_a_reason(text, mode):
    completion = read_completion(text, mode)
    assert completion.reading.score is None
    assert completion.reading.reason
    assert not completion.lasting


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


@given(_json)
def test_read_completion_never_raises_whatever_the_json(value):
    for mode in ("logprobs", "number"):
        assert read_completion(json.dumps(value), mode).reading is not None
