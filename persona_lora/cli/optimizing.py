"""Commands that search for a persona: one search, and the comparison of all methods."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.live import Live
from rich.table import Table

from persona_lora.cli.console import console
from persona_lora.cli.option_groups import with_groups
from persona_lora.cli.parsing import generation_options, judge_options, load_model
from persona_lora.cli.program import app
from persona_lora.cli.refusals import refuse_useless
from persona_lora.cli.shared_options import (
    BatchOption,
    ConfigOption,
    JudgeCostOption,
    JudgeModelOption,
    JudgeModeOption,
    JudgeOption,
    JudgeUrlOption,
    ModelOptions,
    OtherBaseOption,
    OverwriteOption,
    SeedOption,
    TemperatureOption,
    TokensOption,
)
from persona_lora.core.errors import UserError
from persona_lora.core.runs import Output
from persona_lora.core.settings import split_lists

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from persona_lora.models.processes import Processes
    from persona_lora.report.comparisons import ConditionFit
    from persona_lora.studies.personas.bench import PersonaBench
    from persona_lora.studies.personas.search import Generation

PersonaDirOption = Annotated[Path | None, typer.Option(help="Where persona folders are.")]
VectorDirOption = Annotated[
    Path, typer.Option(help="Where directions are: {trait}/diff, and vectors/{trait}/.")
]
TraitsOption = Annotated[
    str | None, typer.Option(help='Traits to mix, as in "formality intimacy"; the five of style.')
]
LayerOption = Annotated[
    str | None, typer.Option(help='Layers of vectors, as in "20"; three at two thirds deep.')
]
AlphaOption = Annotated[float, typer.Option(help="A factor on all coefficients.")]
IterationsOption = Annotated[int, typer.Option(help="Generations.")]
PopulationOption = Annotated[
    int | None, typer.Option(help="Candidates a generation; 4 + 3·ln K by default.")
]
SigmaOption = Annotated[float, typer.Option(help="The first standard deviation.")]
PromptsOption = Annotated[int, typer.Option(help="Training prompts to search on.")]
SaveOption = Annotated[Path, typer.Option(help="Where results are written.")]
BoundOption = Annotated[float, typer.Option(help="The largest weight; 0 for no bound.")]
PenaltyOption = Annotated[float, typer.Option(help="λ of the penalty λ·‖x‖².")]
CoherentOption = Annotated[
    float, typer.Option(help="Mean coherence (0–100) below which the value is cut; 0: not at all.")
]
RelevantOption = Annotated[
    float,
    typer.Option(
        help="Mean relevance (0–100, 50 by chance) below which the value is cut; 0: not at all."
    ),
]
EnergyOption = Annotated[
    float | None,
    typer.Option(help="Cut the rank of LoRA differences to this share of ‖·‖², as 0.99: faster."),
]
RaceOption = Annotated[
    bool, typer.Option("--race", help="Half of the prompts first; all for the better half.")
]


@app.command("optimize")
@with_groups
def optimize(
    context: typer.Context,
    *,
    persona_id: Annotated[str, typer.Option(help="A persona's id: a folder in personas/.")],
    method: Annotated[str, typer.Option(help="lora, svd, mean_diff or pca.")] = "lora",
    search: Annotated[str, typer.Option(help="cmaes, or random for the control.")] = "cmaes",
    layer: LayerOption = None,
    alpha: AlphaOption = 2.0,
    max_iterations: IterationsOption = 30,
    max_evaluations: Annotated[
        int | None, typer.Option(help="Stop before this many candidates are passed.")
    ] = None,
    population_size: PopulationOption = None,
    sigma0: SigmaOption = 1.0,
    num_prompts: PromptsOption = 15,
    initial: Annotated[
        list[str] | None, typer.Option(help='A first weight: "formality=-1"; may be repeated.')
    ] = None,
    fixed: Annotated[
        list[str] | None, typer.Option(help='A weight held fast: "intimacy=0"; may be repeated.')
    ] = None,
    inject: Annotated[
        list[Path] | None, typer.Option(help="A best_weights.json to try first; may be repeated.")
    ] = None,
    target: Annotated[float | None, typer.Option(help="Stop at this training value.")] = None,
    bound: BoundOption = 4.0,
    penalty: PenaltyOption = 0.0,
    min_coherence: CoherentOption = 80.0,
    min_relevance: RelevantOption = 85.0,
    race: RaceOption = False,
    save_dir: SaveOption = Path("optimization_results"),
    model: ModelOptions,
    trait_vector_dir: VectorDirOption = Path("checkpoints"),
    traits: TraitsOption = None,
    persona_dir: PersonaDirOption = None,
    max_new_tokens: TokensOption = 40,
    temperature: TemperatureOption = 0.0,
    batch_size: BatchOption = "auto",
    judge: JudgeOption = "embedding",
    judge_model: JudgeModelOption = None,
    judge_url: JudgeUrlOption = None,
    judge_mode: JudgeModeOption = "logprobs",
    max_judge_cost: JudgeCostOption = None,
    seed: SeedOption = 0,
    allow_other_base: OtherBaseOption = False,
    overwrite: OverwriteOption = False,
    energy: EnergyOption = None,
    config: ConfigOption = None,
) -> None:
    """Find the mix of trait directions that makes the model speak like a person.

    A generation is one batch: every candidate answers every prompt with coefficients of its own.
    What is reported is the fit on prompts and conversations that the search did not see. Run
    again, it goes on where it stopped; under accelerate launch the rows are shared out.

    Example: persona-lora optimize --persona-id episode-000101_A --method lora
    --max-iterations 10 --num-prompts 10
    """
    from persona_lora.core.personas import Coefficients, load_persona
    from persona_lora.models.processes import current_processes
    from persona_lora.studies.personas.run import optimise_persona
    from persona_lora.studies.personas.search import SEARCHERS, SearchOptions

    if search not in SEARCHERS:
        raise UserError(f"--search must be one of {', '.join(SEARCHERS)}, got {search!r}")
    if method == "lora":
        refuse_useless(context, "layer", "with --method lora, which acts in all layers of its diff")
    else:
        refuse_useless(context, "energy", f"with --method {method}, whose vectors have no rank")
    if search == "random":
        refuse_useless(context, "inject", "with --search random, which draws every candidate")
    _refuse_race_of_one(context, num_prompts)

    processes = current_processes(os.environ)
    judging = judge_options(judge, judge_model, judge_url, judge_mode, max_judge_cost, seed)
    generation = generation_options(max_new_tokens, temperature, 1, seed, batch_size)
    searching = SearchOptions(
        max_iterations=max_iterations,
        population_size=population_size,
        sigma0=sigma0,
        bound=bound or None,
        initial=_weights(initial, "--initial"),
        fixed=_weights(fixed, "--fixed"),
        inject=tuple(Coefficients.read(path).as_dict() for path in inject or []),
        target=target,
        max_evaluations=max_evaluations,
        seed=seed,
    )
    bench = _persona_bench(
        load_model(model, allow_other_base=allow_other_base),
        (num_prompts, persona_dir, trait_vector_dir, traits),
        generation,
        judging,
        processes,
        energy,
    )
    with _quiet_unless_first(processes):
        with console.status("judges and directions"):
            load_persona(persona_id, persona_dir)  # a wrong id fails before anything is measured
            chosen = bench.method(
                method,
                layers=_layers(layer, bench),
                alpha=alpha,
                searcher=search,
                cache=save_dir / "scales" / f"{method}.json",
            )
            problem = bench.problem(persona_id)
        suffix = "" if search == "cmaes" else f"_{search}"
        with _live(f"{persona_id}, {method}", bench) as watch:
            result = optimise_persona(
                problem,
                chosen,
                Output(save_dir / f"{persona_id}_{method}{suffix}", overwrite),
                searching=searching,
                objective=_objective(penalty, min_coherence, min_relevance, race, seed),
                watch=watch,
            )
        _show_search(result, save_dir)
        for check in problem.checks:
            console.print(
                f"judge fitted on {check.fitted_on} conversations: AUC {check.auc:.2f} on "
                f"{check.n_own} unseen utterances of the person against {check.n_others} of others"
            )


@app.command("compare-methods")
@with_groups
def compare_methods(
    context: typer.Context,
    *,
    persona_id: Annotated[
        list[str] | None, typer.Option(help='Personas, as in "a b"; all by default.')
    ] = None,
    methods: Annotated[
        str, typer.Option(help="lora, svd, mean_diff, pca (or svd@20), random, equal, prompt.")
    ] = "lora random equal prompt svd mean_diff",
    layer: LayerOption = None,
    alpha: AlphaOption = 2.0,
    max_iterations: IterationsOption = 10,
    population_size: PopulationOption = None,
    sigma0: SigmaOption = 1.0,
    num_prompts: PromptsOption = 10,
    bound: BoundOption = 4.0,
    penalty: PenaltyOption = 0.0,
    min_coherence: CoherentOption = 80.0,
    min_relevance: RelevantOption = 85.0,
    race: RaceOption = False,
    save_dir: SaveOption = Path("results/personas"),
    model: ModelOptions,
    trait_vector_dir: VectorDirOption = Path("checkpoints"),
    traits: TraitsOption = None,
    persona_dir: PersonaDirOption = None,
    max_new_tokens: TokensOption = 40,
    temperature: TemperatureOption = 0.0,
    batch_size: BatchOption = "auto",
    judge: JudgeOption = "embedding",
    judge_model: JudgeModelOption = None,
    judge_url: JudgeUrlOption = None,
    judge_mode: JudgeModeOption = "logprobs",
    max_judge_cost: JudgeCostOption = None,
    seed: SeedOption = 0,
    allow_other_base: OtherBaseOption = False,
    overwrite: OverwriteOption = False,
    energy: EnergyOption = None,
    config: ConfigOption = None,
) -> None:
    """Compare ways of giving the model a person's voice, at equal budget, on held-out prompts.

    The unsteered model is always among them. Intervals are over personas; run again, it goes on
    where it stopped.

    Example: persona-lora compare-methods --persona-id "episode-000101_A episode-000117_B"
    --methods "lora random prompt" --max-iterations 8
    """
    from persona_lora.core.personas import list_personas
    from persona_lora.models.processes import current_processes
    from persona_lora.studies.personas.method_comparison import STRICT
    from persona_lora.studies.personas.method_comparison import compare_methods as compare
    from persona_lora.studies.personas.search import SearchOptions

    names = methods.replace(",", " ").split()
    _refuse_of_other_methods(context, names)
    _refuse_race_of_one(context, num_prompts)
    processes = current_processes(os.environ)
    judging = judge_options(judge, judge_model, judge_url, judge_mode, max_judge_cost, seed)
    generation = generation_options(max_new_tokens, temperature, 1, seed, batch_size)
    bench = _persona_bench(
        load_model(model, allow_other_base=allow_other_base),
        (num_prompts, persona_dir, trait_vector_dir, traits),
        generation,
        judging,
        processes,
        energy,
    )
    personas = split_lists(persona_id) if persona_id else list_personas(persona_dir)
    with _quiet_unless_first(processes), _live("comparison", bench) as watch:
        comparison = compare(
            bench,
            personas,
            names,
            Output(save_dir, overwrite),
            layers=_layers(layer, bench),
            alpha=alpha,
            searching=SearchOptions(
                max_iterations=max_iterations,
                population_size=population_size,
                sigma0=sigma0,
                bound=bound or None,
                seed=seed,
            ),
            objective=_objective(penalty, min_coherence, min_relevance, race, seed),
            watch=lambda persona, name, generation: watch(generation, f"{persona}, {name}"),
        )
        console.print(_fits_table(comparison.overall, f"over {len(personas)} personas"))
        title = f"an answer of a coherence under {STRICT:g} counts as fit 1"
        console.print(_fits_table(comparison.strict, title))
        if comparison.against_random:
            table = _fits_table(comparison.against_random, "against random search")
            console.print(table)
        console.print(f"report: {comparison.folder / 'report.html'}")


def _refuse_of_other_methods(context: typer.Context, methods: Sequence[str]) -> None:
    """Raise UserError for an option that none of the compared methods uses."""
    from persona_lora.steering.directions import EXTRACTORS

    among = f"with --methods {' '.join(methods)!r}"
    if not set(EXTRACTORS) & set(methods):
        refuse_useless(context, "layer", f"{among}: no vectors without layers of their own")
    if not {"lora", "random", "equal"} & set(methods):
        refuse_useless(context, "energy", f"{among}: no LoRA differences")
    if not set(methods) - {"prompt"}:
        refuse_useless(context, "alpha allow_other_base", f"{among}: no directions")
    if not set(methods) - {"prompt", "equal"}:
        searching = "max_iterations population_size sigma0 bound penalty race"
        refuse_useless(context, f"{searching} min_coherence min_relevance", f"{among}: no search")


def _refuse_race_of_one(context: typer.Context, num_prompts: int) -> None:
    if num_prompts < 2:
        refuse_useless(context, "race", "with one prompt, which has no half")


def _persona_bench(
    chat_model: Any,
    folders: tuple[int, Path | None, Path, str | None],
    generation: Any,
    judging: Any,
    processes: Processes,
    energy: float | None,
) -> PersonaBench:
    from persona_lora.core.personas import load_persona_prompts
    from persona_lora.studies.personas.bench import STYLE_TRAITS, PersonaBench
    from persona_lora.studies.personas.run import first_prompts

    num_prompts, persona_dir, trait_vector_dir, traits = folders
    own = None if persona_dir is None else persona_dir / "prompts.json"
    path = own if own is not None and own.is_file() else None
    return PersonaBench(
        chat_model,
        first_prompts(load_persona_prompts(path), num_prompts),
        generation,
        judging,
        STYLE_TRAITS if traits is None else tuple(traits.replace(",", " ").split()),
        trait_vector_dir,
        persona_dir,
        processes=processes,
        energy=energy,
    )


def _layers(text: str | None, bench: PersonaBench) -> tuple[int, ...] | None:
    from persona_lora.models.structure import num_layers, read_layers

    depth = num_layers(bench.chat_model.model)
    return None if text is None else read_layers(text, depth, "--layer")


def _objective(
    penalty: float, min_coherence: float, min_relevance: float, race: bool, seed: int
) -> Any:
    from persona_lora.studies.personas.objective import ObjectiveOptions

    return ObjectiveOptions(
        penalty=penalty,
        min_coherence=min_coherence or None,
        min_relevance=min_relevance or None,
        race=race,
        seed=seed,
    )


def _weights(pairs: list[str] | None, option: str) -> dict[str, float]:
    weights = {}
    for pair in pairs or []:
        trait, found, value = pair.partition("=")
        try:
            weights[trait.strip()] = float(value)
        except ValueError as error:
            raise UserError(f'{option} must be like "formality=-1", got {pair!r}') from error
        if not found:
            raise UserError(f'{option} must be like "formality=-1", got {pair!r}')
    return weights


@contextmanager
def _quiet_unless_first(processes: Processes) -> Iterator[None]:
    """Only the first of several processes talks."""
    console.quiet = processes.index > 0
    try:
        yield
    finally:
        console.quiet = False


@contextmanager
def _live(title: str, bench: PersonaBench) -> Iterator[Callable[..., None]]:
    """Yield a callback that shows the state of a search after every generation."""
    with Live(console=console, refresh_per_second=2, transient=True) as live:

        def watch(generation: Generation, name: str = title) -> None:
            live.update(_state(generation, name, bench.dollars()))

        yield watch


def _state(generation: Generation, name: str, dollars: float | None) -> str:
    left = generation.max_iterations - generation.iteration
    rate = generation.size / generation.seconds if generation.seconds else None
    parts = [
        f"{name}: generation {generation.iteration}/{generation.max_iterations}",
        f"best {generation.best:.2f}" if generation.best is not None else "no candidate scored",
        f"mean {generation.mean:.2f}" if generation.mean is not None else "",
        f"σ {generation.sigma:.2f}",
        f"{generation.evaluations} evaluations",
        f"{rate:.2f}/s" if rate else "from disk",
        "" if dollars is None else f"{dollars:.2f} $",
        f"about {left * generation.seconds:.0f} s left" if rate else "",
    ]
    return "  ·  ".join(part for part in parts if part)


def _show_search(result: Any, save_dir: Path) -> None:
    console.print(_fits_table(result.fits, "held-out prompts and conversations"))
    weights = ", ".join(
        f"{trait} {value:+.2f}" for trait, value in result.weights.as_dict().items()
    )
    console.print(f"weights (the distribution's mean): {weights}")
    found = result.search
    console.print(
        f"{found.evaluations} evaluations in {found.iterations} generations; stopped by "
        f"{found.reason}; best training value {found.best.value:.2f}"
    )
    console.print(f"weights: {save_dir / result.persona_id}_best_weights.json")
    console.print(f"report:  {result.folder / 'report.html'}")


def _fits_table(fits: Sequence[ConditionFit], title: str) -> Table:
    from persona_lora.report import wording

    table = Table(
        box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), title=title, title_justify="left"
    )
    for heading in (
        *("condition", "fit (1–5)", "n", "scored", "gain", "p (Holm)"),
        *("coherence", "relevance"),
    ):
        table.add_column(heading, no_wrap=True)
    for each in fits:
        table.add_row(
            each.condition,
            wording.interval(each.fit, 2),
            str(each.fit.n_questions),
            f"{100 * each.fit.coverage:.0f}%",
            "" if each.difference is None else wording.interval(each.difference, 2),
            "" if each.p_holm is None else wording.p_value(each.p_holm),
            wording.number(each.coherence.mean),
            wording.number(each.relevance.mean),
        )
    return table
