"""A model at a mixing desk: every trait a slider, steered and unsteered answers in one batch.

Knows mixes, answers and scores; refuses to know what shows them. Nothing of a visitor is kept: the
coefficients come with every question, so that visitors never meet each other's.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

from persona_lora.core.chat import Conversation, Exchange
from persona_lora.core.errors import UserError
from persona_lora.core.files import read_json, write_json
from persona_lora.core.lora_diff import LoRADiff, finite_coefficient
from persona_lora.core.personas import WEIGHTS, Coefficients, saved_mixes
from persona_lora.core.traits import Trait
from persona_lora.judges.judging import Judge
from persona_lora.judges.verdicts import fitness_on
from persona_lora.models.generation import RowPlan, generate_answers
from persona_lora.models.loading import ChatModel
from persona_lora.report.scores import JUDGE_UNFIT
from persona_lora.steering.bank import Bank
from persona_lora.steering.export import Exported, export_peft
from persona_lora.steering.steerer import select_batch

LONGEST = 400  # tokens
LONGEST_MESSAGE = 4_000  # characters
LONGEST_CHAT = 16_000
ROLES = ("user", "assistant")
LONGEST_NAME = 60
MOST_MIXES = 200


WAITING_OF_ONE = 4
WAITING_IN_ALL = 40


class Turns:
    """Turns given round by round: after a visitor's turn, everybody else who waits comes first.

    UserError for a visitor who has too many waiting, and for anyone while too many wait in all.
    """

    def __init__(
        self, waiting_of_one: int = WAITING_OF_ONE, waiting_in_all: int = WAITING_IN_ALL
    ) -> None:
        self._of_one = waiting_of_one
        self._in_all = waiting_in_all
        self._change = threading.Condition()
        self._busy = False
        self._waiting: dict[str, deque[object]] = {}  # in the order in which visitors are next

    @contextmanager
    def turn(self, visitor: str) -> Iterator[None]:
        """Wait for the visitor's turn, and hold it for the block."""
        ticket = object()
        with self._change:
            self._join(visitor, ticket)
            try:
                self._change.wait_for(lambda: not self._busy and self._is_next(visitor, ticket))
            except BaseException:
                self._leave(visitor, ticket)
                raise
            self._leave(visitor, ticket)
            self._busy = True
        try:
            yield
        finally:
            with self._change:
                self._busy = False
                self._change.notify_all()

    def _join(self, visitor: str, ticket: object) -> None:
        if len(self._waiting.get(visitor, ())) >= self._of_one:
            raise UserError(f"{self._of_one} questions of yours wait already; wait for an answer")
        if sum(map(len, self._waiting.values())) >= self._in_all:
            raise UserError(f"{self._in_all} questions wait already; come back in a while")
        self._waiting.setdefault(visitor, deque()).append(ticket)

    def _is_next(self, visitor: str, ticket: object) -> bool:
        return next(iter(self._waiting)) == visitor and self._waiting[visitor][0] is ticket

    def _leave(self, visitor: str, ticket: object) -> None:
        """Take a ticket out; what else the visitor waits for goes behind all others."""
        tickets = self._waiting.pop(visitor)
        tickets.remove(ticket)
        if tickets:
            self._waiting[visitor] = tickets
        self._change.notify_all()


class Pair(NamedTuple):
    """One question with its answers: with the mix, and without."""

    steered: Exchange
    unsteered: Exchange


