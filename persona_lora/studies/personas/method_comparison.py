"""Which way of giving a model a person's voice works best? One objective and one budget for all.

Searches over LoRA differences and over steering vectors, random search, equal weights, the persona
as a system prompt, and nothing at all are scored on the same held-out prompts by the same judge,
beside floors and a ceiling that need no model (``bounds``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

from persona_lora.core.errors import UserError, nearest_names
from persona_lora.core.files import write_csv
from persona_lora.core.lora_diff import LoRADiff
from persona_lora.core.options import GenerationOptions
from persona_lora.core.personas import Coefficients, PersonaPrompts
from persona_lora.core.protocol import Design
from persona_lora.core.runs import Output, Planned, Run, of_other_command
from persona_lora.core.steering_vector import SteeringVector
from persona_lora.judges.answer_gates import THRESHOLDS
from persona_lora.models.processes import recorded
from persona_lora.models.structure import decoder_layers, read_layers
from persona_lora.report.comparisons import ConditionFit, cells_of
from persona_lora.report.trust import standing
from persona_lora.steering.bank import ENGINE
from persona_lora.steering.directions import EXTRACTORS
from persona_lora.studies.asking.run import open_run
from persona_lora.studies.personas.baselines import (
    LIKELIEST,
    RANDOM,
    SEARCHED_BY,
    UNSEARCHED,
    By,
    Wanted,
    default_layers,
    directions_of,
    load_directions,
    sources,
    trainings,
)
from persona_lora.studies.personas.bench import PersonaBench
from persona_lora.studies.personas.figure import render_comparison
from persona_lora.studies.personas.likeliest import kept_mix
from persona_lora.studies.personas.objective import ObjectiveOptions, Speaker, plain_speaker
from persona_lora.studies.personas.read_fits import (
    UNSTEERED,
    agreement_line,
    condition_fits,
    order_line,
    over_personas,
    seeds_line,
)
from persona_lora.studies.personas.run import (
    FIT_COLUMNS,
    NOT_DRAWN,
    PROMPT,
    Method,
    PersonaProblem,
    PersonaResult,
    Told,
    held_out_rows,
    optimise_over_seeds,
    persona_system_prompt,
    recorded_objective,
    searches_of,
    speaker_of,
)
from persona_lora.studies.personas.search import Generation, SearchOptions
from persona_lora.studies.report_page import write_report

ALL = "all"
COMMAND: Final = "compare-methods"
SPENT = ("evaluations", "stopped")  # of searches
COLUMNS = ("persona", *FIT_COLUMNS, *SPENT)
Watch = Callable[[str, str, Generation], None]


@dataclass(frozen=True)
class Comparison:
    """Held-out fits of every method: over all personas, and of each persona.

    ``lines`` say what they are worth. Differences are from the unsteered model, in
    ``against_random`` from random search.
    """

    overall: tuple[ConditionFit, ...]
    by_persona: Mapping[str, tuple[ConditionFit, ...]]
    against_random: tuple[ConditionFit, ...]
    lines: tuple[str, ...]
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
    acting: Acting = Acting(),
    searching: SearchOptions = SearchOptions(),
    objective: ObjectiveOptions = ObjectiveOptions(),
    watch: Watch | None = None,
) -> Comparison:
    """Run every method for every persona into a folder; run again, it goes on where it stopped.

    A method of vectors may name its layers: "svd@20", "svd@19-21" (else ``acting``); several of
    these are a sweep over layers. "random" and "tpe" (Optuna's search) use the LoRA differences,
    and so do two that search nothing: "equal" (a weight of 1 each) and "likelihood"
    (``likeliest``). Each search is repeated over its seeds and is a run folder of its own below the
    method's; ``comparison/`` holds all held-out rows and the tables ``comparison.csv`` (by
    persona), ``overall.csv`` and ``against_random.csv``, with what searches spent. Raises UserError
    for an unknown method, and for what the output's protocol does not say.
    """
    whole = Output.of(output)
    whole_of(whole)
    trained = trainings_of(methods, bench.trait_folder, bench.traits)
    searching = searches_of(searching, trained)
    asked = bench.prompts, bench.generation
    planned = planned_comparison(
        *asked, personas, methods, trained, acting.alpha, searching, objective
    )
    output = _below(whole, planned)
    folder, config = output.path, {**planned.config}
    loaded = {
        name: _load(bench, name, acting, folder / "scales")
        for name in map(checked_method, methods)
        if name not in (PROMPT, *UNSEARCHED)
    }
    mixed = [name for name in UNSEARCHED if name in methods]
    loras = _load(bench, "lora", acting, folder / "scales") if mixed else []
    rows: list[dict[str, Any]] = []
    for persona in personas:
        problem = bench.problem(persona)
        rows += _prompted(bench, problem, PROMPT in methods, output, objective)
        for name in mixed:
            rows += _mixed(problem, name, loras, searching.bound, output, objective)
        for name, found in loaded.items():
            to = output if found[0].directions.diffs else _of_vectors(output)
            results = optimise_over_seeds(
                problem,
                [replace(each, name=name) for each in found],
                to.at(folder / name / f"{persona}_{name}"),
                searching=searching,
                objective=objective,
                watch=None if watch is None else partial(watch, persona, name),
            )
            rows += [{**row, "condition": name} for each in results for row in _best_rows(each)]
        rows += problem.bounds
    config["conditions"] = sorted({row["condition"] for row in rows})
    whole = whole_of(whole)
    planned = replace(planned, config=config)
    return bench.processes.from_main(lambda: _written(rows, objective, whole, planned))


def whole_of(output: Output) -> Output:
    """Return where the rows of all methods are written, each time anew.

    UserError where a run of another command is there.
    """
    place = output.path / "comparison"
    if not output.overwrite and of_other_command(place, COMMAND):
        raise UserError(
            f"{place} holds a run of {Run(place).record['command']}; choose another output or pass "
            "--overwrite"
        )
    return replace(output, path=place, overwrite=True)


def _best_rows(result: PersonaResult) -> list[dict[str, Any]]:
    """Return the held-out rows of the best mix, each with what the search spent."""
    told = result.search.evaluations, result.search.reason
    spent = dict(zip(SPENT, told, strict=True))
    return [{**row, **spent} for row in result.rows if row["condition"] == result.best]


def planned_comparison(
    prompts: PersonaPrompts,
    generation: GenerationOptions,
    personas: Sequence[str],
    methods: Sequence[str],
    trained: int,
    alpha: float,
    searching: SearchOptions,
    objective: ObjectiveOptions,
) -> Planned:
    """Return what is known of a comparison before its model is loaded.

    ``trained`` is the number of training seeds of its directions (``trainings_of``).
    """
    config = {
        "personas": list(personas),
        "methods": list(methods),
        "objective": recorded_objective(objective),
        "search_seeds": searching.seeds,
        "max_iterations": searching.max_iterations,
        "population_size": searching.population_size,
        "prompts": len(prompts.train),
        **_spoken(generation),
        "alpha": alpha,
    }
    questions = {"held out": len(prompts.held_out), "personas": len(personas)}
    design = Design.of(COMMAND, questions, tuple(methods), trained)
    return Planned(COMMAND, config, 0, design=design)


def trainings_of(methods: Sequence[str], folder: Path, traits: Sequence[str]) -> int:
    """Return how many training seeds the directions of the methods have, in a folder."""
    names = {directions_of(checked_method(each)) for each in methods}
    found = [trainings(each, folder, traits) for each in sorted(names - {PROMPT})]
    return max(map(len, found), default=1)


def _below(whole: Output, planned: Planned) -> Output:
    """Return where the runs below a comparison are written: they carry its protocol's hash.

    So what was run without it is not pre-registered afterwards.
    """
    if whole.protocol is None:
        return whole
    held = whole.protocol.hold(planned.design, planned.config)
    return replace(whole, protocol=None, config={**whole.config, "protocol": held["sha256"]})


def _of_vectors(output: Output) -> Output:
    """Return where searches over vectors are written, whose mixes no engine answers."""
    config = {key: each for key, each in output.config.items() if key != ENGINE}
    return replace(output, config=config)


def _prompted(
    bench: PersonaBench,
    problem: PersonaProblem,
    prompted: bool,
    output: Output,
    limits: ObjectiveOptions,
) -> list[dict[str, Any]]:
    """Return the rows of the unsteered model, and of the prompt, whose divergence is not known."""
    folder, persona = output.path, problem.persona.id
    plain = plain_speaker(bench.chat_model, bench.generation, bench.processes, bench.elsewhere)
    at = output.at(folder / "plain" / persona)
    config = {"system_prompt": None}
    rows = _unsearched(problem, plain, {UNSTEERED: None}, at, config, max_kl=limits.max_kl)
    if prompted:
        prompt = persona_system_prompt(problem.persona)
        at = output.at(folder / PROMPT / persona)
        rows += _unsearched(problem, plain, {PROMPT: prompt}, at, {"system_prompt": prompt})
    return rows


def _mixed(
    problem: PersonaProblem,
    name: str,
    loras: Sequence[Method],
    bound: float | None,
    output: Output,
    limits: ObjectiveOptions,
) -> list[dict[str, Any]]:
    """Return the rows of a mix that is not searched for, one for each training seed."""
    persona, rows = problem.persona, []
    for number, lora in enumerate(loras):
        speaker, folder = speaker_of(problem, lora), output.path / name / persona.id
        mix = Coefficients.of(dict.fromkeys(lora.directions.names, 1.0))
        if name == LIKELIEST:
            lines, kept = persona.answers("train"), output.path / "scales"
            mix = problem.processes.from_main(partial(kept_mix, speaker, lines, bound, kept))
        scaled = {"alpha": lora.alpha, "scales": dict(lora.scales), **lora.directions.record}
        scaled |= {"mix": mix.as_dict()} if name == LIKELIEST else {}
        drawn = {"seed": number, "trained": lora.trained} if lora.trained else NOT_DRAWN
        at = output.at(folder / lora.trained)
        rows += _unsearched(problem, speaker, {name: mix}, at, scaled, drawn, limits.max_kl)
    return rows


def checked_method(method: str) -> str:
    """Return a method's name; UserError unless it is one, with layers only where it has any."""
    name, at, _ = method.partition("@")
    known = (*sources(), *SEARCHED_BY, *UNSEARCHED, PROMPT)
    if name not in known:
        raise UserError(f"no method {method!r}; {nearest_names(name, known)}")
    if at and name not in EXTRACTORS:
        raise UserError(f"{method!r}: only {', '.join(EXTRACTORS)} act at chosen layers")
    return method


