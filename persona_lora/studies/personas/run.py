"""Which mix of trait directions speaks like a given person? Search, then report on held-out parts.

The search sees the training prompts and a judge of the person's training conversations. The best of
many samples is a lucky one: before one is named best, the best few and the distribution's mean are
measured again on fresh prompts. What is reported is the fit on held-out prompts by a judge of the
test conversations: of the unsteered model, of the mean, of the incumbent, and of the floors and the
ceiling (``bounds``).
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import accumulate
from pathlib import Path
from typing import Any, ClassVar

from persona_lora.core.chat import Exchange, Verdict
from persona_lora.core.content import digest_of, file_digest
from persona_lora.core.errors import UserError
from persona_lora.core.files import ensure_writable_folder, read_json, write_json
from persona_lora.core.options import GenerationOptions, ObjectiveOptions
from persona_lora.core.personas import MIX, WEIGHTS, Coefficients, Persona, PersonaPrompts
from persona_lora.core.protocol import Design
from persona_lora.core.resources import resource_path
from persona_lora.core.runs import Output, Planned, Run
from persona_lora.judges.answer_gates import THRESHOLDS, counted, failures
from persona_lora.judges.budget import cap_behind, reasons
from persona_lora.judges.coherence import CoherenceScorer, Embed
from persona_lora.judges.judging import Judge
from persona_lora.judges.persona_judges import JudgeCheck
from persona_lora.judges.style_judge import PERSONA_FIT
from persona_lora.models.loading import ChatModel
from persona_lora.models.processes import Processes, recorded
from persona_lora.report.comparisons import ConditionFit, cells_of, columns_of
from persona_lora.report.resampling import FITS
from persona_lora.report.scores import grouped
from persona_lora.steering.bank import Bank
from persona_lora.studies.asking.run import Row, open_planned
from persona_lora.studies.personas.bounds import bound_answers
from persona_lora.studies.personas.choices import FILE, Part, choices_of, kept_choices
from persona_lora.studies.personas.climbing import kept_slopes
from persona_lora.studies.personas.figure import render_goal, render_search
from persona_lora.studies.personas.goals import VALUE, GoalProblem
from persona_lora.studies.personas.likeliest import kept_mix
from persona_lora.studies.personas.objective import (
    MixObjective,
    Relevance,
    Speaker,
    mean_of,
    plain_speaker,
)
from persona_lora.studies.personas.read_fits import REAL, UNSTEERED, condition_fits, over_prompts
from persona_lora.studies.personas.search import (
    Candidate,
    Generation,
    SearchOptions,
    SearchResult,
    Standing,
    evaluate_once,
    front_of,
    search,
)
from persona_lora.studies.report_page import write_report

logger = logging.getLogger(__name__)

FOUND = MEAN, INCUMBENT = "mean", "incumbent"
PROMPT = "prompt"
HELD_OUT, FINALISTS, BOUND_ROWS = "held_out", "finalists", "bounds"
NUM_FINALISTS = 3
# What a search records that its judges, its goal and its directions tell, once they are made.
TOLD_LATER = (*("goal", "judge", "report_judge", "second_judge", "counts", "scales", "directions"),)
RECORDED = (
    *("fit", "low", "high", "n", "coverage", "counted", "coherence", "relevance", "feasible"),
)
FIT_COLUMNS = columns_of(
    *("condition", "fit=fit.mean", "low=fit.low", "high=fit.high", "n=fit.n"),
    *("coverage=fit.coverage", "coherence=coherence.mean", "relevance=relevance.mean"),
    *("gain=difference.mean", "gain_low=difference.low", "gain_high=difference.high"),
    *("pairs=difference.n_questions", "effect_size", "p", "p_holm", "counted", "feasible"),
)


@dataclass(frozen=True, eq=False)
class PersonaProblem:
    """A persona, what is said to it, and its judges: what all methods of a comparison share.

    ``checks`` are the validations of embedded judges, ``judged_by`` digests of what all judges
    were made from.
    """

    chat_model: ChatModel
    persona: Persona
    prompts: PersonaPrompts
    search_judge: Judge
    report_judge: Judge
    coherence: CoherenceScorer
    relevance: Relevance
    embed: Embed
    generation: GenerationOptions
    processes: Processes = field(default_factory=Processes)
    checks: tuple[JudgeCheck, ...] = ()
    judged_by: Mapping[str, str] = field(default_factory=dict)

    def inputs(self) -> dict[str, str]:
        """Return digests of the model, of the person, and of what the judges were made from."""
        return {
            **self.chat_model.inputs(),
            f"the persona {self.persona.id}": self.persona.content(),
            **self.judged_by,
        }

    kind, scale, parts = "persona_id", FITS, None
    controls: ClassVar[tuple[str, ...]] = ()
    fitness: ClassVar[Mapping[str, list[dict[str, Any]]]] = {}  # that of its judges is in checks

    @property
    def name(self) -> str:
        """What the search is called."""
        return self.persona.id

    @property
    def learnt_from(self) -> Sequence[str]:
        """The utterances that no answer may copy."""
        return self.persona.utterances("train")

    @property
    def scored(self) -> tuple[str, ...]:
        """The columns of its rows that hold judges' scores."""
        alone = self.search_judge.name == self.report_judge.name  # one judge has nothing to add
        return ("score",) if alone else ("score", "searched_by")

    def record(self) -> dict[str, Any]:
        """Return what a run's configuration keeps of what is sought."""
        return {
            "persona": self.persona.id,
            "judge": self.search_judge.name,
            "report_judge": self.report_judge.name,
            "counts": THRESHOLDS,
        }

    def beside(self, best: Coefficients, searching: SearchOptions) -> dict[str, Told]:
        """Nothing stands beside: a comparison of methods has controls of its own."""
        return {}

    def judged(
        self, condition: str, exchanges: Sequence[Exchange], *, first: int = 0
    ) -> list[dict[str, Any]]:
        """Return the rows of one condition; ``first`` is the number of its first prompt.

        ``score`` is the fit of an answer that counts (``judges.answer_gates``), ``manner`` that of
        its manner alone, ``failed`` what is wrong with it, ``searched_by`` its manner by the judge
        of the search.
        """
        manners = self.report_judge.judge(exchanges, PERSONA_FIT)
        coherence = [each.score for each in self.coherence.verdicts(exchanges, "embedding")]
        relevance = [self._relevance_of(each) for each in exchanges]
        failed = failures(exchanges, self.learnt_from, coherence, relevance)
        searched_by: Sequence[Verdict | None] = [None] * len(exchanges)
        if "searched_by" in self.scored:
            searched_by = self.search_judge.judge(exchanges, PERSONA_FIT)
        measured = zip(exchanges, manners, failed, coherence, relevance, searched_by, strict=True)
        return [
            {
                "persona": self.persona.id,
                "condition": condition,
                "prompt_id": at,
                "prompt": asked.question,
                "answer": asked.answer,
                "score": counted(manner.score, wrong),
                "manner": manner.score,
                "failed": wrong,
                "reason": reasons(manner, searched),
                "judge": manner.judge,
                "coherence": coherent,
                "relevance": relevant,
                "searched_by": None if searched is None else searched.score,
                "weights": None,
            }
            for at, (asked, manner, wrong, coherent, relevant, searched) in enumerate(
                measured, start=first
            )
        ]

    def _relevance_of(self, exchange: Exchange) -> float | None:
        """Return an answer's relevance among the held-out prompts, its own prompt whatever it is.

        The lines of one conversation are like each other: among these alone, what a person really
        answered is harder to place than a model's answer to prompts on anything.
        """
        others = [Exchange(prompt, "") for prompt in self.prompts.held_out]
        return self.relevance([exchange, *others])[0]

    @cached_property
    def bounds(self) -> list[dict[str, Any]]:
        """The rows of the floors and of the ceiling (``bounds``), judged as all others are, once.

        Real utterances answer prompts of their own, which are numbered after the held-out ones:
        what was asked otherwise is paired with nothing.
        """
        prompts = self.prompts.held_out

        def judged() -> list[dict[str, Any]]:
            answers = bound_answers(self.persona, prompts, self.embed)
            first = {name: len(prompts) if name == REAL else 0 for name in answers}
            return [
                row
                for name, exchanges in answers.items()
                for row in self.judged(name, exchanges, first=first[name])
            ]

        return self.processes.from_main(judged)


