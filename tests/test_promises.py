"""What a page says in numbers is what the code has; what it says is warned of is."""

from __future__ import annotations

import dataclasses
import logging
import re
import shlex
from pathlib import Path

import pytest
import yaml

from persona_lora.core import personas
from persona_lora.core.chat import Message
from persona_lora.core.errors import UserError
from persona_lora.core.runs import Run
from persona_lora.core.traits import ContrastivePair
from persona_lora.data import data_check
from persona_lora.judges import answer_gates, canaries, endpoint, fitness, judge_prompts, retries
from persona_lora.judges import rules as rule_judge
from persona_lora.models.chat_template import ChatTemplate
from persona_lora.playground import mixing_desk, mixing_page
from persona_lora.profiles import conversations, folders
from persona_lora.report import resampling, two_way
from persona_lora.serving import server
from persona_lora.studies import promoted_words
from persona_lora.studies.drift import prediction, read_diagnosis
from persona_lora.training import contrastive
from persona_lora.training.arguments import ContrastiveArguments, ContrastiveConfig
from persona_lora.training.examples import tokenize_pairs
from persona_lora.training.lora import LoRAArguments

DOCS = Path(__file__).parents[1] / "docs"
NUMBERS = {"two": 2, "three": 3, "four": 4, "five": 5, "ten": 10, "twenty": 20, "forty": 40}
NUMBERS |= {"third": 3, "fifteen": 15, "half": 0.5}

# Page, what it says with its numbers in brackets, and what the code has.
SAID = [
    ("playground", r"beyond ±([\d.]+) are refused", [personas.LARGEST_COEFFICIENT]),
    ("playground", r"The last (\w+) exports are kept", [mixing_page.KEPT_EXPORTS]),
    ("playground", r"and (\d+) mixes at most", [mixing_desk.MOST_MIXES]),
    (
        "playground",
        r"(\w+) questions of one visitor may wait, (\w+) in all",
        [mixing_desk.WAITING_OF_ONE, mixing_desk.WAITING_IN_ALL],
    ),
    (
        "playground",
        r"at most ([\d,]+) characters, a chat ([\d,]+)",
        [mixing_desk.LONGEST_MESSAGE, mixing_desk.LONGEST_CHAT],
    ),
    ("serving", r"Bodies are limited to (\d+) MB", [server.LARGEST_BODY / 1e6]),
    ("serving", r"max_completion_tokens` \((\d+) by default\)", [server.USUAL_LENGTH]),
    ("serving", r"\(`max_tokens` (\d+) by default\)", [server.USUAL_TEXT]),
    ("serving", r"for prompts of up to ([\d,]+) tokens", [server.LONGEST_SCORED]),
    ("judges", r"fails (\w+) times in a row", [retries.FAULTS_IN_A_ROW]),
    ("judges", r"gives (\w+) replies of which none", [retries.FORMLESS_IN_A_ROW]),
    ("judges", r"asked with .*, or for (\d+), (\d+), (\d+) of them", retries.TOP_LOGPROBS[1:]),
    ("judges", r"among the top (\w+) tokens", retries.TOP_LOGPROBS[:1]),
    ("judges", r"replies may be ([\d,]+) tokens longer", [retries.REASONING_ROOM]),
    ("judges", r"sends more than (\d+) MB", [endpoint.LARGEST_REPLY / 1e6]),
    ("judges", r"they hold under ([\d.]+) of the mass", [judge_prompts.MIN_NUMBER_MASS]),
    ("judges", r"a judge under ([\d.]+) is", [fitness.FIT_WITHIN]),
    (
        "judges",
        r"first four more than (\d+) \((\d+) for a trait",
        [canaries.LIMIT, canaries.TWO_SIDED_LIMIT],
    ),
    ("judges", r"first (\d+) letters say", [rule_judge.REFUSED_WITHIN]),
    (
        "personas",
        r"every (\w+) conversation is held",
        [conversations.TEST_EVERY],
    ),
    ("personas", r"(\w+) training utterances are the least", [folders.FEWEST_UTTERANCES]),
    ("personas", r"embedded judge needs (\w+) of either", [folders.FEW_UTTERANCES]),
    ("personas", r"(\w+) of its word trigrams", [answer_gates.SHARED]),
    ("personas", r"its coherence is under (\d+)", [answer_gates.BROKEN]),
    ("drift", r"from (\w+) on, a trait is flagged", [read_diagnosis.ENOUGH]),
    ("drift", r"of (\w+) directions that read", [prediction.RANDOM_DIRECTIONS]),
    ("drift", r"the (\w+) tokens that rise", [promoted_words.TOP]),
    ("data", r"cosine ≥ ([\d.]+) between", [data_check.DUPLICATE_COSINE]),
    ("data", r"questions \(≥ ([\d.]+), and exact", [data_check.LEAK_COSINE]),
    ("data", r"outside (\d+)–(\d+) words", data_check.WORDS),
    ("data", r"above ([\d.]+) the check fails", [data_check.MOST_SURFACE_AUC]),
    ("statistics", r"all flips up to (\d+)\nquestions", [resampling._EXACT_QUESTIONS]),
    ("statistics", r"questions, ([\d,]+) random ones beyond", [resampling._RANDOM_FLIPS]),
    ("statistics", r"counts as ([\d.]+) of a question", [resampling.END_WEIGHT]),
    ("statistics", r"It needs (\w+) draws", [two_way.FEWEST_DRAWS]),
]


