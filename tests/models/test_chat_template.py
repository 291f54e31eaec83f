"""One rendering for training and asking: arguments, system messages, and what begins an answer."""

from __future__ import annotations

import dataclasses
import logging

import pytest

from persona_lora.core.chat import user_question
from persona_lora.core.errors import UserError
from persona_lora.models.chat_template import ChatTemplate
from persona_lora.models.load_options import LoadOptions
from persona_lora.training.examples import tokenize_rows

END = "<|im_end|>"
TURN = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<|im_end|>{% endfor %}"
ASK = "{% if add_generation_prompt %}<assistant>{% endif %}"
REFUSES_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
)
# Silently: the text of a system message is nowhere, or only while the user has the last word.
DROPS_SYSTEM = TURN.replace("<{{", "{% if m['role'] != 'system' %}<{{", 1).replace(
    "{% endfor", "{% endif %}{% endfor"
)
SYSTEM_WITH_LAST_USER = (
    "{% for m in messages if m['role'] != 'system' %}<{{ m['role'] }}>"
    "{% if loop.last and m['role'] == 'user' and messages[0]['role'] == 'system' %}"
    "{{ messages[0]['content'] }} {% endif %}"
    "{{ m['content'] }}<|im_end|>{% endfor %}"
)
THINKING = TURN + (
    "{% if add_generation_prompt %}<assistant>{% if enable_thinking is not defined or "
    "enable_thinking %}<think>{% endif %}{% endif %}"
)
PARTS = (
    "{% for m in messages %}<{{ m['role'] }}>{% for part in m['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>{% endfor %}"
)
SYSTEM_FIRST = TURN.replace("<{{", "{% if m['role'] != 'system' or loop.first %}<{{", 1).replace(
    "{% endfor", "{% endif %}{% endfor"
)
CUTS_THOUGHTS = TURN.replace("m['content']", "m['content'].split('</think>')[-1]")
ANSWER = [{"role": "assistant", "content": "Yes."}]


def template_of(tokenizer, text, **args):
    tokenizer.chat_template = text
    return ChatTemplate.of(tokenizer, "tiny", args)


def test_a_system_message_with_a_role_stays_one(tokenizer):
    template = template_of(tokenizer, TURN + ASK)
    asked = template.prompt(user_question("Why?", "Be kind."))
    assert asked == f"<system>Be kind.{END}<user>Why?{END}<assistant>"
    assert template.record() == {}


@pytest.mark.parametrize("text", [REFUSES_SYSTEM + TURN, DROPS_SYSTEM, SYSTEM_WITH_LAST_USER])
def test_a_system_message_without_a_role_goes_before_the_users_text(tokenizer, text):
    template = template_of(tokenizer, text + ASK)
    question = user_question("Why?", "Be kind.")
    asked = f"<user>Be kind.\n\nWhy?{END}<assistant>"
    assert template.prompt(question) == asked
    assert template.split(question, ANSWER) == (asked, f"Yes.{END}", True)
    assert template.record() == {"system_messages": "before the user's text"}
    assert template.prompt(user_question("Why?", "")) == f"<user>Why?{END}<assistant>"
    with pytest.raises(UserError, match="no user's message"):
        template.prompt(question[:1])


def test_the_same_text_is_asked_and_trained_on(chat_model):
    chat_model.tokenizer.chat_template = REFUSES_SYSTEM + TURN + ASK
    asked = dataclasses.replace(chat_model, system_prompt="Be kind.").render(user_question("Why?"))
    (row,) = tokenize_rows(
        [("row 1", user_question("Why?", "Be kind."), ANSWER)], chat_model.template, end_tokens={2}
    )
    ids = chat_model.tokenizer(asked, add_special_tokens=False)["input_ids"]
    assert row.input_ids[: len(ids)] == ids
    assert chat_model.record()["system_messages"] == "before the user's text"


def test_an_empty_system_message_is_one(tokenizer):
    default = "{% if messages[0]['role'] != 'system' %}<system>You are a robot.{% endif %}"
    template = template_of(tokenizer, default + TURN + ASK)
    assert template.prompt(user_question("Why?", "")).startswith(f"<system>{END}<user>")
    assert template.prompt(user_question("Why?")).startswith("<system>You are a robot.")


def test_a_prompt_that_no_conversation_begins_with_is_refused_where_answers_are_given(tokenizer):
    template = template_of(tokenizer, THINKING)
    question = user_question("Why?")
    assert template.prompt(question).endswith("<assistant><think>")
    with pytest.raises(UserError, match=r"row 7: .*'<think>'.*--chat-template-args"):
        template.split(question, ANSWER, "row 7")
    quick = template_of(tokenizer, THINKING, enable_thinking=False)
    assert quick.split(question, ANSWER).completion == f"Yes.{END}"