def directions_by_name(
    methods: Sequence[str],
    traits: Sequence[str],
    folder: Path,
    depth: int,
    layers: Sequence[int] | None = None,
    by: By = "trait",
) -> dict[str, list[LoRADiff | SteeringVector]]:
    """Return the directions of methods by name, before a model of ``depth`` layers is loaded.

    ``layers`` as in ``Acting``. UserError where one of the traits has none, or no such layer.
    """
    found: dict[str, list[LoRADiff | SteeringVector]] = {}
    seen: list[tuple[str, Sequence[int] | None]] = []
    for name in [checked_method(each) for each in methods]:  # a wrong name before a missing file
        method, at, named = name.partition("@")
        if method == PROMPT:
            continue
        needed = directions_of(name)
        acting = read_layers(named, depth, f"{name}: layers") if at else layers
        if (needed, acting) in seen:
            continue
        seen.append((needed, acting))
        for trained in trainings(needed, folder, traits):
            places = acting or default_layers(depth)
            bank = load_directions(needed, Wanted(traits, folder, places, None, trained, by))
            for own, direction in zip(bank.names, bank.directions, strict=True):
                found.setdefault(own, []).append(direction)
    return found


def _load(bench: PersonaBench, name: str, acting: Acting, scales: Path) -> list[Method]:
    method, at, named = name.partition("@")
    directions = directions_of(name)
    depth = len(decoder_layers(bench.chat_model.model))
    return bench.methods(
        directions,
        layers=read_layers(named, depth, f"{name}: layers") if at else acting.layers,
        alpha=acting.alpha,
        searcher=SEARCHED_BY.get(method, "cmaes"),
        cache=scales / f"{directions}{at}{named}.json",
    )


