"""Which mix of trait directions speaks like a given person? Search, then report on held-out parts.

The search sees the training prompts and a judge of the person's training conversations. What is
reported is the fit on held-out prompts by a judge of the test conversations: of the unsteered
model, of the distribution's mean, and of the incumbent (the luckiest of many samples).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from persona_lora.core.chat import Exchange
from persona_lora.core.errors import UserError
from persona_lora.core.files import ensure_writable_folder, write_json
from persona_lora.core.options import GenerationOptions, ObjectiveOptions
from persona_lora.core.personas import Coefficients, Persona, PersonaPrompts
from persona_lora.core.runs import Output, Run
from persona_lora.judges.coherence import CoherenceScorer
from persona_lora.judges.judging import Judge
from persona_lora.judges.persona_judges import JudgeCheck
from persona_lora.judges.style_judge import PERSONA_FIT
from persona_lora.models.loading import ChatModel
from persona_lora.models.processes import Processes, recorded
from persona_lora.report.comparisons import ConditionFit, cells_of, columns_of, fits_over_prompts
from persona_lora.steering.bank import Bank
from persona_lora.studies.asking.run import Row, open_run
from persona_lora.studies.personas.figure import render_search
from persona_lora.studies.personas.objective import (
    PersonaObjective,
    Relevance,
    Speaker,
    plain_speaker,
)
from persona_lora.studies.personas.search import (
    Candidate,
    Generation,
    SearchOptions,
    SearchResult,
    search,
)
from persona_lora.studies.report_page import write_report

UNSTEERED, MEAN, INCUMBENT, PROMPT = "none", "mean", "incumbent", "prompt"
HELD_OUT = "held_out"
RECORDED = ("fit", "low", "high", "n", "coverage", "coherence", "relevance")
FIT_COLUMNS = columns_of(
    *("condition", "fit=fit.mean", "low=fit.low", "high=fit.high", "n=fit.n"),
    *("coverage=fit.coverage", "coherence=coherence.mean", "relevance=relevance.mean"),
    *("gain=difference.mean", "gain_low=difference.low", "gain_high=difference.high"),
    *("effect_size", "p", "p_holm"),
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


@dataclass(frozen=True, eq=False)
class Method:
    """One way of searching: which directions, at which scales, by which searcher."""

    name: str
    directions: Bank
    scales: Mapping[str, float]
    alpha: float = 2.0
    searcher: str = "cmaes"


@dataclass(frozen=True)
class PersonaResult:
    """What a search found.

    ``weights`` are the distribution's mean (random search: the best sample); ``fits`` hold the
    held-out fit of "none", "mean" and "incumbent". ``rows`` are the held-out answers.
    """

    persona_id: str
    method: str
    weights: Coefficients
    search: SearchResult
    fits: tuple[ConditionFit, ...]
    rows: tuple[Mapping[str, Any], ...]
    folder: Path

    def fit_of(self, condition: str) -> ConditionFit:
        """Return the held-out fit of one condition."""
        return next(each for each in self.fits if each.condition == condition)


def optimise_persona(
    problem: PersonaProblem,
    method: Method,
    output: Output | Path,
    *,
    searching: SearchOptions = SearchOptions(),
    objective: ObjectiveOptions = ObjectiveOptions(),
    watch: Callable[[Generation], None] | None = None,
) -> PersonaResult:
    """Search, then score on held-out prompts; run again, it goes on where it stopped.

    Writes the run folder (``generations.jsonl``, ``held_out.jsonl``) and beside it
    ``{persona}_optimization.json`` and ``{persona}_best_weights.json``.
    """
    processes = problem.processes
    run = processes.from_main(
        lambda: open_run(
            output,
            "optimize",
            problem.chat_model,
            _config(problem, method, searching, objective),
            problem.inputs(),
            method.directions.inputs,
            seed=searching.seed,
        )
    )
    speaker = speaker_of(problem, method)
    goal = PersonaObjective(
        speaker,
        problem.prompts.train,
        problem.search_judge,
        objective,
        coherence=lambda asked: problem.coherence.verdicts(asked, "embedding"),
        relevance=problem.relevance,
    )
    with recorded(run, processes):
        if processes.index == 0:
            run.write("judge_checks", [dataclasses.asdict(each) for each in problem.checks])
        result = _optimise(problem, method, run, goal, searching, watch)
    if processes.index == 0:
        _write_results(problem, method, result)
    return result


def _optimise(
    problem: PersonaProblem,
    method: Method,
    run: Run,
    goal: PersonaObjective,
    searching: SearchOptions,
    watch: Callable[[Generation], None] | None,
) -> PersonaResult:
    found = search(
        goal,
        method.directions.names,
        searching,
        run,
        searcher=method.searcher,
        processes=problem.processes,
        watch=watch,
    )
    rows = held_out_rows(
        problem,
        goal.speaker,
        {UNSTEERED: None, MEAN: found.mean, INCUMBENT: found.best.coefficients},
        run,
    )
    return PersonaResult(
        problem.persona.id,
        method.name,
        found.mean,
        found,
        tuple(fits_over_prompts(rows, UNSTEERED)),
        tuple(rows),
        run.folder,
    )


Told = Coefficients | str | None  # a mix, a system prompt, or nothing at all


def held_out_rows(
    problem: PersonaProblem, speaker: Speaker, conditions: Mapping[str, Told], run: Run
) -> list[dict[str, Any]]:
    """Answer and judge the held-out prompts under every condition, and keep the rows in the run."""
    mixes = {
        name: each if isinstance(each, Coefficients) else None for name, each in conditions.items()
    }
    kept = problem.processes.from_main(lambda: run.resume_rows(HELD_OUT))
    wanted = {name: None if mix is None else mix.as_dict() for name, mix in mixes.items()}
    if kept and {row["condition"]: row["weights"] for row in kept} == wanted:
        return kept
    asked = [
        Row(prompt, mixes[name], told if isinstance(told, str) else None, at)
        for name, told in conditions.items()
        for at, prompt in enumerate(problem.prompts.held_out)
    ]
    answers = speaker.answers(asked)

    def judged() -> list[dict[str, Any]]:
        exchanges = [Exchange(row.question, text) for row, text in zip(asked, answers, strict=True)]
        fits = problem.report_judge.judge(exchanges, PERSONA_FIT)
        coherence = problem.coherence.verdicts(exchanges, "embedding")
        names = [name for name in conditions for _ in problem.prompts.held_out]
        rows = [
            {
                "persona": problem.persona.id,
                "condition": name,
                "prompt_id": row.stream,
                "prompt": row.question,
                "answer": answer,
                "score": fit.score,
                "reason": fit.reason,
                "judge": fit.judge,
                "coherence": coherent.score,
                "relevance": relevant,
                "weights": wanted[name],
            }
            for name, row, answer, fit, coherent, relevant in zip(
                names, asked, answers, fits, coherence, problem.relevance(exchanges), strict=True
            )
        ]
        run.write(HELD_OUT, rows)
        return rows

    return problem.processes.from_main(judged)


def baseline_answers(
    chat_model: ChatModel,
    prompts: PersonaPrompts,
    generation: GenerationOptions,
    processes: Processes = Processes(),
) -> dict[str, str]:
    """Return the unsteered answer to every prompt, for judges that compare with it."""
    everything = (*prompts.train, *prompts.held_out)
    speaker = plain_speaker(chat_model, generation, processes)
    places = [*range(len(prompts.train)), *range(len(prompts.held_out))]
    rows = [Row(prompt, None, stream=at) for at, prompt in zip(places, everything, strict=True)]
    return dict(zip(everything, speaker.answers(rows), strict=True))


def persona_system_prompt(persona: Persona) -> str:
    """Return the prompt baseline: the profile and the samples as instructions to the model."""
    profile = str(persona.read("persona_profile.txt")).strip()
    listed = "\n".join(f"- {sample}" for sample in persona.samples())
    return (
        "You are not an assistant but this person, and you answer as they would.\n\n"
        f"{profile}\n\nThings you have said:\n{listed}"
    )


def first_prompts(prompts: PersonaPrompts, number: int | None) -> PersonaPrompts:
    """Return the prompts with only the first ``number`` of the training ones."""
    if number is not None and not 1 <= number <= len(prompts.train):
        raise UserError(f"there are {len(prompts.train)} training prompts; {number} were asked for")
    return dataclasses.replace(prompts, train=prompts.train[:number])


def speaker_of(problem: PersonaProblem, method: Method) -> Speaker:
    """Return the problem's model, speaking under mixes of the method's directions."""
    return Speaker(
        problem.chat_model,
        method.directions,
        method.scales,
        method.alpha,
        problem.generation,
        problem.processes,
    )


def _config(
    problem: PersonaProblem,
    method: Method,
    searching: SearchOptions,
    objective: ObjectiveOptions,
) -> dict[str, Any]:
    return {
        "persona": problem.persona.id,
        **problem.chat_model.record(),
        "method": method.name,
        "searcher": method.searcher,
        "alpha": method.alpha,
        "scales": dict(method.scales),
        "directions": dict(method.directions.record),
        "prompts": list(problem.prompts.train),
        "held_out_prompts": list(problem.prompts.held_out),
        "judge": problem.search_judge.name,
        # A longer search goes on from a shorter one.
        "search": {
            key: value
            for key, value in dataclasses.asdict(searching).items()
            if key not in ("max_iterations", "max_evaluations", "target")
        },
        "objective": {
            key: each for key, each in dataclasses.asdict(objective).items() if key != "pause"
        },
        "generation": dataclasses.asdict(problem.generation),
    }


def _write_results(problem: PersonaProblem, method: Method, result: PersonaResult) -> None:
    """Write picture and report, and the two files that the search is known by."""
    render_search(Run(result.folder)).save(result.folder / "search.png")
    write_report([result.folder], result.folder / "report.html")
    folder = ensure_writable_folder(result.folder.parent)
    best = result.fit_of(MEAN)
    by_iteration = _best_so_far(result.search.candidates)
    write_json(folder / f"{problem.persona.id}_best_weights.json", result.weights.as_dict())
    write_json(
        folder / f"{problem.persona.id}_optimization.json",
        {
            "persona_id": problem.persona.id,
            "method": method.name,
            "layer": method.directions.record.get("layers"),
            "energy": method.directions.record.get("energy"),
            "alpha": method.alpha,
            "best_weights": result.weights.as_dict(),
            "best_score": best.fit.mean,
            "num_iterations": result.search.iterations,
            "num_evaluations": result.search.evaluations,
            "stopped": result.search.reason,
            "scales": dict(method.scales),
            "held_out": {each.condition: _fit_record(each) for each in result.fits},
            "incumbent": {
                "weights": result.search.best.coefficients.as_dict(),
                "training_value": result.search.best.value,
            },
            "optimization_history": {
                "iterations": list(by_iteration),
                "best_scores": [each.value for each in by_iteration.values()],
                "best_weights": [each.coefficients.as_dict() for each in by_iteration.values()],
            },
        },
    )


def _best_so_far(candidates: Sequence[Candidate]) -> dict[int, Candidate]:
    found: dict[int, Candidate] = {}
    best: Candidate | None = None
    for each in candidates:
        if each.value is not None and (best is None or each.value > (best.value or 0.0)):
            best = each
        if best is not None:
            found[each.iteration] = best
    return found


def fit_cells(fit: ConditionFit) -> dict[str, Any]:
    """Return a fit as a row of a table: its means, and what it gains over the reference."""
    return cells_of(fit, FIT_COLUMNS)


def _fit_record(fit: ConditionFit) -> dict[str, Any]:
    cells, gain = fit_cells(fit), fit.difference
    return {
        **{name: cells[name] for name in RECORDED},
        "difference": None if gain is None else dataclasses.asdict(gain),
        "p_holm": fit.p_holm,
    }
