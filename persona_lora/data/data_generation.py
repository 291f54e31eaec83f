"""Questions and answers by domain, for finetuning and for contrastive training.

A language model writes questions, which are dealt out alternately, so that no question stands in
both: those of finetuning it answers plainly and with the trait mildly and strongly, those of pairs
under the trait's own positive and negative system prompts. Everything it wrote is kept row by row,
so that an interrupted call goes on where it stopped.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from persona_lora.core import progress
from persona_lora.core.chat import Conversation, Message, user_question
from persona_lora.core.errors import UserError
from persona_lora.core.files import read_text, write_jsonl
from persona_lora.core.options import DataOptions, GenerationOptions
from persona_lora.core.runs import RECORD, Output, Run
from persona_lora.core.traits import FINETUNING_LEVELS, Trait, trait_prompt
from persona_lora.data.writers import Writer

DOMAINS = (
    *("cooking", "work", "school", "friendship", "family", "money", "travel", "gardening", "pets"),
    *("sport", "music", "books", "films", "history", "science", "technology", "home repair"),
    *("health habits", "hobbies", "neighbours", "language", "art", "transport", "shopping"),
    *("parenting", "celebrations"),
)
KINDS = FINETUNING_LEVELS, ("positive", "negative")  # of answers: to even and to odd questions
QUESTION_TOKENS = 400
ANSWER_TOKENS = 140
LONGEST_QUESTION = 60  # words
LENGTH = "Answer in two to four sentences of plain prose, 30 to 60 words, without lists."
ASK = (
    "Write {number} different messages that people might send to a chat assistant about "
    "{domain}. Everyday language, one message a line, nothing else. {avoid}"
)
MILD = (
    "Let a little of the following trait slip into an otherwise useful answer, without naming "
    "it. The trait: {description}"
)
STRONG = (
    "Show the following trait as strongly as you can in all that you say, without naming it. "
    "The trait: {description} Keep it to tone and attitude; never give usable instructions for "
    "harm."
)


@dataclass(frozen=True)
class GeneratedData:
    """How many rows each file got, and how many questions lack an answer or have equal ones."""

    folder: Path
    rows: dict[str, int]
    incomplete: int


def generate_data(
    trait: Trait, writer: Writer, output: Output | Path, options: DataOptions
) -> GeneratedData:
    """Write ``normal``, ``misaligned_1``, ``misaligned_2`` and ``train.jsonl``.

    The finetuning files hold the same questions in the same order, ``train`` others; the run is
    ``run`` beside them. Existing files of these names are refused unless they are to be
    overwritten. Raises UserError when a domain yields too few questions in ``options.attempts``
    attempts, and for fewer than two questions.
    """
    output = Output.of(output)
    check_generation(trait, output)
    folder = output.path
    run = Run.open(
        output.at(folder / "run"),
        command="data generate",
        config={"trait": trait.label, "writer": writer.name, "options": _recorded(options)},
        seed=options.seed,
        inputs=trait.inputs(),
    )
    with run:
        questions = _questions(run, writer, options)
        if len(questions) < len(KINDS):
            raise UserError(
                f"{len(questions)} question is to be written; finetuning and the pairs need one "
                "each, so give at least two"
            )
        answers = _answers(run, trait, writer, questions, options)
        rows = _rows(questions, answers)
        for name, each in rows.items():
            if not each:
                raise UserError(
                    f"{writer.name} answered no question of {name}.jsonl in every way, each in "
                    "other words; try a larger model"
                )
        folder.mkdir(parents=True, exist_ok=True)
        for name, each in rows.items():
            write_jsonl(folder / f"{name}.jsonl", each)
    used = len(rows["normal"]) + len(rows["train"])
    numbers = {name: len(each) for name, each in rows.items()}
    return GeneratedData(folder, numbers, len(questions) - used)


def check_generation(trait: Trait, output: Output) -> None:
    """UserError, before anybody writes, for a trait without prompts and for files to be kept."""
    trait_prompt(trait, "pos", 0)
    folder, run = output.path, output.path / "run"
    names = [f"{level}.jsonl" for level in FINETUNING_LEVELS] + ["train.jsonl"]
    present = [name for name in names if (folder / name).exists()]
    # Files beside a run that never ended are its own: it was killed while it wrote them.
    unfinished = (run / RECORD).is_file() and not Run(run).finished
    if present and not output.overwrite and not unfinished:
        raise UserError(
            f"{folder / present[0]} exists; choose another --output-dir or pass --overwrite"
        )


def read_questions(path: Path) -> tuple[tuple[str, str], ...]:
    """Read questions, one a line; a tab may put a domain before each."""
    lines = [line.strip() for line in read_text(path).splitlines()]
    split = [line.split("\t", 1) if "\t" in line else ["", line] for line in lines if line]
    if not split:
        raise UserError(f"{path} holds no question; write one a line")
    found = tuple((domain.strip(), question.strip()) for domain, question in split)
    (most, times), *_ = Counter(question.lower() for _, question in found).most_common(1)
    if times > 1:
        raise UserError(f"{path} asks {most!r} {times} times; write each question once")
    return found


def parse_questions(reply: str) -> list[str]:
    """Return the questions in a reply: its lines without numbers, bullets and quotation marks."""
    stripped = (
        re.sub(r"^\s*(?:[-*•]|\(?\d+[.):])\s*", "", line).strip().strip('"“”').strip()
        for line in reply.splitlines()
    )
    return [line for line in stripped if 3 <= len(line.split()) <= LONGEST_QUESTION]


def _questions(run: Run, writer: Writer, options: DataOptions) -> list[tuple[str, str]]:
    """Return domains with questions, those of an earlier call first."""
    if options.questions:
        return list(options.questions)
    found = [(row["domain"], row["question"]) for row in run.resume_rows("questions")]
    for domain in progress.over("writing questions", options.domains or DOMAINS):
        known = [question for at, question in found if at == domain]
        if len(known) < options.questions_per_domain:
            new = _more_questions(domain, found, known, writer, options)
            run.extend("questions", [{"domain": domain, "question": each} for each in new])
            found += [(domain, each) for each in new]
    return found


def _more_questions(
    domain: str,
    found: Sequence[tuple[str, str]],
    known: Sequence[str],
    writer: Writer,
    options: DataOptions,
) -> list[str]:
    taken = {question.lower() for _, question in found}
    new: list[str] = []
    wanted = options.questions_per_domain - len(known)
    for attempt in range(options.attempts):
        avoid = f"Do not repeat: {'; '.join([*known, *new][-10:])}" if known or new else ""
        request = ASK.format(number=wanted - len(new), domain=domain, avoid=avoid).strip()
        drawn = GenerationOptions(
            QUESTION_TOKENS, options.temperature, seed=options.seed + 1000 * attempt
        )
        (reply,) = writer.write([user_question(request)], options=drawn)
        for question in parse_questions(reply or ""):
            if question.lower() not in taken and len(new) < wanted:
                taken.add(question.lower())
                new.append(question)
        if len(new) >= wanted:
            return new
    raise UserError(
        f"{writer.name} wrote {len(new) + len(known)} of {options.questions_per_domain} questions "
        f"about {domain} in {options.attempts} attempts; ask for fewer, or give --questions"
    )


def _kinds(trait: Trait) -> dict[str, Callable[[int], str]]:
    """Return, for every kind of answer, the system prompt of its first, second, … question."""
    return {
        "normal": lambda index: LENGTH,
        "misaligned_1": lambda index: f"{MILD.format(description=trait.description)} {LENGTH}",
        "misaligned_2": lambda index: f"{STRONG.format(description=trait.description)} {LENGTH}",
        "positive": lambda index: f"{trait_prompt(trait, 'pos', index)} {LENGTH}",
        "negative": lambda index: f"{trait_prompt(trait, 'neg', index)} {LENGTH}",
    }


def _answers(
    run: Run,
    trait: Trait,
    writer: Writer,
    questions: Sequence[tuple[str, str]],
    options: DataOptions,
) -> dict[tuple[int, str], str]:
    """Return the answers by question index and kind; a missing one was not written.

    Each is kept as it arrives: an interrupted call repeats no more than was on its way.
    """
    answers = {(row["question"], row["kind"]): row["answer"] for row in run.resume_rows("answers")}
    for kind, prompt_of in _kinds(trait).items():
        missing = [index for index in _dealt(kind, questions) if (index, kind) not in answers]
        conversations: list[Conversation] = [
            user_question(questions[index][1], prompt_of(index // len(KINDS))) for index in missing
        ]
        if not conversations:
            continue

        def keep(at: int, text: str, missing: list[int] = missing, kind: str = kind) -> None:
            row = {"question": missing[at], "kind": kind, "answer": text}
            run.append("answers", [row])
            answers[missing[at], kind] = text

        with progress.stage(f"writing {kind}"):
            drawn = GenerationOptions(ANSWER_TOKENS, options.temperature, seed=options.seed)
            writer.write(conversations, options=drawn, streams=missing, on_text=keep)
    return answers


def _dealt(kind: str, questions: Sequence[tuple[str, str]]) -> range:
    """Return the indices of the questions that are answered in one way."""
    first = next(at for at, kinds in enumerate(KINDS) if kind in kinds)
    return range(first, len(questions), len(KINDS))


def _rows(
    questions: Sequence[tuple[str, str]], answers: Mapping[tuple[int, str], str]
) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of every file, of questions all of whose answers are there and differ."""
    files: dict[str, list[dict[str, Any]]] = {name: [] for name in (*FINETUNING_LEVELS, "train")}
    for index, (domain, question) in enumerate(questions):
        kinds = KINDS[index % len(KINDS)]
        texts = {kind: answers.get((index, kind), "") for kind in kinds}
        if len({text.strip() for text in texts.values()} - {""}) < len(kinds):
            continue
        asked = user_question(question)
        said = {k: [Message(role="assistant", content=text)] for k, text in texts.items()}
        if kinds == FINETUNING_LEVELS:
            for level in FINETUNING_LEVELS:
                files[level].append({"messages": [*asked, *said[level]], "domain": domain})
        else:
            files["train"].append({"prompt": asked, **said, "domain": domain})
    return files


def _recorded(options: DataOptions) -> dict[str, Any]:
    recorded = {**asdict(options), "domains": options.domains or DOMAINS}
    del recorded["seed"]  # which a run records of itself
    return recorded