def _spoken(generation: GenerationOptions) -> dict[str, Any]:
    """Return what runs keep of how answers are generated, beside the seed."""
    drawn = {"temperature": generation.temperature} if generation.temperature else {}
    return {"max_new_tokens": generation.max_new_tokens, **drawn}


def _unsearched(
    problem: PersonaProblem,
    speaker: Speaker,
    conditions: Mapping[str, Told],
    output: Output,
    config: Mapping[str, Any],
    drawn: Mapping[str, Any] = NOT_DRAWN,
    max_kl: float | None = None,
) -> list[dict[str, Any]]:
    """Return the held-out rows of what no search is needed for, from a run of its own.

    With the divergence of mixes where ``max_kl`` limits that of searches.
    """
    limited = {} if max_kl is None else {"max_kl": max_kl}
    asked = {
        "persona": problem.persona.id,
        "judge": problem.report_judge.name,
        "counts": THRESHOLDS,
        "held_out_prompts": list(problem.prompts.held_out),
        **config,
        **limited,
        **_spoken(problem.generation),
    }
    run = problem.processes.from_main(
        lambda: open_run(
            output,
            "baselines",
            problem.chat_model,
            asked,
            problem.inputs(),
            speaker.directions.inputs,
            seed=problem.generation.seed,
        )
    )
    with recorded(run, problem.processes):
        limits = ObjectiveOptions(max_kl=max_kl)
        return held_out_rows(problem, speaker, conditions, run, drawn=drawn, limits=limits)


