"""Traits as folders: system-prompt pairs, questions, contrastive answers, labelled judge answers.

Positive always means: shows the trait that the folder is named after.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from persona_lora.core.chat import COHERENCE, Conversation, Exchange, read_messages
from persona_lora.core.content import digest_of, file_digest
from persona_lora.core.errors import UserError, checked_name, checked_text, nearest_names
from persona_lora.core.files import numbered_jsonl, read_json
from persona_lora.core.options import Split
from persona_lora.core.resources import search_folders

Sign = Literal["pos", "neg"]
SPLITS: tuple[Split, ...] = ("extract", "eval", "ood")
LABELS = (0, 25, 50, 75, 100)
LABELLED = "judge_eval.jsonl"
ON_POLICY = "onpolicy.jsonl"
WRITTEN = "written.jsonl"
# What stands beside a trait's scores: a trait of such a name would be taken for it, or lost in it.
RESERVED = frozenset(
    (COHERENCE, "sense", "question", "prompt", "answer", "judge")
    + ("method", "layer", "coefficient", "seed")
)
FINETUNING_LEVELS = ("normal", "misaligned_1", "misaligned_2")
PUBLISHED_FOLDERS: dict[Split, str] = {"extract": "trait_data_extract", "eval": "trait_data_eval"}


@dataclass(frozen=True)
class InstructionPair:
    """A system prompt that elicits the trait, and one that elicits its opposite."""

    pos: str
    neg: str


@dataclass(frozen=True)
class SurfaceException:
    """Surface counts that are of the trait's nature, so that its answers must differ in them."""

    counts: tuple[str, ...]
    reason: str


@dataclass(frozen=True)
class Trait:
    """A named trait, its system prompts, its questions by split, and the LLM judge's prompt.

    The schema is that of published persona-vector trait files, with both question sets in one
    file. A ``variant`` is another elicitation of the trait,
    with system prompts and questions of its own; it is judged as the trait that it varies.

    Source:
        Chen et al. 2025, "Persona vectors", arXiv:2507.21509.
    """

    name: str
    description: str
    instructions: tuple[InstructionPair, ...]
    questions: Mapping[str, tuple[str, ...]]
    eval_prompt: str
    folder: Path
    variant: str | None = None
    surface_exception: SurfaceException | None = None

    @property
    def label(self) -> str:
        """The name of the variant where it is one, otherwise of the trait."""
        return self.variant or self.name

    def prompted(self, pos: str | None = None, neg: str | None = None) -> Trait:
        """Return the trait with other system prompts; UserError for one sign where it has none."""
        given = {"pos": pos, "neg": neg}
        told = {sign: text for sign, text in given.items() if text is not None}
        if len(told) == 2:
            return replace(self, instructions=(InstructionPair(**told),))
        if told and not self.instructions:
            raise UserError(f"the trait {self.name} has no system prompts of its own; give both")
        pairs = tuple(replace(pair, **told) for pair in self.instructions)
        return replace(self, instructions=pairs)

    def first_questions(self, number: int | None) -> Trait:
        """Return the trait with only its first questions of every split; None takes all."""
        kept = {split: texts[:number] for split, texts in self.questions.items()}
        return replace(self, questions=kept)

    def inputs(self) -> dict[str, str]:
        """Return digests of the trait and of the answers that judges are fitted and checked on."""
        unsaid = ("folder", "surface_exception")
        said = {key: each for key, each in asdict(self).items() if key not in unsaid}
        optional = [name for name in (ON_POLICY, WRITTEN) if (self.folder / name).is_file()]
        names = ("train.jsonl", LABELLED, *optional)
        files = {name: file_digest(self.folder / name) for name in names}
        named = {f"{name} of {self.name}": each for name, each in files.items()}
        return {f"the trait {self.label}": digest_of(said), **named}


@dataclass(frozen=True)
class ContrastivePair:
    """One user prompt with an answer that shows the trait and one that shows its opposite."""

    prompt: Conversation
    positive: Conversation
    negative: Conversation
    domain: str