@dataclass(eq=False)
class MixingDesk:
    """A model with a diff for every trait; answers are given one pair after another.

    ``judges`` builds the judge of a trait, on its first use; ``labelled`` has the labels that tell
    how fit it is. Turns are what lets several visitors share one model: a pair is answered as a
    whole, with its own coefficients.
    """

    chat_model: ChatModel
    diffs: Mapping[str, LoRADiff]
    judges: Mapping[str, Callable[[], Judge]] = field(default_factory=dict)
    labelled: Mapping[str, Trait] = field(default_factory=dict)
    _turns: Turns = field(default_factory=Turns)
    _built: dict[str, Judge] = field(default_factory=dict)
    _unfit: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        if not self.diffs:
            raise UserError("the mixing desk needs at least one trait's diff")

    @property
    def traits(self) -> tuple[str, ...]:
        """The traits, sorted: the order of the sliders."""
        return tuple(sorted(self.diffs))

    def mix(self, values: Sequence[float | None]) -> Coefficients:
        """Return coefficients from the sliders' values; UserError for what is out of range."""
        if len(values) != len(self.traits):
            raise UserError(f"{len(values)} values for {len(self.traits)} traits")
        found = {}
        for trait, value in zip(self.traits, values, strict=True):
            found[trait] = finite_coefficient(0.0 if value is None else float(value))
        return Coefficients.of(found).bounded()

    def answer(
        self,
        conversation: Conversation,
        mix: Coefficients,
        *,
        plain: Conversation | None = None,
        max_new_tokens: int = 80,
        temperature: float = 0.0,
        seed: int = 0,
        visitor: str = "",
    ) -> Pair:
        """Answer a conversation's last message with the mix and without, as two rows of one batch.

        ``plain`` is the conversation that the unsteered model has had, where it differs. UserError
        for an empty message, one or a chat that is too long, more tokens than ``LONGEST``, and a
        ``visitor`` who has too much waiting.
        """
        if not conversation or not conversation[-1]["content"].strip():
            raise UserError("there is no question; write one first")
        for chat in (conversation, plain or conversation):
            _check_length(chat)
        if not 1 <= max_new_tokens <= LONGEST:
            raise UserError(f"the longest answer must be 1–{LONGEST} tokens, got {max_new_tokens}")
        bank = Bank(diffs={trait: self.diffs[trait] for trait in self.traits})
        steering = bank.steerer(self.chat_model, [mix.as_dict(), {}])
        with self._turns.turn(visitor), steering as steerer:
            answers = generate_answers(
                self.chat_model,
                [conversation, conversation if plain is None else plain],
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                seed=seed,
                batch_size=2,
                prepare_batch=partial(select_batch, steerer),
                plan=RowPlan(streams=[0, 0], keep_rows=steerer.keep_rows),
            )
        question = conversation[-1]["content"]
        return Pair(*(Exchange(question, each.text, each.finished) for each in answers))

    def scores(
        self, trait: str, pair: Pair, *, visitor: str = ""
    ) -> tuple[float | None, float | None]:
        """Return the judge's scores of both answers on a trait, 0–100; None where unscored."""
        if trait not in self.judges:
            raise UserError(f"there is no judge for {trait}")
        with self._turns.turn(visitor):
            if trait not in self._built:
                self._built[trait] = self._judge(trait)
            verdicts = self._built[trait].judge(pair, trait)
        return verdicts[0].score, verdicts[1].score

    def _judge(self, trait: str) -> Judge:
        judge, labels = self.judges[trait](), self.labelled.get(trait)
        if labels is not None and fitness_on(judge, labels, self.chat_model.name).fit is False:
            self._unfit.add(trait)
        return judge

    def mark(self, trait: str) -> str:
        """Return what stands behind a trait's name beside its scores: "" where its judge is fit."""
        return JUDGE_UNFIT if trait in self._unfit else ""

    def save(self, mix: Coefficients, folder: Path, name: str) -> Path:
        """Write a mix as ``<name>.json`` in ``folder``: ``{"evil": -1.0, …}``.

        UserError for a name that is none or is taken by another mix, and for a full folder.
        """
        path = folder / f"{file_name(name)}.json"
        if path.stem.endswith(WEIGHTS):
            raise UserError(f"a name that ends in {WEIGHTS} is a search's; give another one")
        if path.exists():
            if path.is_file() and read_json(path) == mix.as_dict():
                return path
            raise UserError(f"there is a mix {path.stem!r} already; give this one another name")
        if len(saved_mixes(folder)) >= MOST_MIXES:
            raise UserError(f"{folder} holds {MOST_MIXES} mixes; remove some from it first")
        write_json(path, mix.as_dict())
        return path

    def load(self, path: Path) -> Coefficients:
        """Read a mix; traits that it does not name are 0. UserError for one without a slider."""
        read = Coefficients.read(path).as_dict()
        unknown = sorted(set(read) - set(self.traits))
        if unknown:
            raise UserError(f"{path} mixes {unknown[0]}, for which there is no slider")
        return self.mix([read.get(trait, 0.0) for trait in self.traits])

    def export(self, mix: Coefficients, folder: Path) -> Exported:
        """Write a mix as one PEFT adapter; raises UserError where all coefficients are 0."""
        terms = {self.diffs[trait]: value for trait, value in mix.as_dict().items() if value}
        if not terms:
            raise UserError("all sliders stand at 0: there is nothing to export")
        return export_peft(terms, folder)


def file_name(title: str) -> str:
    """Return a title as a file's name; raises UserError for an empty or a long one."""
    name = "".join(
        letter if letter.isalnum() or letter in "-_" else "_" for letter in title.strip()
    )
    if not name:
        raise UserError("give the mix a name first")
    if len(name.encode()) > LONGEST_NAME:
        raise UserError(f"the mix's name is too long; {LONGEST_NAME} plain letters are the most")
    return name


def _check_length(chat: Conversation) -> None:
    if any(message["role"] not in ROLES for message in chat):
        raise UserError(f"a chat is of {' and '.join(ROLES)} alone; start a new one")
    lengths = [len(message["content"]) for message in chat]
    if lengths[-1] > LONGEST_MESSAGE:
        raise UserError(f"the question is {lengths[-1]} characters long, over {LONGEST_MESSAGE}")
    if sum(lengths) > LONGEST_CHAT:
        raise UserError(f"the chat is over {LONGEST_CHAT} characters long; start a new one")