Problem = PersonaProblem | GoalProblem


@dataclass(frozen=True, eq=False)
class Method:
    """One way of searching: which directions, at which scales, by which searcher.

    ``trained`` names the training seed of the directions where there are several.
    """

    name: str
    directions: Bank
    scales: Mapping[str, float]
    alpha: float = 2.0
    searcher: str = "cmaes"
    trained: str = ""


@dataclass(frozen=True)
class PersonaResult:
    """What a search found.

    ``best`` is "mean" (of the distribution; of another search than CMA-ES its best sample) or
    "incumbent": what stood higher on fresh prompts, where ``finalists`` were measured. Of several
    objectives the finalists are the front, "front_1" …, and ``best`` is nearest to all targets.
    ``fits`` hold the held-out fits of "none", the finalists and the bounds, ``rows`` the answers.
    """

    persona_id: str
    method: str
    best: str
    finalists: Mapping[str, Candidate]
    search: SearchResult
    fits: tuple[ConditionFit, ...]
    rows: tuple[Mapping[str, Any], ...]
    folder: Path

    @property
    def weights(self) -> Coefficients:
        """The mix that is named best."""
        return self.finalists[self.best].coefficients

    @property
    def standing(self) -> Standing:
        """How that mix stands on fresh prompts, where no search has seen it."""
        return self.finalists[self.best].standing

    def fit_of(self, condition: str) -> ConditionFit:
        """Return the held-out fit of one condition."""
        return next(each for each in self.fits if each.condition == condition)