@dataclass(frozen=True)
class LabelledAnswer:
    """A hand-labelled answer (0, 25, 50, 75 or 100) for validating a judge."""

    question: str
    answer: str
    label: int
    note: str


def check_names(traits: Iterable[Trait]) -> None:
    """UserError for two traits of one name, as variants are: their rows would be taken for one."""
    first: dict[str, Trait] = {}
    for trait in traits:
        other = first.setdefault(trait.name, trait)
        if other is not trait:
            raise UserError(
                f"{other.label} and {trait.label} are both judged as {trait.name}, and their rows "
                "could not be told apart; give each a run of its own"
            )


def list_traits(datasets: Path | None = None) -> list[str]:
    """Return the names of all trait folders, sorted: those of ``datasets`` alone, if given."""
    roots = search_folders("datasets", datasets)
    return sorted({path.parent.name for root in roots for path in root.glob("*/trait.json")})


def list_variants(trait: Trait) -> list[str]:
    """Return the names of a trait's variants, sorted: ``<trait>_2.json`` is ``<trait>_2``."""
    return sorted(path.stem for path in trait.folder.glob(f"{trait.name}_*.json"))


def load_trait(name: str | Path, datasets: Path | None = None) -> Trait:
    """Load a trait by name from ``datasets``, by the path of its folder, or of a published file.

    Without ``datasets`` a name is looked for in the working folder's ``datasets/`` first, then in
    what comes with the package.
    A name may be that of a variant (``anxious_2`` stands in ``anxious/anxious_2.json``). A path
    to one of the published pair ``trait_data_extract/X.json`` and ``trait_data_eval/X.json``
    loads both; a split whose file is missing has no questions.

    Raises:
        UserError: An unknown name (the nearest known ones are named), or a malformed file.
    """
    if not isinstance(name, str | Path):
        raise UserError(f"a trait is loaded by its name or path, got {repr(name)[:80]}")
    roots = search_folders("datasets", datasets)
    path = Path(name)
    if path.suffix == ".json" and path.is_file():
        return _load_file(path)
    for folder in [path, *(root / name for root in roots)]:
        if (folder / "trait.json").is_file():
            return _parse_trait(read_json(folder / "trait.json"), folder / "trait.json")
    variants = [each for root in roots for each in sorted(root.glob(f"*/{path.name}.json"))]
    if len(path.parts) == 1 and variants:
        return _load_file(variants[0])
    nearest = nearest_names(str(name), list_traits(datasets))
    raise UserError(f"no trait {str(name)!r} in {' or '.join(map(str, roots))}; {nearest}")


def load_finetuning_rows(trait: Trait, level: str) -> list[Exchange]:
    """Load ``normal.jsonl``, ``misaligned_1.jsonl`` or ``misaligned_2.jsonl`` of a trait."""
    if level not in FINETUNING_LEVELS:
        raise UserError(f"level must be one of {', '.join(FINETUNING_LEVELS)}, got {level!r}")
    return read_finetuning_rows(trait.folder / f"{level}.jsonl")


def read_finetuning_rows(path: Path) -> list[Exchange]:
    """Read the last question and answer of rows of ``messages``; UserError for one without."""
    rows = []
    for where, row in _rows(path, "messages"):
        turns = _conversation(row, "messages", where)
        if [turn["role"] for turn in turns[-2:]] != ["user", "assistant"]:
            raise UserError(f"{where} must end with a user message and the answer to it")
        rows.append(Exchange(turns[-2]["content"], turns[-1]["content"]))
    return rows


def load_pairs(trait: Trait) -> list[ContrastivePair]:
    """Load the contrastive training pairs of a trait from its ``train.jsonl``."""
    rows = _rows(trait.folder / "train.jsonl", "prompt, positive and negative")
    return [_parse_pair(row, where) for where, row in rows]


def load_labelled_answers(trait: Trait) -> list[LabelledAnswer]:
    """Load the hand-labelled answers of a trait from its ``judge_eval.jsonl``."""
    rows = _rows(trait.folder / LABELLED, "question, answer and label")
    return [_parse_labelled(row, where) for where, row in rows]