@pytest.mark.parametrize(("page", "words", "numbers"), SAID, ids=[each[1] for each in SAID])
def test_a_number_on_a_page_is_that_of_the_code(page, words, numbers):
    found = re.findall(words, (DOCS / f"{page}.md").read_text())
    assert found, f"{page}.md does not say this any more"
    for each in found:
        said = (each,) if isinstance(each, str) else each
        read = [NUMBERS.get(one.lower()) or float(one.replace(",", "")) for one in said]
        assert read == [float(number) for number in numbers]


def test_the_defaults_of_training_are_those_of_its_page():
    """Of the table of options: all that are numbers, words, true, false or none."""
    groups = (ContrastiveArguments, ContrastiveConfig, LoRAArguments)
    held = {each.name: each for group in groups for each in dataclasses.fields(group)}
    page = (DOCS / "training.md").read_text()
    rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \| ([^|]+) \|", page, re.MULTILINE)
    checked = set()
    for names, defaults in rows:
        said = re.sub(r" \(.*?\)", "", defaults).split(", ")
        for name, default in zip(re.findall(r"\w+", names), said, strict=False):
            value = yaml.safe_load(default.strip("`"))
            if name not in held or default != re.match(r"`?[\w.-]*`?", default)[0]:
                continue
            field = held[name]
            own = field.default_factory() if callable(field.default_factory) else field.default
            own = own[0] if isinstance(own, list) else own
            if name in ("trait", "report_to", "datasets_dir"):
                continue  # none; a list in TRL; datasets/ or what comes along
            value = float(value) if isinstance(own, float) else value
            assert (None if value == "none" else value) == own, name
            checked.add(name)
    assert {"lora_r", "use_rslora", "learning_rate", "save_steps", "family", "max_length"} < checked


def said(role: str, text: str) -> list[Message]:
    return [Message(role=role, content=text)]


def test_answers_whose_ends_a_template_takes_off_are_counted_in_a_warning(tokenizer, caplog):
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "message['content']", "message['content'] | trim"
    )
    template = ChatTemplate.of(tokenizer, "tiny")
    pairs = [
        ContrastivePair(
            said("user", "Ready?"), said("assistant", yes), said("assistant", "No."), ""
        )
        for yes in ("  Yes.\n", "Yes.", " Yes.")
    ]
    with caplog.at_level(logging.WARNING):
        tokenize_pairs(pairs, template, end_tokens={tokenizer.eos_token_id})
    (line,) = (each for each in caplog.messages if "takes spaces or line ends off" in each)
    assert "2 of" in line


def test_an_adapter_that_no_process_gathered_is_named_with_the_setting(tmp_path):
    with pytest.raises(UserError, match="set fsdp_state_dict_type: FULL_STATE_DICT"):
        contrastive._publish(tmp_path / "work", tmp_path / "pos", tmp_path / "work" / "adapter")
    assert not (tmp_path / "pos").exists()


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        ("preregister --command sweep --questions eval --family +1 --output p", 'like "eval=40"'),
        ("plan asked --effect 10", "a pilot is one of sweep, compare or predict-finetuning"),
        ("pack made", "so it is no run; name one of its runs, as made/seed0"),
        ("push tuned --repo a/b", "name one in it, as tuned/adapter"),
        (
            'optimize --targets "sycophancy=0,formality=70"',
            "a ready one for the packaged model: persona-lora gallery get, then give "
            "checkpoints/ready/formality/diff, or --trait-vector-dir checkpoints/ready",
        ),
        (
            "compare-methods --persona-id episode-000101_B --methods lora",
            "then give checkpoints/ready/self_other_focus/diff, or --trait-vector-dir",
        ),
        (
            "evaluate --trait evil --diff checkpoints/evil/diff --coefficient 1 --output x.csv",
            "gallery get, then give checkpoints/ready/evil/diff\n",
        ),
        (
            "sweep --trait evil --diff checkpoints/ready/evil/diff",
            "checkpoints/ready/evil/diff does not exist; expected a PEFT adapter folder or a diff "
            "file; get it with: persona-lora gallery get\n",
        ),
        (
            "export --mix evil=-1 --format peft --output out",
            "then give checkpoints/ready/evil/diff",
        ),
        (
            "evaluate --trait evil --diff finetunes/evil --coefficient 1 --output x.csv",
            "expected a PEFT adapter folder or a diff file\n",
        ),
        ("sweep --trait evil --diff mine/diff", "expected a PEFT adapter folder or a diff file\n"),
        ("serve --directions nowhere", "nowhere holds no diff of any trait; train one with"),
    ],
)
def test_a_newcomers_mistake_is_answered_with_what_to_give_instead(run, tmp_path, words, remedy):
    for folder in ("asked", "made/seed0"):
        Run.open(tmp_path / folder, command="evaluate", config={"trait": "x"}, seed=0)
    (tmp_path / "tuned" / "adapter").mkdir(parents=True)
    (tmp_path / "tuned" / "adapter" / "adapter_config.json").write_text("{}")
    status, _, error = run(*shlex.split(words))
    assert (status, remedy in error, error.count("\n")) == (2, True, 1), error