def _written(
    rows: Sequence[Mapping[str, Any]],
    limits: ObjectiveOptions,
    output: Output,
    planned: Planned,
) -> Comparison:
    config, design = planned.config, planned.design
    by_persona = {
        persona: condition_fits([row for row in rows if row["persona"] == persona], limits)
        for persona in config["personas"]
    }
    over = partial(condition_fits, rows, limits, over=over_personas)
    searched_at_random = any(row["condition"] == RANDOM for row in rows)
    tables = {
        "overall": over(),
        "against_random": over(reference=RANDOM) if searched_at_random else (),
    }
    out = output.path
    run = Run.open(output, command=COMMAND, config=config, seed=0, design=design)
    with run:
        run.write("held_out", rows)
        render_comparison(run).save(out / "comparison.png")
        files = {"comparison": by_persona, **{name: {ALL: each} for name, each in tables.items()}}
        for name, by in files.items():
            cells = [
                {"persona": of, **cells_of(each, FIT_COLUMNS), **_spent(rows, of, each.condition)}
                for of, fits in by.items()
                for each in fits
            ]
            write_csv(out / f"{name}.csv", COLUMNS, cells)
    write_report([out], out / "report.html")
    worth = order_line(tables["overall"]), seeds_line(rows), agreement_line(rows)
    lines = (standing(run), *worth)
    return Comparison(by_persona=by_persona, lines=lines, folder=out, **tables)


def _spent(rows: Sequence[Mapping[str, Any]], persona: str, condition: str) -> dict[str, Any]:
    """Return how many evaluations the searches behind a cell had, and why each kind stopped."""
    searches = {
        (row["persona"], row["seed"]): [row[name] for name in SPENT]
        for row in rows
        if row["condition"] == condition and persona in (row["persona"], ALL) and "stopped" in row
    }
    if not searches:
        return {}
    evaluations, reasons = zip(*searches.values(), strict=True)
    return dict(zip(SPENT, (sum(evaluations), "; ".join(sorted(set(reasons)))), strict=True))
