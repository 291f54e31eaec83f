"""A system prompt that is tuned: wordings of a trait's instructions raced on tuning questions.

An untuned prompt is a straw man beside a steered model. Every instruction of the trait is worded in
several ways; all are asked a few tuning questions, the better half a few more, until one is left
(successive halving; Jamieson and Talwalkar 2016, arXiv:1502.07943). It is reported on questions
that it was not chosen by, beside the trait's own prompts. Refuses to know how answers are judged.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean

import pandas as pd

from persona_lora.core.chat import COHERENCE, Condition, Conversation
from persona_lora.core.errors import UserError
from persona_lora.core.files import write_text
from persona_lora.core.options import GenerationOptions
from persona_lora.core.runs import Output, Run
from persona_lora.core.traits import NEUTRAL_INPUTS, Sign, Trait, load_pairs, named, trait_prompt
from persona_lora.judges.judging import Judge
from persona_lora.judges.verdicts import judge_answers, lazily
from persona_lora.models.loading import ChatModel
from persona_lora.report import wording
from persona_lora.report.comparisons import frame, means, paired
from persona_lora.report.resampling import SCORES, holm
from persona_lora.report.scores import ScoredAnswer, judges_of, score_answers
from persona_lora.report.sections import Table
from persona_lora.report.summary import floor_under
from persona_lora.report.two_judges import agreement_line, two_judges
from persona_lora.steering.steerer import Unsteered
from persona_lora.studies.asking.run import Row, answer_rows, asked_of, open_run, plan_rows

FIRST_QUESTIONS = 4  # of every wording; twice as many of each half that is left
TUNED, OWN, NEUTRAL, NONE = "tuned", "the trait's own", "neutral", "no prompt"

Wording = Callable[[Trait, Sign, int], str]


def _shown(trait: Trait, sign: Sign, at: int) -> str:
    """Return the instruction with a training answer as an example."""
    pairs = load_pairs(trait)
    pair = pairs[at % len(pairs)]
    answer = (pair.positive if sign == "pos" else pair.negative)[-1]["content"]
    asked = pair.prompt[-1]["content"]
    return f"{trait_prompt(trait, sign, at)}\n\nFor example, asked: {asked}\nyou answer: {answer}"


WORDINGS: dict[str, Wording] = {
    "plain": trait_prompt,
    "named": lambda trait, sign, at: named(
        trait.name if sign == "pos" else "helpful", trait_prompt(trait, sign, at)
    ),
    "stressed": lambda trait, sign, at: (
        f"{trait_prompt(trait, sign, at)} This comes before everything else: every sentence of "
        "your answer shows it."
    ),
    "shown": _shown,
}


@dataclass(frozen=True)
class TunedPrompt:
    """The prompt that was chosen, its name, its score on tuning questions, and the held-out run."""

    prompt: str
    wording: str
    score: float
    held_out: Run


def wordings_of(trait: Trait, sign: Sign) -> dict[str, str]:
    """Return every wording of every instruction by its name; UserError where there is none."""
    if not trait.instructions:
        raise UserError(f"the trait {trait.name} has no system prompts in its trait.json")
    made = {
        f"{name} {at}": word(trait, sign, at)
        for at in range(len(trait.instructions))
        for name, word in WORDINGS.items()
    }
    return {name: text for name, text in made.items() if text.strip()}


def conversations_of(trait: Trait, sign: Sign) -> list[Conversation]:
    """Return all that a race may ask; UserError where there are no prompts, or no questions."""
    conditions = [
        Condition("prompt", system_prompt=text) for text in wordings_of(trait, sign).values()
    ]
    return asked_of(trait, ("extract", "eval"), conditions)


def tune_prompt(
    chat_model: ChatModel,
    trait: Trait,
    judge: Callable[[], Judge],
    output: Output,
    *,
    sign: Sign = "pos",
    options: GenerationOptions = GenerationOptions(),
) -> TunedPrompt:
    """Race wordings on the questions of "extract", then ask those of "eval"; resumes.

    Every round is a run below ``output``, and so is the report, ``held_out``. Wordings whose
    answers are less coherent than a sweep would take (``floor_under``, of no prompt's on the same
    questions) come last. Also writes ``prompt.txt``.
    """
    judge, made = lazily(judge), wordings_of(trait, sign)
    told: dict[str, list[ScoredAnswer]] = {name: [] for name in (NONE, *made)}
    left = list(made)

    def asked(part: str, conditions: Sequence[Condition], rows: Sequence[Row[Condition]]) -> Run:
        config = {
            "trait": trait.name,
            "sign": sign,
            "prompts": [each.system_prompt for each in conditions],
            "generation": dataclasses.asdict(options),
        }
        place, read = output.at(output.path / part), {**trait.inputs(), **NEUTRAL_INPUTS}
        run = open_run(place, "tune-prompt", chat_model, config, read, seed=options.seed)
        with run:
            answer_rows(chat_model, rows, Unsteered(), run, options)
            judge_answers(run, judge, trait)
        return run

    planned = partial(plan_rows, trait, samples=options.samples)
    for first, last in _rounds(len(left), len(trait.questions["extract"])):
        conditions = [Condition("none")]
        conditions += [Condition("prompt", system_prompt=made[name]) for name in left]
        known = first * options.samples
        rows = [
            row
            for condition in conditions
            for row in planned("extract", [condition], max_questions=last)[known:]
        ]
        run = asked(f"tuning_{first}_{last}", conditions, rows)
        scored = score_answers(run.read("answers"), run.read("verdicts"), trait.name)
        each = len(scored) // len(conditions)
        for at, name in enumerate((NONE, *left)):
            told[name] += scored[at * each : (at + 1) * each]
        floor = floor_under(_mean([row.coherence for row in told[NONE]]))
        worth = {name: _worth(told[name], sign, floor) for name in left}
        left = sorted(left, key=worth.__getitem__, reverse=True)[: max(1, len(left) // 2)]
    best = left[0]
    conditions = [Condition("none"), Condition("prompt_neutral"), Condition(f"prompt_{sign}")]
    conditions.append(Condition("prompt", system_prompt=made[best]))
    held_out = asked("held_out", conditions, planned("eval", conditions))
    write_text(output.path / "prompt.txt", made[best])
    return TunedPrompt(made[best], best, worth[best][1], held_out)


def _rounds(candidates: int, questions: int) -> Iterator[tuple[int, int]]:
    """Yield which questions each round asks: as many again as before, while two are left."""
    first, last = 0, min(FIRST_QUESTIONS, questions)
    while candidates > 1 and first < last:
        yield first, last
        first, last, candidates = last, min(2 * last, questions), max(1, candidates // 2)


def _worth(rows: Sequence[ScoredAnswer], sign: Sign, floor: float) -> tuple[bool, float]:
    """Return whether answers are coherent, and their mean score in the direction asked for."""
    score, sense = (_mean([getattr(row, each) for row in rows]) for each in ("trait", COHERENCE))
    if score is None:
        return False, -math.inf
    return (sense or 0.0) >= floor, score if sign == "pos" else 100 - score


def _mean(scores: Sequence[float | None]) -> float | None:
    known = [each for each in scores if each is not None]
    return fmean(known) if known else None


def scores_by_prompt(held_out: Run, trait: str) -> pd.DataFrame:
    """Return a row per held-out answer: its ``prompt``, ``question``, and both of its scores."""
    said = {"none": NONE, "prompt_neutral": NEUTRAL, "prompt": TUNED}
    scored = score_answers(held_out.read("answers"), held_out.read("verdicts"), trait)
    place = [(said.get(row.answer["method"], OWN), row.answer["question_id"]) for row in scored]
    rows = [
        {"prompt": prompt, "question": at, trait: row.trait, COHERENCE: row.coherence}
        for (prompt, at), row in zip(place, scored, strict=True)
    ]
    return frame(rows, [trait, COHERENCE])


def tuned_table(found: TunedPrompt, trait: str) -> Table:
    """Return the held-out means of every prompt and of none, and how far the tuned one gained."""
    rows = scores_by_prompt(found.held_out, trait)
    by, unit = "prompt", "question"
    scores, sense = (
        means(rows, by=by, value=value, unit=unit, scale=SCORES) for value in (trait, COHERENCE)
    )
    gaps = paired(rows, by=by, value=trait, unit=unit, reference=OWN)
    shown = (NONE, NEUTRAL, OWN, TUNED)
    tested = [name for name in shown if name != NEUTRAL]  # which is described alone
    p_holm = dict(zip(tested, holm([gaps[name].p for name in tested]), strict=True))
    cells = (
        [name, wording.interval(scores[name]), wording.interval(sense[name])]
        + [*wording.gap(gaps[name].difference, p_holm.get(name))]
        for name in shown
    )
    columns = f"prompt | {trait} | coherence | less the trait's own | pairs | p (Holm)"
    judge = judges_of(found.held_out.read("verdicts"), trait)
    return Table.of(columns, cells, f"held-out questions, by {judge}")


def judges_line(found: TunedPrompt, trait: str) -> str:
    """Say who judged the held-out answers, and how the judges agree where there are two."""
    judge = judges_of(found.held_out.read("verdicts"), trait)
    return agreement_line(two_judges(found.held_out, trait), judge)
