"""Which way of giving a model a person's voice works best? One objective and one budget for all.

Searches over LoRA differences and over steering vectors, random search, equal weights, the persona
as a system prompt, and nothing at all are scored on the same held-out prompts by the same judge.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from persona_lora.core.errors import UserError, nearest_names
from persona_lora.core.files import write_csv
from persona_lora.core.personas import Coefficients
from persona_lora.core.runs import Output, Run
from persona_lora.models.processes import recorded
from persona_lora.models.structure import num_layers, read_layers
from persona_lora.report.comparisons import (
    ConditionFit,
    fits_over_personas,
    fits_over_prompts,
    strict_rows,
)
from persona_lora.steering.directions import EXTRACTORS
from persona_lora.studies.personas.baselines import RANDOM, directions_of, sources
from persona_lora.studies.personas.bench import (
    PersonaBench,
)
from persona_lora.studies.personas.figure import render_comparison
from persona_lora.studies.personas.objective import ObjectiveOptions, plain_speaker
from persona_lora.studies.personas.run import (
    MEAN,
    PROMPT,
    UNSTEERED,
    Method,
    PersonaProblem,
    held_out_rows,
    optimise_persona,
    persona_system_prompt,
    speaker_of,
)
from persona_lora.studies.personas.search import Generation, SearchOptions
from persona_lora.studies.report_page import write_report

EQUAL = "equal"
STRICT = 60.0
COLUMNS = (
    "persona",
    "condition",
    "fit",
    "low",
    "high",
    "n",
    "coverage",
    "coherence",
    "relevance",
    "gain",
    "gain_low",
    "gain_high",
    "effect_size",
    "p",
    "p_holm",
)
Watch = Callable[[str, str, Generation], None]


@dataclass(frozen=True)
class Comparison:
    """Held-out fits of every method: over all personas, and of each persona.

    Differences are from the unsteered model, in ``against_random`` from random search. The strict
    ones count an answer of a coherence under ``STRICT`` as the worst fit.
    """

    overall: tuple[ConditionFit, ...]
    strict: tuple[ConditionFit, ...]
    by_persona: Mapping[str, tuple[ConditionFit, ...]]
    against_random: tuple[ConditionFit, ...]
    strict_against_random: tuple[ConditionFit, ...]
    folder: Path


@dataclass(frozen=True)
class Acting:
    """Where vectors act (None: the default layers), and a factor on all coefficients."""

    layers: Sequence[int] | None = None
    alpha: float = 2.0


def compare_methods(
    bench: PersonaBench,
    personas: Sequence[str],
    methods: Sequence[str],
    output: Output | Path,
    *,
    acting: Acting | None = None,
    searching: SearchOptions | None = None,
    objective: ObjectiveOptions | None = None,
    watch: Watch | None = None,
) -> Comparison:
    """Run every method for every persona into a folder; run again, it goes on where it stopped.

    A method of vectors may name its layers: "svd@20", "svd@19-21" (else ``acting``); several of
    these are a sweep over layers. "random" and "equal" (a weight of 1 each, nothing is searched)
    use the LoRA differences. Each search is a run folder of its own below the method's;
    ``comparison/`` holds all held-out rows and the tables ``comparison.csv`` (by persona),
    ``overall.csv``, ``against_random.csv``, and the strict ones of both. Raises UserError for an
    unknown method.
    """
    searching, objective = searching or SearchOptions(), objective or ObjectiveOptions()
    acting = acting or Acting()
    output = Output.of(output)
    folder = output.path
    loaded = {
        name: _load(bench, name, acting, folder / "scales")
        for name in map(_checked, methods)
        if name not in (PROMPT, EQUAL)
    }
    everywhere = Acting(alpha=acting.alpha)
    lora = _load(bench, "lora", everywhere, folder / "scales") if EQUAL in methods else None
    rows: list[dict[str, Any]] = []
    for persona in personas:
        problem = bench.problem(persona)
        rows += _plain_rows(problem, output.at(folder / "plain" / persona), None)
        if PROMPT in methods:
            prompt = persona_system_prompt(problem.persona)
            rows += _plain_rows(problem, output.at(folder / PROMPT / persona), prompt)
        if lora is not None:
            rows += _equal_rows(problem, lora, output.at(folder / EQUAL / persona))
        for name, method in loaded.items():
            result = optimise_persona(
                problem,
                Method(name, method.directions, method.scales, acting.alpha, method.searcher),
                output.at(folder / name / f"{persona}_{name}"),
                searching=searching,
                objective=objective,
                watch=_watching(watch, persona, name),
            )
            rows += [{**row, "condition": name} for row in result.rows if row["condition"] == MEAN]
    return bench.processes.from_main(lambda: _written(rows, personas, folder))


def _checked(method: str) -> str:
    """Return a method's name.

    Raises UserError unless it is one, with layers only where it has any.
    """
    name, at, _ = method.partition("@")
    known = (*sources(), RANDOM, EQUAL, PROMPT)
    if name not in known:
        raise UserError(f"no method {method!r}; {nearest_names(name, known)}")
    if at and name not in EXTRACTORS:
        raise UserError(f"{method!r}: only {', '.join(EXTRACTORS)} act at chosen layers")
    return method


def _load(bench: PersonaBench, name: str, acting: Acting, scales: Path) -> Method:
    method, at, named = name.partition("@")
    directions = directions_of(name)
    depth = num_layers(bench.chat_model.model)
    return bench.method(
        directions,
        layers=read_layers(named, depth, f"{name}: layers") if at else acting.layers,
        alpha=acting.alpha,
        searcher="random" if method == RANDOM else "cmaes",
        cache=scales / f"{directions}{at}{named}.json",
    )


def _watching(
    watch: Watch | None, persona: str, method: str
) -> Callable[[Generation], None] | None:
    return None if watch is None else lambda generation: watch(persona, method, generation)


def _plain_rows(
    problem: PersonaProblem, output: Output, system_prompt: str | None
) -> list[dict[str, Any]]:
    """Return the rows of the unsteered model, or of the model under a system prompt."""
    run = _open(problem, output, {"system_prompt": system_prompt}, {})
    speaker = plain_speaker(problem.chat_model, problem.generation, problem.processes)
    with recorded(run, problem.processes):
        if system_prompt is None:
            return held_out_rows(problem, speaker, {UNSTEERED: None}, run)
        return held_out_rows(problem, speaker, {}, run, system_prompts={PROMPT: system_prompt})


def _equal_rows(problem: PersonaProblem, lora: Method, output: Output) -> list[dict[str, Any]]:
    """Return the rows of all directions at a weight of 1: what no search is needed for."""
    mix = Coefficients.of(dict.fromkeys(lora.directions.names, 1.0))
    record = {"alpha": lora.alpha, "scales": dict(lora.scales), **lora.directions.record}
    run = _open(problem, output, record, lora.directions.inputs)
    with recorded(run, problem.processes):
        return held_out_rows(problem, speaker_of(problem, lora), {EQUAL: mix}, run)


def _open(
    problem: PersonaProblem,
    output: Output,
    config: Mapping[str, Any],
    inputs: Mapping[str, str],
) -> Run:
    asked = {
        "persona": problem.persona.id,
        **problem.chat_model.record(),
        "judge": problem.report_judge.name,
        "held_out_prompts": list(problem.prompts.held_out),
        **config,
        "max_new_tokens": problem.generation.max_new_tokens,
    }
    seed = problem.generation.seed
    return problem.processes.from_main(
        lambda: Run.open(
            output,
            command="baselines",
            config=asked,
            seed=seed,
            inputs={**problem.inputs(), **inputs},
        )
    )


def _written(
    rows: Sequence[Mapping[str, Any]], personas: Sequence[str], folder: Path
) -> Comparison:
    by_persona = {
        persona: tuple(
            fits_over_prompts([row for row in rows if row["persona"] == persona], UNSTEERED)
        )
        for persona in personas
    }
    names = {row["condition"] for row in rows}
    strict = strict_rows(rows, STRICT)
    tables = {
        "overall": tuple(fits_over_personas(rows, UNSTEERED)),
        "strict": tuple(fits_over_personas(strict, UNSTEERED)),
        "against_random": tuple(fits_over_personas(rows, RANDOM)) if RANDOM in names else (),
        "strict_against_random": (
            tuple(fits_over_personas(strict, RANDOM)) if RANDOM in names else ()
        ),
    }
    out = folder / "comparison"
    run = Run.open(
        Output(out, overwrite=True),
        command="compare-methods",
        config={"personas": list(personas), "conditions": sorted(names)},
        seed=0,
    )
    with run:
        run.write("held_out", rows)
        cells = [_cells(persona, each) for persona, fits in by_persona.items() for each in fits]
        write_csv(out / "comparison.csv", COLUMNS, cells)
        render_comparison(run).save(out / "comparison.png")
        for name, fits in tables.items():
            write_csv(out / f"{name}.csv", COLUMNS, [_cells("all", each) for each in fits])
    write_report([out], out / "report.html")
    return Comparison(by_persona=by_persona, folder=out, **tables)


def _cells(persona: str, fit: ConditionFit) -> dict[str, Any]:
    gain = fit.difference
    return {
        "persona": persona,
        "condition": fit.condition,
        "fit": fit.fit.mean,
        "low": fit.fit.low,
        "high": fit.fit.high,
        "n": fit.fit.n,
        "coverage": fit.fit.coverage,
        "coherence": fit.coherence.mean,
        "relevance": fit.relevance.mean,
        "gain": None if gain is None else gain.mean,
        "gain_low": None if gain is None else gain.low,
        "gain_high": None if gain is None else gain.high,
        "effect_size": fit.effect_size,
        "p": fit.p,
        "p_holm": fit.p_holm,
    }