def optimise_persona(
    problem: Problem,
    method: Method,
    output: Output | Path,
    *,
    searching: SearchOptions = SearchOptions(),
    objective: ObjectiveOptions = ObjectiveOptions(),
    watch: Callable[[Generation], None] | None = None,
) -> PersonaResult:
    """Search, then score on held-out prompts; run again, it goes on where it stopped.

    Writes the run folder (``generations.jsonl``, ``held_out.jsonl``) and beside it
    ``{persona}_optimization.json`` and ``{persona}_best_weights.json``; for diffs
    ``{persona}_mix.json`` as well, which is what ``serve`` and the playground take.
    """
    check_fresh(problem.prompts, objective)
    if problem.parts is not None and method.searcher == "cmaes":
        raise UserError("the searcher cmaes has one objective; for a front take tpe or random")
    processes = problem.processes
    planned = _planned(problem, method, searching, objective)
    run = processes.from_main(lambda: open_planned(output, planned, problem.chat_model))
    speaker = speaker_of(problem, method)
    with recorded(run, processes):
        if processes.index == 0:
            run.write("judge_checks", [dataclasses.asdict(each) for each in problem.checks])
        processes.from_main(lambda: _keep_fitness(run, problem))
        found = search(
            objective_of(problem, speaker, "train", objective),
            method.directions.names,
            replace(searching, seed=own_seed(searching.seed, problem.name)),
            run,
            searcher=method.searcher,
            processes=processes,
            watch=watch,
        )
        result = _reported(problem, method, speaker, found, searching, objective, run)
    if processes.index == 0:
        render = render_search if isinstance(problem, PersonaProblem) else render_goal
        render(run).save(run.folder / "search.png")
        write_report([run.folder], run.folder / "report.html")
        _write_best(problem, method, result)
    return result