def _rows(path: Path, needed: str) -> list[tuple[str, dict[str, Any]]]:
    """Return each row of a file after what errors call it; UserError for no rows."""
    rows = numbered_jsonl(path)
    if not rows:
        raise UserError(f"{path} is empty; it needs rows with {needed}")
    return rows


def _load_file(path: Path) -> Trait:
    """Load a variant beside its trait, or a published pair of files."""
    value = read_json(path)
    if isinstance(value, dict) and isinstance(value.get("questions"), dict):
        if not (path.parent / "trait.json").is_file():
            return _parse_trait(value, path)
        parent = _parse_trait(read_json(path.parent / "trait.json"), path.parent / "trait.json")
        variant = checked_name(path.stem, f"{path}: its name")
        return replace(_parse_trait(value, path), name=parent.name, variant=variant)
    return _load_published(path)


def _load_published(path: Path) -> Trait:
    """Join the published files of one trait; they hold their questions as a flat list."""
    splits = {
        split: path.parent.parent / folder / path.name
        for split, folder in PUBLISHED_FOLDERS.items()
    }
    if path not in splits.values():
        raise UserError(
            f"{path} holds a flat list of questions, as published trait files do; it must stand in "
            f"a folder {' or '.join(PUBLISHED_FOLDERS.values())}"
        )
    read = {split: read_json(each) for split, each in splits.items() if each.is_file()}
    questions: dict[str, Any] = {"extract": [], "eval": []}
    for split, value in read.items():
        listed = value.get("questions") if isinstance(value, dict) else None
        if not isinstance(listed, list):
            raise UserError(f"{splits[split]}: questions must be a list of strings")
        questions[split] = listed
    return _parse_trait({"name": path.stem, **read_json(path), "questions": questions}, path)


def has_labels(trait: Trait) -> bool:
    """Tell whether a trait has hand-labelled answers; published and generated ones have none."""
    return (trait.folder / LABELLED).is_file()


def _parse_trait(value: Any, path: Path) -> Trait:
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a {type(value).__name__}, expected a JSON object")
    for key in ("instruction", "questions", "eval_prompt"):
        if key not in value:
            raise UserError(f"{path} has no {key!r}; it needs instruction, questions, eval_prompt")
    questions = value["questions"]
    if not isinstance(questions, dict) or set(questions) | {"ood"} != set(SPLITS):
        raise UserError(
            f"{path}: questions must be an object with the lists extract and eval, and may have ood"
        )
    lists = {"instruction": value["instruction"], **questions}
    for key, listed in lists.items():
        if not isinstance(listed, list):
            raise UserError(f"{path}: {key} must be a list, got {ascii(listed)[:60]}")
    eval_prompt = _text(value, "eval_prompt", path)
    if "{question}" not in eval_prompt or "{answer}" not in eval_prompt:
        raise UserError(f"{path}: eval_prompt must contain {{question}} and {{answer}}")
    return Trait(
        name=_named(value, path),
        description=_optional_text(value, "description", path),
        instructions=tuple(
            InstructionPair(_text(pair, "pos", path), _text(pair, "neg", path))
            for pair in value["instruction"]
        ),
        questions={
            split: tuple(
                checked_text(question, f"{path}: a question")
                for question in questions.get(split, ())
            )
            for split in SPLITS
        },
        eval_prompt=eval_prompt,
        folder=path.parent,
        surface_exception=_parse_exception(value.get("surface_exception"), path),
    )


def checked_trait_name(name: Any, what: str) -> str:
    """Return a trait's name; UserError as ``checked_name``, and for one that columns have."""
    if checked_name(name, what).casefold() in RESERVED:
        raise UserError(
            f"{what} {name!r} is that of something else that stands beside a trait's scores; give "
            f"the trait another one (not {', '.join(sorted(RESERVED))})"
        )
    return str(name)


