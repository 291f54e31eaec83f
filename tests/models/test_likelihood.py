from __future__ import annotations

import pytest
import torch

from persona_lora.core.chat import Exchange, user_question
from persona_lora.core.errors import UserError
from persona_lora.models import generation, likelihood
from persona_lora.models.generation import generate_answers
from persona_lora.models.hidden_states import stream_hidden_means
from persona_lora.models.last_states import last_states
from persona_lora.models.likelihood import (
    TokenizedExchange,
    answer_logprobs,
    mean_logprobs,
    next_token_logprobs,
    next_tokens,
    text_logprobs,
    token_divergences,
    tokenize_exchange,
)
from persona_lora.models.loading import ChatModel
from persona_lora.projections.inputs import tokenized_prompts
from persona_lora.steering.live import LiveLoRA
from persona_lora.steering.task_vectors import mean_inputs
from persona_lora.steering.weights import LoRASteerer
from tests.models.architectures import tiny_model

EXCHANGES = [
    Exchange("why?", "because"),
    Exchange("a longer question here", "no"),
    Exchange("x", "an answer of some length"),
]


def all_log_probs(chat_model, exchange):
    """One row, no padding: the reference."""
    prompt, answer = tokenize_exchange(chat_model, exchange)
    logits = chat_model.model(torch.tensor([prompt + answer])).logits[0].float()
    return torch.log_softmax(logits, -1)[len(prompt) - 1 : -1], torch.tensor(answer)


def test_mean_logprobs_equal_the_unbatched_reference(chat_model, monkeypatch):
    expected = []
    for exchange in EXCHANGES:
        log_p, answer = all_log_probs(chat_model, exchange)
        expected.append(float(log_p.gather(1, answer[:, None]).mean()))
    assert mean_logprobs(chat_model, EXCHANGES) == pytest.approx(expected, abs=1e-5)
    monkeypatch.setattr(likelihood, "TOKENS_PER_BATCH", 1)
    assert mean_logprobs(chat_model, EXCHANGES) == pytest.approx(expected, abs=1e-5)


def test_an_empty_answer_is_refused(chat_model):
    with pytest.raises(UserError, match="empty answer"):
        mean_logprobs(chat_model, [Exchange("q", "")])


@pytest.mark.parametrize("beginning", ["", "4"])
def test_next_token_logprobs_are_the_softmax_after_the_prompt(chat_model, beginning):
    replies = [("why?", beginning), ("a much longer message", "1")]
    reply = next_token_logprobs(chat_model, replies, top=300)
    prompt = chat_model.render([{"role": "user", "content": "why?"}]) + beginning
    ids = chat_model.tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
    log_p = torch.log_softmax(chat_model.model(ids).logits[0, -1].float(), -1)
    letter = chat_model.tokenizer("7")["input_ids"][0]
    assert reply[0]["7"] == pytest.approx(float(log_p[letter]), abs=1e-5)


def test_divergence_is_zero_for_equal_rows_and_matches_merged_weights(chat_model, make_diff):
    exchange = EXCHANGES[2]
    tokenized = tokenize_exchange(chat_model, exchange)
    diff = make_diff(chat_model.model)
    with LiveLoRA(chat_model.model, [diff], [[0.0], [0.0], [1.0]]) as live:
        live.select_rows([0, 1, 2])
        divergences = token_divergences(chat_model, tokenized, num_rows=3)
    base, _ = all_log_probs(chat_model, exchange)
    with LoRASteerer(chat_model.model, diff):
        steered, _ = all_log_probs(chat_model, exchange)
    expected = (base.exp() * (base - steered)).sum(-1)
    assert divergences.shape == (2, len(tokenized.answer))
    assert torch.equal(divergences[0], torch.zeros_like(divergences[0]))
    torch.testing.assert_close(divergences[1], expected, atol=1e-4, rtol=1e-3)


def test_divergence_needs_no_model_that_gives_a_part_of_the_logits(
    chat_model, make_diff, monkeypatch
):
    tokenized, model = tokenize_exchange(chat_model, EXCHANGES[2]), chat_model.model
    with LiveLoRA(model, [make_diff(model)], [[0.0], [1.0]]) as live:
        live.select_rows([0, 1])
        expected = token_divergences(chat_model, tokenized, num_rows=2)
        forward = model.forward
        monkeypatch.setattr(model, "forward", lambda *, logits_to_keep, **others: forward(**others))
        found = token_divergences(chat_model, tokenized, num_rows=2)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("family", "window", "said"),
    [
        ("Llama", 512, r"pass the 512 positions of tiny; ask for less"),
        ("Phi-3 longrope", 128, r"pass 128, where longrope changes .* --max-new-tokens or max_len"),
    ],
)
def test_a_text_over_the_context_window_is_refused_by_all_that_reads(
    tokenizer, family, window, said
):
    chat_model = ChatModel(tiny_model(family), tokenizer, "tiny")
    long, just = "a" * window, TokenizedExchange([5] * (window - 2), [6, 7])
    more = TokenizedExchange([5] * (window - 2), [6, 7, 8])
    room = window - len(tokenize_exchange(chat_model, Exchange("why?", "")).prompt)
    assert list(stream_hidden_means(chat_model, [just]))
    assert answer_logprobs(chat_model, [just])
    generate_answers(chat_model, [user_question("why?")], max_new_tokens=room)
    for reads in (
        lambda: mean_logprobs(chat_model, [Exchange("why?", long)]),
        lambda: next_token_logprobs(chat_model, [(long, "")]),
        lambda: tokenized_prompts(chat_model, [long]),
        lambda: last_states(chat_model, [more.prompt + more.answer], ["a"], [0], [range(1)]),
        lambda: generate_answers(chat_model, [user_question("why?")], max_new_tokens=room + 1),
        # What a library's user has tokenised himself:
        lambda: list(stream_hidden_means(chat_model, [more])),
        lambda: answer_logprobs(chat_model, [more]),
        lambda: token_divergences(chat_model, more, num_rows=2),
        lambda: text_logprobs(chat_model, more.prompt + more.answer, 1),
        lambda: next_tokens(chat_model, [more.prompt + more.answer], 0),
        lambda: mean_inputs(chat_model, [more]),
    ):
        with pytest.raises(UserError, match=rf"tokens \(.*\) {said}"):
            reads()


def test_the_output_head_never_multiplies_with_a_copy_of_its_weights_for_each_row(
    chat_model, monkeypatch
):
    """Frozen weights and an input with gaps are what PyTorch copies them for."""
    head, laid_out = chat_model.model.get_output_embeddings(), []
    told = head.register_forward_hook(
        lambda module, arguments, output: laid_out.append(arguments[0].is_contiguous())
    )
    questions = [user_question(each.question) for each in EXCHANGES]

    def passes(run):
        laid_out.clear()
        run()
        return laid_out

    try:
        for ours in (True, False):
            monkeypatch.setattr(generation, "decodes", lambda model, ours=ours: ours)
            found = passes(lambda: generate_answers(chat_model, questions, max_new_tokens=3))
            assert len(found) >= 3
            assert all(found), ours
        text = tokenize_exchange(chat_model, EXCHANGES[1])
        assert passes(lambda: token_divergences(chat_model, text, num_rows=3)) == [True]
        assert all(passes(lambda: mean_logprobs(chat_model, EXCHANGES)))
        assert all(passes(lambda: next_token_logprobs(chat_model, [("a", ""), ("bcd", "")])))
    finally:
        told.remove()
    assert not head._forward_pre_hooks