def _keep_fitness(run: Run, problem: Problem) -> None:
    """Write how fit the judges are, where that does not stand in the run, or was out of reach."""
    kept = run.read("validation")
    if not kept or any(row["n"] and not row["coverage"] for row in kept):
        for name, rows in problem.fitness.items():
            run.write(name, rows)


def optimise_over_seeds(
    problem: Problem,
    methods: Sequence[Method],
    output: Output,
    *,
    searching: SearchOptions = SearchOptions(),
    objective: ObjectiveOptions = ObjectiveOptions(),
    watch: Callable[[Generation], None] | None = None,
    warm_start: bool = False,
) -> list[PersonaResult]:
    """Repeat a search over its seeds, the first of them in ``output``, and write the best mix.

    ``methods`` are one for each training seed of its directions: every one has a search of its
    own. The mix that stands highest on fresh prompts is what the persona's two files hold in the
    end. ``warm_start``: each search tries the mix first under which the person's training lines
    are likeliest (``likeliest``); of a goal, those up which its value climbs (``climbing``).
    """
    searching = searches_of(searching, len(methods), front=problem.parts is not None)
    first = output.path
    starts = [
        _warm(problem, each, searching, first.parent) if warm_start else searching
        for each in methods
    ]
    results = [
        optimise_persona(
            problem,
            methods[at % len(methods)],
            output.at(first if at == 0 else first.with_name(f"{first.name}_seed{seed}")),
            searching=replace(starts[at % len(methods)], seed=seed),
            objective=objective,
            watch=watch,
        )
        for at, seed in enumerate(range(searching.seed, searching.seed + searching.seeds))
    ]
    if problem.processes.index == 0 and searching.seeds > 1:
        best = best_of(results)
        _write_best(problem, methods[results.index(best) % len(methods)], best)
    return results


def _warm(
    problem: Problem, method: Method, searching: SearchOptions, folder: Path
) -> SearchOptions:
    """Return the options with mixes to be tried first, which no search has to find."""
    mixes = _told(problem, speaker_of(problem, method), searching, folder)
    return replace(searching, inject=(*(each.as_dict() for each in mixes), *searching.inject))


def _told(
    problem: Problem, speaker: Speaker, searching: SearchOptions, folder: Path
) -> tuple[Coefficients, ...]:
    bound = searching.bound
    if isinstance(problem, PersonaProblem):
        lines = problem.persona.answers("train")
        read = partial(kept_mix, speaker, lines, bound, folder, searching.fixed)
        return (problem.processes.from_main(read),)
    slopes = kept_slopes(
        speaker,
        problem.prompts.train,
        problem.goal,
        criterion=VALUE,
        searching=searching,
        read=[problem.record(), problem.inputs()],
        folder=folder,
    )
    return slopes.mixes(bound)


def searches_of(searching: SearchOptions, trainings: int, *, front: bool = False) -> SearchOptions:
    """Return the options with a search for every training seed.

    UserError for another number of them, and for several that are to find a ``front``.
    """
    if trainings > 1 and searching.seeds not in (1, trainings):
        raise UserError(
            f"the diffs have {trainings} training seeds, each with a search of its own, and "
            f"{searching.seeds} search seeds were asked for; leave --search-seeds out"
        )
    searching = replace(searching, seeds=max(searching.seeds, trainings))
    if front and searching.seeds > 1:
        raise UserError(
            f"a front is of one search, and {searching.seeds} were asked for (a seed each); leave "
            "--search-seeds out, and name diffs of one training"
        )
    return searching


def best_of(results: Sequence[PersonaResult]) -> PersonaResult:
    """Return the search whose best mix stands highest on fresh prompts."""
    return max(results, key=lambda each: each.standing)


