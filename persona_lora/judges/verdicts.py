"""What judges make of a run's answers, as rows: verdicts, how fit the judge is, canaries, time.

The judge of a run stands in ``verdicts``, ``validation`` and ``canaries``. One of another family
that was asked beside it stands apart, in files of the same names after ``second_``; it is asked
about the trait alone, and nothing is ever averaged over the two. Refuses to know how a judge comes
to its scores.
"""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache

from persona_lora.core import progress
from persona_lora.core.chat import COHERENCE, Exchange
from persona_lora.core.errors import UserError
from persona_lora.core.runs import Run
from persona_lora.core.traits import Trait
from persona_lora.judges.canaries import Canary, show_canaries
from persona_lora.judges.embedding import EmbeddingJudge
from persona_lora.judges.fitness import JudgeValidation, fit_of, validate_judge
from persona_lora.judges.judging import Judge
from persona_lora.judges.labels import has_ratings
from persona_lora.judges.probe_judge import ProbeJudge
from persona_lora.report.scores import Row, with_mark


@dataclass(frozen=True)
class Judges:
    """What builds the judge of a run, which a call does, and one that is asked beside it.

    Without ``coherence`` the first is asked about the trait alone, as the second always is. What
    they made of nonsense is kept in ``canaries``: one judge of many runs is shown it once.
    """

    first: Callable[[], Judge]
    second: Callable[[], Judge] | None = None
    coherence: bool = True
    canaries: dict[tuple[str, ...], list[Canary]] = field(
        default_factory=dict, repr=False, compare=False
    )

    def __call__(self) -> Judge:
        """Return the judge whose scores count."""
        return self.first()


def lazily(make: Callable[[], Judge]) -> Judges:
    """Return a factory that builds each of its judges at the first call and keeps it."""
    if not isinstance(make, Judges):
        return Judges(cache(make))
    second = None if make.second is None else cache(make.second)
    return replace(make, first=cache(make.first), second=second)


def judge_answers(run: Run, make: Callable[[], Judge], trait: Trait) -> None:
    """Judge the answers of a run on the trait and on coherence; write verdicts and validation.

    What an earlier call has judged is kept; a row whose verdict is missing or unscored is judged
    again, and answers that are the same are judged once. ``make`` builds the judge, and is called
    only where something is left to judge; of ``Judges`` the second is asked about the trait as
    well. UserError where no answer at all has a score.
    """
    alone = isinstance(make, Judges) and not make.coherence
    known = make.canaries if isinstance(make, Judges) else {}
    _judge(run, make, trait, (trait.name,) if alone else (trait.name, COHERENCE), known)
    if isinstance(make, Judges) and make.second is not None:
        _judge(run, make.second, trait, (trait.name,), known, file="second_")


def validations_of(judge: Judge, trait: Trait, *, coherence: bool = True) -> list[JudgeValidation]:
    """Return how well a judge agrees with labelled answers that it was not fitted on.

    On the trait and, where answers are rated for it, on ``coherence``.
    """
    if isinstance(judge, (EmbeddingJudge, ProbeJudge)):
        return list(judge.validation)
    found = [validate_judge(judge, trait)]
    if coherence and has_ratings(trait):
        found.append(validate_judge(judge, trait, COHERENCE))
    return found


def fitness_on(judge: Judge, trait: Trait, model: str) -> JudgeValidation:
    """Return how well a judge agrees with labels on a trait alone, ``fit`` as in a run on a model.

    Warns where it is unfit.
    """
    found = validations_of(judge, trait, coherence=False)
    return fit_of(next(each for each in found if each.criterion == trait.name), model)


def _exchange(row: Row) -> Exchange:
    return Exchange(row["question"], row["answer"], row.get("finished", True))


def _judge(
    run: Run,
    make: Callable[[], Judge],
    trait: Trait,
    criteria: Sequence[str],
    known: dict[tuple[str, ...], list[Canary]],
    *,
    file: str = "",
) -> None:
    """Let one judge judge what it has not, into files whose names begin with ``file``."""
    answers = sorted(run.read("answers"), key=lambda row: int(row["row"]))
    kept = {
        (row["row"], row["criterion"]): row
        for row in run.read(f"{file}verdicts")
        if row["score"] is not None
    }
    if run.read(f"{file}validation") and len(kept) == len(criteria) * len(answers):
        return
    began, asked = time.perf_counter(), 0
    judge = make()
    validations = [
        fit_of(each, run.record["config"].get("model"))
        for each in validations_of(judge, trait, coherence=COHERENCE in criteria)
        if not file or each.criterion in criteria
    ]
    unfit = {each.criterion for each in validations if each.fit is False}
    for criterion in progress.over("judging", criteria):
        missing = [row for row in answers if (row["row"], criterion) not in kept]
        new = list(dict.fromkeys(map(_exchange, missing)))
        verdicts = dict(zip(new, judge.judge(new, criterion) if new else [], strict=True))
        asked += len(verdicts)
        for row in missing:
            verdict = verdicts[_exchange(row)]
            said = with_mark(verdict.judge, [criterion], unfit)
            given = dataclasses.asdict(replace(verdict, judge=said))
            kept[row["row"], criterion] = {"row": row["row"], **given}
        run.write(f"{file}verdicts", [kept[key] for key in sorted(kept)])
        judged = [row for row in kept.values() if row["criterion"] == criterion]
        if judged and all(row["score"] is None for row in judged):
            reasons = Counter(row["reason"] for row in judged).most_common(3)
            common = "; ".join(f"{reason} ({count})" for reason, count in reasons)
            remedy = ", or goes on without it with --second-judge none" if file else ""
            raise UserError(
                f"{judge.name} scored none of {len(judged)} answers on {criterion}: {common}; the "
                f"answers are kept, and the same command judges them again{remedy}"
            )
    canaries = []
    for criterion in criteria:
        place = file, trait.name, criterion
        if place not in known:
            known[place] = show_canaries(judge, trait, [criterion])
        canaries += known[place]
    run.write(f"{file}canaries", [dataclasses.asdict(each) for each in canaries])
    run.write(f"{file}validation", [dataclasses.asdict(each) for each in validations])
    seconds = time.perf_counter() - began
    run.append("judging", [{"judge": judge.name, "answers": asked, "seconds": round(seconds, 2)}])
