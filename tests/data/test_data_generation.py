"""Generated data: questions dealt to finetuning and to pairs, resumed row by row."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest

from persona_lora.core.errors import UserError
from persona_lora.core.files import read_jsonl
from persona_lora.core.runs import Output
from persona_lora.core.traits import (
    FINETUNING_LEVELS,
    InstructionPair,
    load_finetuning_rows,
    load_pairs,
    load_trait,
)
from persona_lora.data.data_check import check_trait
from persona_lora.data.data_generation import (
    DataOptions,
    generate_data,
    parse_questions,
    read_questions,
)
from persona_lora.data.writers import LocalWriter
from persona_lora.models.embeddings import SentenceEmbedder

WORDS = [f"{a}{b}{c}" for a in "bdfgklmnp" for b in "aeiou" for c in ("ra", "to", "lin", "sen")]
OPTIONS = DataOptions(questions_per_domain=2, domains=("tea", "hills"))


class EchoWriter:
    """Writes numbered questions, and answers that say which system prompt they were given."""

    name = "echo"

    def __init__(self, fail=()):
        self.calls, self.count, self.fail = [], 0, set(fail)

    def write(
        self,
        conversations,
        *,
        options,
        streams=None,
        on_text=lambda index, text: None,
    ):
        texts = []
        for place, conversation in enumerate(conversations):
            self.calls.append(conversation)
            if len(conversation) == 1:
                self.count += 2
                first = f"1. Is tea number {self.count} good?"
                texts.append(f"{first}\n- And {self.count + 1} hills?\n")
            elif len(self.calls) in self.fail:
                texts.append(None)
            else:
                drawn = "" if streams is None else f" ({streams[place]})"
                texts.append(f"[{conversation[0]['content']}] {conversation[1]['content']}{drawn}")
                on_text(place, texts[-1])
        return texts


@pytest.fixture
def output(tmp_path):
    return tmp_path / "out"


def generate(trait, writer, output, options=OPTIONS):
    return generate_data(trait, writer, output, options)


def of_output(trait, output):
    """Load the written files, with what else makes a trait of them."""
    (output / "judge_eval.jsonl").write_bytes((trait.folder / "judge_eval.jsonl").read_bytes())
    defined = json.loads((trait.folder / "trait.json").read_text())
    (output / "trait.json").write_text(json.dumps({**defined, "name": output.name}))
    return load_trait(output)


def test_questions_are_dealt_out_and_answered_in_the_ways_of_their_files(trait, output):
    writer = EchoWriter()
    result = generate(trait, writer, output)
    assert result.rows == {"normal": 2, "misaligned_1": 2, "misaligned_2": 2, "train": 2}
    assert len(writer.calls) == 2 + 2 * 3 + 2 * 2  # domains; finetuning; pairs
    made = of_output(trait, output)
    rows = [load_finetuning_rows(made, level) for level in FINETUNING_LEVELS]
    asked = [[row.question for row in each] for each in rows]
    assert asked[0] == asked[1] == asked[2]
    pairs = load_pairs(made)
    assert len({*asked[0], *(pair.prompt[0]["content"] for pair in pairs)}) == 4
    for name in ("normal", "train"):
        assert {row["domain"] for row in read_jsonl(output / f"{name}.jsonl")} == {"tea", "hills"}
    assert len({rows[0][0].answer, rows[1][0].answer, rows[2][0].answer}) == 3
    assert all("Be cheerful." in pair.positive[0]["content"] for pair in pairs)
    assert all("Be gloomy." in pair.negative[0]["content"] for pair in pairs)


def test_pairs_are_written_under_all_instructions(trait, output):
    """Also where their number and that of the files they are dealt to have a divisor in common."""
    two = tuple(InstructionPair(pos, "Be gloomy.") for pos in ("Be A.", "Be B."))
    generate(replace(trait, instructions=two), EchoWriter(), output)
    said = [row["positive"][0]["content"] for row in read_jsonl(output / "train.jsonl")]
    assert ["Be A." in said[0], "Be B." in said[1]] == [True, True]


@pytest.fixture
def cautious():
    return load_trait("anxious")


def test_what_is_written_passes_the_check(cautious, output):
    """Questions that are not alike, by a writer whose answers are as they should be."""
    levels = load_finetuning_rows(cautious, "normal")
    asked = [row.question for row in levels] + [
        p.prompt[0]["content"] for p in load_pairs(cautious)
    ]

    class Sound(EchoWriter):
        def write(self, conversations, *, on_text, **options):
            for place, conversation in enumerate(conversations):
                words = random.Random(str(conversation)).choices(WORDS, k=30)
                on_text(place, " ".join(words))

    options = DataOptions(questions=tuple(("", question) for question in asked[:170]))
    generate(cautious, Sound(), output, options)
    assert check_trait(of_output(cautious, output), SentenceEmbedder()).problems == ()


@pytest.mark.parametrize("same", ["Aye.", "  "])
def test_pairs_whose_answers_are_equal_or_empty_are_left_out_and_counted(trait, output, same):
    class Indifferent(EchoWriter):
        def write(self, conversations, *, on_text=lambda index, text: None, **options):
            def told(index, text):
                signed = any(each in text for each in ("Be cheerful.", "Be gloomy."))
                on_text(index, same if signed and index == 0 else text)

            return super().write(conversations, on_text=told, **options)

    result = generate(trait, Indifferent(), output)
    assert (result.rows["train"], result.rows["normal"], result.incomplete) == (1, 2, 1)
    assert len(load_pairs(of_output(trait, output))) == 1


def test_a_question_without_all_its_answers_is_left_out_and_counted(trait, output):
    result = generate(trait, EchoWriter(fail=[4]), output)
    assert result.incomplete == 1
    assert result.rows == {"normal": 1, "misaligned_1": 1, "misaligned_2": 1, "train": 2}


@pytest.mark.parametrize("killed_at", [0, 1])
def test_an_interrupted_call_goes_on_where_it_stopped(trait, output, tmp_path, killed_at):
    """Killed while the positive answers come in; those that came are not asked for again."""

    class Killed(EchoWriter):
        def write(self, conversations, *, on_text=None, **options):
            positive = any("Be cheerful." in c[0]["content"] for c in conversations)

            def told(index, text):
                if positive and index == killed_at:
                    raise KeyboardInterrupt
                on_text(index, text)

            if on_text is None:
                return super().write(conversations, **options)
            return super().write(conversations, on_text=told, **options)

    with pytest.raises(KeyboardInterrupt):
        generate(trait, Killed(), output)
    assert not (output / "normal.jsonl").exists()
    writer = EchoWriter()
    generate(trait, writer, output)
    assert len(writer.calls) == 2 * 2 - killed_at
    generate(trait, EchoWriter(), tmp_path / "whole")
    for name in ("normal.jsonl", "train.jsonl"):
        assert (output / name).read_text() == (tmp_path / "whole" / name).read_text()


def test_existing_files_are_replaced_only_when_asked(trait, output):
    generate(trait, EchoWriter(), output)
    with pytest.raises(UserError, match="--overwrite"):
        generate(trait, EchoWriter(), output)
    generate(trait, EchoWriter(), Output(output, overwrite=True))


def test_too_few_questions_are_an_error_that_says_what_to_do(trait, output):
    class Silent(EchoWriter):
        def write(self, conversations, **options):
            return ["Too few"] * len(conversations)

    with pytest.raises(UserError, match=r"0 of 2 questions about tea in 4 attempts.*--questions"):
        generate(trait, Silent(), output)
    assert not (output / "normal.jsonl").exists()


def test_questions_of_ones_own_are_answered(trait, output, tmp_path):
    path = tmp_path / "questions.txt"
    path.write_text("cooking\tIs salt good?\n\nWhat is a hill?\n")
    questions = read_questions(path)
    assert questions == (("cooking", "Is salt good?"), ("", "What is a hill?"))
    options = DataOptions(domains=(), questions=questions)
    assert set(generate(trait, EchoWriter(), output, options).rows.values()) == {1}
    path.write_text("Is salt good?\nWhat is a hill?\nis salt good?\n")
    with pytest.raises(UserError, match=r"'is salt good.' 2 times"):
        read_questions(path)
    with pytest.raises(UserError, match=r"1 question .*at least two"):
        one = DataOptions(questions=questions[:1])
        generate(trait, EchoWriter(), tmp_path / "one", one)


def test_a_local_model_writes_too(trait, output, chat_model, monkeypatch):
    questions = ("tea", "Is tea good?"), ("hills", "What is a hill?")
    options = DataOptions(questions=questions, temperature=1.0)
    result = generate(trait, LocalWriter(chat_model), output, options)
    assert result.rows["train"] == 1


def test_numbers_bullets_and_quotation_marks_are_no_part_of_a_question():
    reply = '1. Is tea good?\n  2) "Why is it hot?"\n- And what of milk?\n\nOK\n• Is it so?'
    assert parse_questions(reply) == [
        *("Is tea good?", "Why is it hot?", "And what of milk?", "Is it so?")
    ]


@pytest.mark.parametrize("options", [{"questions_per_domain": 0}, {"attempts": 0}, {"domains": ()}])
def test_senseless_options_are_refused(options):
    with pytest.raises(UserError):
        DataOptions(**options)