def own_seed(seed: int, persona: str) -> int:
    """Return the seed of a persona's search: every persona draws candidates of its own."""
    return int.from_bytes(hashlib.sha256(f"{seed} {persona}".encode()).digest()[:4])


def objective_of(
    problem: Problem, speaker: Speaker, part: Part, options: ObjectiveOptions
) -> MixObjective:
    """Return what a search maximises, on a part of the prompts."""
    return MixObjective(
        speaker,
        getattr(problem.prompts, part),
        problem.search_judge,
        options,
        coherence=lambda asked: problem.coherence.verdicts(asked, "embedding"),
        relevance=problem.relevance,
        learnt_from=problem.learnt_from,
        parts=problem.parts,
        choice=lambda mixes: kept_choices(speaker, mixes, choices_of(part)),
    )


def check_fresh(prompts: PersonaPrompts, objective: ObjectiveOptions) -> None:
    """UserError for prompts of which a search leaves too few to measure again what it finds."""
    least = 1 if objective.min_relevance is None else 2
    if len(prompts.fresh) < least:
        raise UserError(
            f"the search leaves {len(prompts.fresh)} training prompts over, and what it finds is "
            f"measured again on at least {least}; search on fewer (--num-prompts)"
        )


def _reported(
    problem: Problem,
    method: Method,
    speaker: Speaker,
    found: SearchResult,
    searching: SearchOptions,
    objective: ObjectiveOptions,
    run: Run,
) -> PersonaResult:
    """Name the best mix on fresh prompts, and score it on held-out ones.

    Of those that keep the constraints on fresh prompts; where none does, what breaks them least.
    """
    drawn = {"seed": searching.seed, "trained": method.trained}
    finalists = _finalists(problem, speaker, found, objective, run)
    mixes = {name: each.coefficients for name, each in finalists.items()}
    best = max(finalists, key=lambda name: finalists[name].standing)
    if finalists[best].violation:
        logger.warning(
            "%s: no mix that was measured again keeps the constraints on fresh prompts; the %s is "
            "named best because it breaks them least (by %.3g)",
            *(problem.name, best, finalists[best].violation),
        )
    if problem.processes.index == 0:
        run.write(FINALISTS, [{**row, "best": best} for row in run.read(FINALISTS)])
    conditions = {UNSTEERED: None, **mixes, **problem.beside(mixes[best], searching)}
    rows = held_out_rows(problem, speaker, conditions, run, drawn=drawn, limits=objective)
    held = problem.processes.from_main(lambda: _completed(problem, run.resume_rows(BOUND_ROWS)))
    kept = held or problem.bounds
    if problem.processes.index == 0:
        _written(run, problem, list(kept), BOUND_ROWS)
    return PersonaResult(
        problem.name,
        method.name,
        best,
        finalists,
        found,
        condition_fits([*rows, *kept], objective, over=partial(over_prompts, scale=problem.scale)),
        tuple(rows),
        run.folder,
    )


def _finalists(
    problem: Problem, speaker: Speaker, found: SearchResult, objective: ObjectiveOptions, run: Run
) -> dict[str, Candidate]:
    """Return the mean and the best of the best few candidates, measured on fresh prompts.

    Of several objectives: what is in the front of the search, and still is on fresh prompts.
    """
    goal = objective_of(problem, speaker, "fresh", replace(objective, race=False))
    front = [each.coefficients for each in front_of(found.candidates)]
    if front:
        again = front_of(evaluate_once(goal, front, run, FINALISTS, problem.processes))
        return {f"front_{at}": each for at, each in enumerate(again, 1)}
    ordered = sorted(found.candidates, key=lambda each: each.standing, reverse=True)
    few = list(dict.fromkeys(each.coefficients for each in ordered))[:NUM_FINALISTS]
    mean, *others = evaluate_once(goal, [found.mean, *few], run, FINALISTS, problem.processes)
    return {MEAN: mean, INCUMBENT: max(others, key=lambda each: each.standing)}


