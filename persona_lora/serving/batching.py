"""Rows of many requests in one running batch, each with its own mix, length, temperature and seed.

Rows join between two steps and leave when they end. Knows token ids, mixes and waiting; refuses to
know texts, and who asked. A row's tokens do not depend on those beside it as far as its logits do
not: a batch of another shape may sum in another order.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from persona_lora.core.errors import UserError
from persona_lora.core.lora_diff import LoRADiff
from persona_lora.models.decoding import Decoding, decodes
from persona_lora.models.generation import drawn_tokens, ending_tokens, uniform_numbers
from persona_lora.models.likelihood import TokenLogprob, logprobs_of, text_logprobs
from persona_lora.models.loading import ChatModel
from persona_lora.steering.live import LiveLoRA

logger = logging.getLogger(__name__)

ROOM = 128  # tokens of every row that memory is taken for at a time
STOPPING = "the server is stopping; ask again when it is back"
Reason = Literal["stop", "length"]


class Busy(Exception):
    """There are too many rows waiting, or the batch is closed (``closed``)."""

    def __init__(self, message: str, *, closed: bool = False) -> None:
        super().__init__(message)
        self.closed = closed


class Token(NamedTuple):
    """The next token of a row; ``reason`` says why it is the last, if it is."""

    token: int
    logprobs: TokenLogprob | None
    reason: Reason | None


class Scored(NamedTuple):
    """The log-probabilities of a prompt's tokens, from its second on."""

    logprobs: list[TokenLogprob]


Event = Token | Scored | Exception  # an exception is the end of a row


@dataclass(eq=False)
class Row:
    """One answer that is asked for.

    ``top`` None is without log-probabilities, else with so many of the likeliest tokens; ``scored``
    asks for those of the prompt too. ``tell`` is called in the batch's thread with all that comes.
    Whoever asked sets ``gone`` when nobody waits for the rest.
    """

    prompt: list[int]
    mix: Sequence[float]  # by the batch's traits
    max_tokens: int
    tell: Callable[[Event], None]
    temperature: float = 0.0
    seed: int = 0
    stream: int = 0
    top: int | None = None
    scored: bool = False
    gone: bool = False
    given: int = 0
    numbers: Tensor = field(init=False)

    def __post_init__(self) -> None:
        drawn = self.max_tokens if self.temperature > 0 else 0
        self.numbers = uniform_numbers(self.seed, self.stream, drawn)

    def end(self, error: Exception) -> None:
        """Tell what ended the row early, if anybody still waits."""
        if not self.gone:
            self.gone = True
            self.tell(error)