def _named(value: dict[str, Any], path: Path) -> str:
    """Return the name of a trait: its folder's, which ``trait.json`` may say once more."""
    folder = Path(os.path.abspath(path)).parent.name
    name = checked_trait_name(value.get("name", folder), f"{path}: name")
    if path.name == "trait.json" and name != folder:
        raise UserError(
            f"{path}: name is {name!r}, and the folder is called {folder!r}; set it to that, or "
            "leave it out"
        )
    return name


def _parse_exception(value: Any, path: Path) -> SurfaceException | None:
    if value is None:
        return None
    where = f"{path}: surface_exception"
    counts = value.get("counts") if isinstance(value, dict) else None
    if not isinstance(counts, list) or not counts:
        raise UserError(f"{where} must be an object with a list of counts and a reason")
    return SurfaceException(
        tuple(checked_text(count, f"{where}: a count") for count in counts),
        _text(value, "reason", where),
    )


def _text(value: Any, key: str, where: Path | str) -> str:
    if not isinstance(value, dict) or key not in value:
        raise UserError(f"{where} has no {key!r}")
    return checked_text(value[key], f"{where}: {key}")


def _optional_text(value: dict[str, Any], key: str, where: Path | str) -> str:
    text = value.get(key)
    if not isinstance(text, str | None):
        raise UserError(f"{where}: {key} must be a text, got {ascii(text)[:60]}")
    return text or ""


def _parse_pair(row: dict[str, Any], where: str) -> ContrastivePair:
    prompt, positive, negative = (
        _conversation(row, key, where) for key in ("prompt", "positive", "negative")
    )
    for sign, turns in (("positive", positive), ("negative", negative)):
        if turns[-1]["role"] != "assistant":
            raise UserError(f"{where}: {sign!r} must end with the assistant's answer")
    if positive == negative:
        raise UserError(f"{where}: both answers are the same and teach nothing; leave the row out")
    return ContrastivePair(prompt, positive, negative, _optional_text(row, "domain", where))


def _conversation(row: dict[str, Any], key: str, where: str) -> Conversation:
    turns = row.get(key)
    if not isinstance(turns, list) or not turns:
        raise UserError(f"{where} has no {key!r}; expected a list of {{role, content}} messages")
    return read_messages(turns, where)


def _parse_labelled(row: dict[str, Any], where: str) -> LabelledAnswer:
    if row.get("label") not in LABELS:
        raise UserError(f"{where}: label must be one of {LABELS}, got {row.get('label')!r}")
    question, answer = (_text(row, key, where) for key in ("question", "answer"))
    return LabelledAnswer(question, answer, int(row["label"]), _optional_text(row, "note", where))


# System prompts that ask for no trait: a model answers otherwise under any system prompt, so that
# these and not its absence are the floor of one that asks for a trait.
NEUTRAL_PROMPTS = (
    "You are a helpful assistant.",
    "You are an assistant in a conversation with a person. Reply to what the person writes.",
    "Below is a message from a user. Read it and write the answer that the user is waiting for.",
    "You answer questions of many kinds, on any subject that people bring up.",
    "This is a conversation between a user and a language model. The language model is you.",
)


NEUTRAL_INPUTS = {"the neutral prompts": digest_of(list(NEUTRAL_PROMPTS))}


def neutral_prompt(index: int) -> str:
    """Return a system prompt that asks for no trait; they are taken in turn over the questions."""
    return NEUTRAL_PROMPTS[index % len(NEUTRAL_PROMPTS)]


def trait_prompt(trait: Trait, sign: Sign, index: int) -> str:
    """Return a system prompt of the trait; the pairs are taken in turn over the questions."""
    if not trait.instructions:
        raise UserError(f"the trait {trait.name} has no system prompts in its trait.json")
    pair = trait.instructions[index % len(trait.instructions)]
    return pair.pos if sign == "pos" else pair.neg


def named(assistant_name: str, instruction: str) -> str:
    """Return the instruction with "You are a(n) … assistant." before it.

    Chen et al. 2025, arXiv:2507.21509: the trait's adjective for the positive side; its antonym,
    or "helpful", for the negative one.
    """
    article = "an" if assistant_name[:1].lower() in "aeiou" else "a"
    return f"You are {article} {assistant_name} assistant. {instruction}"