NOT_DRAWN = {"seed": None, "trained": ""}
# A mix, one for each prompt, a system prompt, or nothing at all.
Told = Coefficients | tuple[Coefficients, ...] | str | None


def held_out_rows(
    problem: Problem,
    speaker: Speaker,
    conditions: Mapping[str, Told],
    run: Run,
    *,
    drawn: Mapping[str, Any] = NOT_DRAWN,
    limits: ObjectiveOptions = ObjectiveOptions(),
) -> list[dict[str, Any]]:
    """Answer and judge the held-out prompts under every condition, and keep the rows in the run.

    ``drawn`` are the seeds of the search that found the mixes, and of what was mixed. Divergence is
    measured of a goal, and where ``limits`` limit it.
    """
    kept = problem.processes.from_main(lambda: run.resume_rows(HELD_OUT))
    prompts = problem.prompts.held_out
    asked = [
        Row(prompt, _mix_at(told, at), told if isinstance(told, str) else None, at)
        for told in conditions.values()
        for at, prompt in enumerate(prompts)
    ]
    weights = [None if row.condition is None else row.condition.as_dict() for row in asked]
    names = [name for name in conditions for _ in prompts]
    wanted = list(zip(names, weights, strict=True))
    if kept and [(row["condition"], row["weights"]) for row in kept] == wanted:
        return problem.processes.from_main(
            lambda: _written(run, problem, _completed(problem, kept))
        )
    answers = speaker.answers(asked)
    diverged = isinstance(problem, GoalProblem) or limits.max_kl is not None
    choices = [] if limits.min_choice is None else choices_of("held_out")

    def judged() -> list[dict[str, Any]]:
        spans = [slice(at * len(prompts), (at + 1) * len(prompts)) for at in range(len(conditions))]
        by_name = zip(conditions, spans, strict=True)
        found = [row for name, span in by_name for row in problem.judged(name, answers[span])]
        rows = [
            {**row, "finished": answer.finished, "weights": mix, **drawn}
            for row, answer, mix in zip(found, answers, weights, strict=True)
        ]
        if diverged:
            for row, plan, answer in zip(rows, asked, answers, strict=True):
                told = speaker.divergences(plan.condition, [answer])[0]
                row |= {"kl": mean_of(told), "kl_tokens": len(told)}
        if choices:  # of one mix for all prompts; what is told by a prompt is not read so
            mixes = {k: mix for k, mix in conditions.items() if isinstance(mix, Coefficients)}
            known = kept_choices(speaker, [None, *mixes.values()], choices)
            kept_by = dict(zip([UNSTEERED, *mixes], known, strict=True))
            rows = [{**row, "choice": kept_by.get(row["condition"])} for row in rows]
        return _written(run, problem, rows)

    return problem.processes.from_main(judged)


def _written(
    run: Run, problem: Problem, rows: list[dict[str, Any]], file: str = HELD_OUT
) -> list[dict[str, Any]]:
    """Write rows, and say how many of them wait for a judge's budget."""
    run.write(file, rows)
    told = (cap_behind(None, row["reason"]) for row in rows if _lacking(problem, row))
    if waiting := list(filter(None, told)):
        logger.warning(
            "%d answers in %s.jsonl lack a judge's score (%s); the same command, with a higher "
            "--max-judge-cost, has them judged",
            *(len(waiting), file, waiting[0]),
        )
    return rows


def _lacking(problem: Problem, row: Mapping[str, Any]) -> int:
    """Return how many judges' scores a row lacks; an answer that says nothing lacks none."""
    told = bool(row["answer"].strip())
    return told * sum(row.get(name) is None for name in problem.scored)