class Batch:
    """The running batch of a model and its diffs; ``run`` holds the model until it is closed.

    At most ``max_batch`` rows run at once, and ``most_waiting`` wait. UserError for a model whose
    rows cannot join and leave a batch.
    """

    def __init__(
        self,
        chat_model: ChatModel,
        diffs: Mapping[str, LoRADiff],
        *,
        max_batch: int = 16,
        most_waiting: int = 64,
    ) -> None:
        if not decodes(chat_model.model):
            raise UserError(
                f"{chat_model.name} keeps more of a text than the keys and values of full "
                "attention, and its rows cannot join a running batch; serve another model, or "
                "export the mix for another server (docs/serving.md)"
            )
        self.chat_model = chat_model
        self.traits = tuple(sorted(diffs))
        self.most_waiting = most_waiting
        self._max_batch = max_batch
        self._steerer = LiveLoRA(
            chat_model.model,
            [diffs[trait] for trait in self.traits],
            [[0.0] * len(diffs)],
            allow_other_base=chat_model.allow_other_base,
        )
        self._ends = ending_tokens(chat_model)
        self._change = threading.Condition()
        self._waiting: deque[Row] = deque()
        self._closes: float | None = None  # the time at which rows are ended
        self._rows: list[Row] = []
        self._new: list[Row] = []  # which wait no more, and do not run yet
        self._steered: list[Row] = []
        self._decoding: Decoding | None = None
        self._next = torch.empty(0, dtype=torch.long)  # [rows], the newest tokens

    @property
    def load(self) -> tuple[int, int]:
        """How many rows run, and how many wait."""
        with self._change:
            return len(self._rows), sum(not row.gone for row in self._waiting)

    @property
    def closed(self) -> bool:
        """Whether no more rows are taken."""
        return self._closes is not None

    def put(self, rows: Sequence[Row]) -> None:
        """Let rows wait for their turn; raises Busy where all cannot."""
        with self._change:
            if self.closed:
                raise Busy(STOPPING, closed=True)
            self._waiting = deque(row for row in self._waiting if not row.gone)
            if len(self._waiting) + len(rows) > self.most_waiting:
                raise Busy(
                    f"{len(self._waiting)} answers wait already, and {self.most_waiting} may; ask "
                    "again in a while"
                )
            self._waiting.extend(rows)
            self._change.notify_all()

    def close(self, grace: float) -> None:
        """Take no more rows; end those that wait, and in ``grace`` seconds those that run."""
        with self._change:
            self._closes = time.monotonic() + grace
            waiting = [*self._waiting]
            self._waiting.clear()
            self._change.notify_all()
        for row in waiting:
            row.end(Busy(STOPPING, closed=True))

    def run(self) -> None:
        """Answer rows, in this thread, until the batch is closed and those that run have ended."""
        try:
            with self._steerer, torch.inference_mode():
                while self._turn():
                    pass
        finally:
            self.close(0)
            self._end_all(Busy(STOPPING, closed=True))

    def _turn(self) -> bool:
        """Let rows join or go on by a token; return False at the end."""
        with self._change:
            self._change.wait_for(lambda: self._waiting or self._rows or self.closed)
            free = range(min(len(self._waiting), self._max_batch - len(self._rows)))
            self._new = [self._waiting.popleft() for _ in free]
        if self._closes is not None and time.monotonic() >= self._closes:
            self._end_all(Busy(STOPPING, closed=True))
        for row in self._new:
            if row.scored and not row.gone:
                self._score(row)
        new = [row for row in self._new if not row.gone]
        begun = self._begin(new) if new else None
        with self._ended_by_errors([*self._rows, *new]):
            if begun is not None:
                self._join(new, *begun)
            elif self._decoding is not None:
                if self._decoding.room == 0:
                    self._decoding.join(steps=ROOM)
                self._steer(self._rows)
                self._next = self._tell(self._rows, self._decoding.step(self._next))
            self._leave()
        self._leave()  # those that an error has ended
        return not (self.closed and not self._rows)

    def _end_all(self, error: Exception) -> None:
        for row in [*self._rows, *self._new]:
            row.end(error)
        self._leave()

    @contextmanager
    def _ended_by_errors(self, rows: Sequence[Row]) -> Iterator[None]:
        """Let what fails end these rows, and not the batch."""
        try:
            yield
        except Exception as error:  # torch's own are of many kinds: IndexError, RuntimeError, …
            logger.exception("%d rows failed", len(rows))
            for row in rows:
                row.end(error)

    def _score(self, row: Row) -> None:
        """Tell the log-probabilities of a row's prompt."""
        with self._ended_by_errors([row]):
            self._steer([row])
            row.tell(Scored(text_logprobs(self.chat_model, row.prompt, row.top or 1)))

    def _begin(self, new: Sequence[Row]) -> tuple[Decoding, Tensor] | None:
        """Run the prompts of new rows; return them on their way, and their first tokens."""
        with self._ended_by_errors(new):
            self._steer(new)
            begun = Decoding(self.chat_model.model, *self._padded(new), None, ROOM)
            return begun, self._tell(new, begun.begin())
        return None

    def _join(self, new: Sequence[Row], begun: Decoding, first: Tensor) -> None:
        """Let new rows go on beside those that run."""
        if self._decoding is None:
            self._decoding, self._next = begun, first
        else:
            self._decoding.join(begun, steps=ROOM)
            self._next = torch.cat([self._next, first])
        self._rows += new

    def _leave(self) -> None:
        """Let the rows that are gone leave."""
        places = [at for at, row in enumerate(self._rows) if not row.gone]
        if len(places) == len(self._rows):
            return
        self._rows = [self._rows[at] for at in places]
        if self._decoding is None or not places:
            self._decoding = None
            return
        self._decoding.keep(places)
        self._next = self._next[places]

    def _steer(self, rows: Sequence[Row]) -> None:
        """Let the next pass be of these rows, whoever's the last one was."""
        if self._steered != rows:
            self._steerer.set_rows([row.mix for row in rows])
            self._steered = [*rows]

    def _padded(self, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
        """Return the prompts' tokens, padded on the left, and their mask: ``[rows, length]``.

        The padding is a token that every model has: a tokenizer's own may have no embedding.
        """
        longest = max(len(row.prompt) for row in rows)
        spare = [longest - len(row.prompt) for row in rows]
        tokens = [[0] * each + row.prompt for each, row in zip(spare, rows, strict=True)]
        mask = [[0] * each + [1] * (longest - each) for each in spare]
        device = self.chat_model.model.device
        return torch.tensor(tokens, device=device), torch.tensor(mask, device=device)

    def _tell(self, rows: Sequence[Row], logits: Tensor) -> Tensor:
        """Choose the next token of every row ``[rows]`` and tell it; rows that end are gone."""
        finite = logits.amax(dim=-1).isfinite().tolist()  # the maximum of a row with NaN is NaN
        tokens = _chosen(rows, logits)
        for at, (row, token) in enumerate(zip(rows, tokens.tolist(), strict=True)):
            if row.gone:
                continue
            if not finite[at]:
                row.end(self.chat_model.not_finite("this mix"))
                continue
            found = None
            if row.top is not None:
                (found,) = logprobs_of(logits[at : at + 1], [token], max(row.top, 1))
            row.given += 1
            reason: Reason | None = "length" if row.given == row.max_tokens else None
            reason = "stop" if token in self._ends else reason
            row.tell(Token(token, found, reason))
            row.gone = row.gone or reason is not None
        return tokens


def _chosen(rows: Sequence[Row], logits: Tensor) -> Tensor:
    """Return the next token of every row, ``[rows]``: the likeliest, or one that is drawn."""
    tokens = logits.argmax(dim=-1)
    drawn = [at for at, row in enumerate(rows) if row.temperature > 0]
    if drawn:
        numbers = [(rows[at].numbers[rows[at].given], rows[at].temperature) for at in drawn]
        uniform, heat = torch.tensor(numbers, device=logits.device).T[:, :, None]
        tokens[drawn] = drawn_tokens(logits[drawn], uniform, heat)
    return tokens
