from __future__ import annotations

import logging

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from persona_lora.core.chat import Message
from persona_lora.core.errors import UserError
from persona_lora.core.traits import ContrastivePair
from persona_lora.models.chat_template import ChatTemplate
from persona_lora.training.examples import (
    IGNORED,
    LengthGroupedOrder,
    shared_lengths,
    tokenize_pairs,
)


def _pair(prompt: str = "Ready?", positive: str = "Yes!", negative: str = "No, not yet.", **turns):
    return ContrastivePair(
        prompt=[Message(role="user", content=prompt)],
        positive=[Message(role="assistant", content=positive)],
        negative=[Message(role="assistant", content=negative)],
        domain="",
    )


def template(tokenizer) -> ChatTemplate:
    return ChatTemplate.of(tokenizer, "tiny")


def _spoken(tokenizer, row) -> str:
    return tokenizer.decode([label for label in row.labels if label != IGNORED])


def test_labels_are_the_answer_and_its_end_of_turn(tokenizer):
    rows = tokenize_pairs([_pair()], template(tokenizer), end_tokens={tokenizer.eos_token_id})
    assert _spoken(tokenizer, rows["pos"][0]) == "Yes!<|im_end|>"
    assert _spoken(tokenizer, rows["neg"][0]) == "No, not yet.<|im_end|>"
    ignored = rows["pos"][0].labels.count(IGNORED)
    prompt = tokenizer.decode(rows["pos"][0].input_ids[:ignored])
    assert prompt == "<|im_start|>user\nReady?<|im_end|>\n<|im_start|>assistant\n"


def test_end_of_turn_is_learnt_where_it_is_the_padding_token_too(tokenizer):
    tokenizer.pad_token = tokenizer.eos_token
    pairs = [_pair(), _pair(positive="Yes, by all means, let us begin.")]
    rows = tokenize_pairs(pairs, template(tokenizer), end_tokens={tokenizer.eos_token_id})["pos"]
    batch = DataCollatorForLanguageModeling(tokenizer.pad_token_id)(
        [{"input_ids": row.input_ids, "labels": row.labels} for row in rows]
    )
    assert (batch["labels"] == tokenizer.eos_token_id).sum(dim=1).tolist() == [1, 1]
    assert (batch["labels"][0] != IGNORED).sum() == len("Yes!") + 1


def test_rows_over_max_length_are_cut_and_counted(tokenizer, caplog):
    pairs = [_pair(positive="Yes!" * 10), _pair()]
    whole = tokenize_pairs(pairs, template(tokenizer), end_tokens={tokenizer.eos_token_id})
    limit = len(whole["pos"][0].input_ids) - 3
    with caplog.at_level(logging.WARNING):
        cut = tokenize_pairs(
            pairs, template(tokenizer), end_tokens={tokenizer.eos_token_id}, max_length=limit
        )
    assert cut["pos"][0].input_ids == whole["pos"][0].input_ids[:limit]
    assert cut["pos"][1] == whole["pos"][1]
    assert "1 of 4 rows" in caplog.text


def test_prompt_that_fills_max_length_is_refused(tokenizer):
    with pytest.raises(UserError, match=r"row 2.*max_length 60"):
        tokenize_pairs(
            [_pair(), _pair("Why? " * 20)],
            template(tokenizer),
            end_tokens={tokenizer.eos_token_id},
            max_length=60,
        )


def test_template_that_never_ends_a_turn_is_refused(tokenizer):
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    with pytest.raises(UserError, match="never learn to stop"):
        tokenize_pairs([_pair()], template(tokenizer), end_tokens={tokenizer.eos_token_id})


def test_template_that_refuses_a_row_names_it(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('no such role') }}"
    with pytest.raises(UserError, match=r"row 1.*no such role"):
        tokenize_pairs([_pair()], template(tokenizer), end_tokens={tokenizer.eos_token_id})


def test_shared_length_does_not_depend_on_the_sign(tokenizer):
    rows = tokenize_pairs(
        [_pair(), _pair(positive="Yes, certainly, at once.")],
        template(tokenizer),
        end_tokens={tokenizer.eos_token_id},
    )
    swapped = {"pos": rows["neg"], "neg": rows["pos"]}
    assert shared_lengths(rows) == shared_lengths(swapped)


@settings(max_examples=50, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 200), min_size=1, max_size=60),
    batch_size=st.integers(1, 9),
    seed=st.integers(0, 5),
    epoch=st.integers(0, 3),
)
def test_length_grouped_order_is_a_reproducible_permutation(lengths, batch_size, seed, epoch):
    orders = []
    for _ in range(2):
        order = LengthGroupedOrder(lengths, batch_size, seed)
        order.set_epoch(epoch)
        orders.append(list(order))
    assert orders[0] == orders[1]
    assert sorted(orders[0]) == list(range(len(lengths)))


def test_length_grouped_order_changes_with_the_epoch_and_wastes_little_padding():
    lengths = [20 + (37 * number) % 101 for number in range(96)]
    order = LengthGroupedOrder(lengths, 8, seed=0)
    first = list(order)
    order.set_epoch(1)
    assert list(order) != first
    batches = [first[start : start + 8] for start in range(0, 96, 8)]
    padded = sum(8 * max(lengths[row] for row in batch) for batch in batches)
    assert padded < 1.12 * sum(lengths)