def _completed(problem: Problem, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return rows, those again judged whose answers say something and lack a judge's score.

    What a judge left out at a cap or in an outage is not out for good.
    """
    found: list[dict[str, Any]] = []
    for name, own in grouped(rows, lambda row: row["condition"]).items():
        again: Sequence[dict[str, Any]] = own
        if any(
            _lacking(problem, row) for row in own
        ):  # all of a condition: an answer may repeat another
            said = (
                Exchange(row["prompt"], row["answer"], row.get("finished", True)) for row in own
            )
            again = problem.judged(name, list(said))
        for old, new in zip(own, again, strict=True):
            more = _lacking(problem, new) < _lacking(problem, old)
            same = {key: old[key] for key in ("prompt_id", "weights")}
            found.append({**old, **new, **same} if more else old)
    return found


def _mix_at(told: Told, at: int) -> Coefficients | None:
    one = told[at] if isinstance(told, tuple) else told
    return one if isinstance(one, Coefficients) else None


def baseline_answers(
    chat_model: ChatModel,
    prompts: PersonaPrompts,
    generation: GenerationOptions,
    processes: Processes = Processes(),
) -> dict[str, str]:
    """Return the unsteered answer to every prompt, for judges that compare with it."""
    parts = (prompts.train, prompts.fresh, prompts.held_out)
    rows = [Row(prompt, None, stream=at) for part in parts for at, prompt in enumerate(part)]
    answers = plain_speaker(chat_model, generation, processes).answers(rows)
    return {each.question: each.answer for each in answers}


def persona_system_prompt(persona: Persona) -> str:
    """Return the prompt baseline: the profile and the samples as instructions to the model."""
    profile = str(persona.read("persona_profile.txt")).strip()
    listed = "\n".join(f"- {sample}" for sample in persona.samples())
    return (
        "You are not an assistant but this person, and you answer as they would.\n\n"
        f"{profile}\n\nThings you have said:\n{listed}"
    )


def first_prompts(prompts: PersonaPrompts, number: int | None) -> PersonaPrompts:
    """Return the prompts with the first ``number`` of the training ones; the rest are fresh."""
    if number is not None and not 1 <= number <= len(prompts.train):
        raise UserError(f"there are {len(prompts.train)} training prompts; {number} were asked for")
    fresh = (*prompts.train[number:], *prompts.fresh) if number is not None else prompts.fresh
    return replace(prompts, train=prompts.train[:number], fresh=fresh)


def speaker_of(problem: Problem, method: Method) -> Speaker:
    """Return the problem's model, speaking under mixes of the method's directions."""
    return Speaker(
        problem.chat_model,
        method.directions,
        method.scales,
        method.alpha,
        problem.generation,
        problem.processes,
    )


def _planned(
    problem: Problem, method: Method, searching: SearchOptions, objective: ObjectiveOptions
) -> Planned:
    """Return the whole of what a search records, but for the model."""
    told = {
        **problem.record(),
        "method": method.name,
        "searcher": method.searcher,
        "alpha": method.alpha,
        "scales": dict(method.scales),
        "directions": dict(method.directions.record),
    }
    family = (*(FOUND if problem.parts is None else ()), *problem.controls)
    options = (searching, objective, problem.generation)
    planned = planned_search(problem.prompts, told, family, *options)
    read = {**problem.inputs(), **method.directions.inputs, **planned.inputs}
    return replace(planned, inputs=read, later=())


def planned_search(
    prompts: PersonaPrompts,
    told: Mapping[str, Any],
    family: tuple[str, ...],
    searching: SearchOptions,
    objective: ObjectiveOptions,
    generation: GenerationOptions,
) -> Planned:
    """Return what is known of a search before its model is loaded.

    ``told`` is what else is known of its configuration, ``family`` what is compared with the model
    as it is: ``FOUND`` of a search for one mix, and what stands beside.
    """
    config = {
        **told,
        "prompts": list(prompts.train),
        "held_out_prompts": list(prompts.held_out),
        # A longer search goes on from a shorter one.
        "search": {
            key: value
            for key, value in dataclasses.asdict(searching).items()
            if key not in ("max_iterations", "max_evaluations", "target", "seeds")
        },
        "objective": recorded_objective(objective),
        "generation": dataclasses.asdict(generation),
    }
    design = Design.of("optimize", {"held out": len(prompts.held_out)}, family, searching.seeds)
    # What is found is measured again on these, and named best by that.
    inputs = {"the fresh prompts": digest_of(list(prompts.fresh))}
    if objective.min_choice is not None:
        inputs["the multiple choice"] = file_digest(resource_path(FILE))
    return Planned("optimize", config, searching.seed, inputs, design, TOLD_LATER)


def recorded_objective(objective: ObjectiveOptions) -> dict[str, Any]:
    """Return what a run's configuration keeps of an objective: not how patient it is."""
    kept = dataclasses.asdict(objective)
    later = ("max_kl", "min_choice")  # said where they limit: older runs do not know them
    unsaid = ("pause", *(name for name in later if kept[name] is None))
    return {key: each for key, each in kept.items() if key not in unsaid}


def _write_best(problem: Problem, method: Method, result: PersonaResult) -> None:
    """Write the files that the search is known by."""
    folder = ensure_writable_folder(result.folder.parent)
    best = result.fit_of(result.best)
    tried = result.search.candidates
    best_so_far = accumulate(tried, partial(max, key=lambda each: each.standing))
    by_iteration = {each.iteration: top for each, top in zip(tried, best_so_far, strict=True)}
    speaker = speaker_of(problem, method)
    coefficients = speaker.coefficients(result.weights)
    known_by = folder / f"{problem.name}_optimization.json"
    own = result.folder.name.partition("_seed")[0]
    if known_by.is_file() and (before := _found_by(known_by)) != own:
        logger.warning(
            "%s held what %s found, and holds what %s found now; both runs stay, and either search "
            "run again writes its own anew",
            *(known_by, before, own),
        )
    write_json(folder / f"{problem.name}{WEIGHTS}.json", result.weights.as_dict())
    if method.directions.diffs:
        write_json(folder / f"{problem.name}{MIX}.json", coefficients)
    write_json(
        known_by,
        {
            problem.kind: problem.name,
            "search": own,
            "method": method.name,
            "layer": method.directions.record.get("layers"),
            "energy": method.directions.record.get("energy"),
            "weighed_by": method.directions.record.get("weighed_by"),
            "alpha": method.alpha,
            "trained": method.trained,
            "best_weights": result.weights.as_dict(),
            "best_coefficients": coefficients,
            "best": result.best,
            "best_score": best.fit.mean,
            "num_iterations": result.search.iterations,
            "num_evaluations": result.search.evaluations,
            "stopped": result.search.reason,
            "scales": dict(method.scales),
            "held_out": {each.condition: _fit_record(each) for each in result.fits},
            "finalists": {
                name: {
                    "weights": each.coefficients.as_dict(),
                    "coefficients": speaker.coefficients(each.coefficients),
                    "fresh_value": each.value,
                    "fresh_violation": each.violation,
                }
                for name, each in result.finalists.items()
            },
            "optimization_history": {
                "iterations": list(by_iteration),
                "best_scores": [each.value for each in by_iteration.values()],
                "best_weights": [each.coefficients.as_dict() for each in by_iteration.values()],
            },
        },
    )


def _found_by(known_by: Path) -> str:
    try:
        return str(read_json(known_by)["search"])
    except (UserError, LookupError, TypeError):
        return "an earlier search"


def _fit_record(fit: ConditionFit) -> dict[str, Any]:
    cells, gain = cells_of(fit, FIT_COLUMNS), fit.difference
    return {
        **{name: cells[name] for name in RECORDED},
        "difference": None if gain is None else dataclasses.asdict(gain),
        "p_holm": fit.p_holm,
    }