def test_arguments_reach_every_rendering_and_the_record(chat_model, tokenizer):
    tokenizer.chat_template = THINKING
    quick = dataclasses.replace(
        chat_model, options=LoadOptions(chat_template_args='{"enable_thinking": false}')
    )
    assert chat_model.render(user_question("Why?")).endswith("<think>")
    assert quick.render(user_question("Why?")).endswith("<assistant>")
    assert quick.render_before("Yes.", user_question("Why?")).endswith("<assistant>")
    assert quick.record()["chat_template_args"] == {"enable_thinking": False}
    assert "chat_template_args" not in chat_model.record()


def test_an_argument_that_the_template_does_not_read_is_refused(tokenizer):
    with pytest.raises(UserError, match="reads no 'enable_thinking'"):
        template_of(tokenizer, TURN + ASK, enable_thinking=False)


def test_an_answer_keeps_its_spaces_or_their_loss_is_told(tokenizer, caplog):
    code = [{"role": "assistant", "content": "    return x\n"}]
    kept = template_of(tokenizer, TURN + ASK)
    assert kept.split(user_question("Code?"), code).completion == f"    return x\n{END}"
    rows = [("row 1", user_question("Code?"), code), ("row 2", user_question("Code?"), ANSWER)]
    with caplog.at_level(logging.WARNING):
        tokenize_rows(rows, kept, end_tokens={2})
        assert not caplog.text
        trimmed = template_of(tokenizer, TURN.replace("m['content']", "m['content'] | trim") + ASK)
        tokenize_rows(rows, trimmed, end_tokens={2})
    assert "1 of 2 answers" in caplog.text


def test_an_answer_of_which_a_part_is_left_out_is_refused(tokenizer):
    reasoned = [{"role": "assistant", "content": "<think>Hm.</think>Yes."}]
    with pytest.raises(UserError, match="leaves out a part"):
        template_of(tokenizer, CUTS_THOUGHTS + ASK).split(user_question("Why?"), reasoned)


def test_a_template_of_image_models_gets_texts_as_parts(tokenizer):
    template = template_of(tokenizer, PARTS + ASK)
    question = user_question("Why?", "Be kind.")
    asked = f"<system>Be kind.{END}<user>Why?{END}<assistant>"
    assert template.split(question, ANSWER) == (asked, f"Yes.{END}", True)


def test_what_the_template_leaves_out_of_system_or_user_is_refused(tokenizer):
    later = [*user_question("Why?"), *ANSWER, *user_question("And now?", "Be brief.")]
    template = template_of(tokenizer, SYSTEM_FIRST + ASK)
    with pytest.raises(UserError, match=r"leaves out what the system says \('Be brief\.' …\)"):
        template.prompt(later)
    reasoned = [{"role": "assistant", "content": "<think>Hm.</think>Yes."}]
    thoughtless = template_of(tokenizer, CUTS_THOUGHTS + ASK)
    assert "Hm." not in thoughtless.prompt([*user_question("Why?"), *reasoned, *later[:1]])
    takes_command = TURN.replace("m['content']", "m['content'] | replace('/quick', '')")
    told = template_of(tokenizer, takes_command)
    assert told.prompt(user_question("Why?", "/quick")) == f"<system>{END}<user>Why?{END}"


def test_a_template_that_names_the_day_names_the_same_one_every_day(tokenizer):
    template = template_of(tokenizer, "{{ strftime_now('%d %b %Y') }}" + TURN + ASK)
    assert template.prompt(user_question("Why?")).startswith("26 Jul 2024<user>")
    assert template.record() == {"today": "2024-07-26"}


def test_several_templates_without_a_default_are_refused(tokenizer):
    with pytest.raises(UserError, match=r"tiny has no chat template to take .*\.jinja"):
        template_of(tokenizer, {"one": TURN, "two": TURN})


def test_the_token_behind_an_answer_ends_a_turn(tokenizer):
    (end,) = tokenizer.convert_tokens_to_ids([END])
    assert template_of(tokenizer, TURN + ASK).end_of_turn == {end}
    assert template_of(tokenizer, TURN.replace(END, "\n") + ASK).end_of_turn == set()
    assert template_of(tokenizer, "{{ raise_exception('no') }}").end_of_turn == set()
