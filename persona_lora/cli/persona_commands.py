"""Commands about personas: build one, search its mix, compare methods, have people rate answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.live import Live

from persona_lora.cli import shared_options as shared
from persona_lora.cli.console import console, show
from persona_lora.cli.option_groups import refuse_useless
from persona_lora.cli.program import command, environment
from persona_lora.core.chat import user_question
from persona_lora.core.errors import UserError, checked_name
from persona_lora.core.files import read_text
from persona_lora.core.options import (
    JUDGES,
    PERSONA_JUDGES,
    SENSIBLE,
    GenerationOptions,
    JudgeChoice,
    ObjectiveOptions,
    Overwrite,
    Replace,
    SearchOptions,
    Seed,
    judge_names,
    said_of,
)
from persona_lora.core.personas import (
    MIX,
    WEIGHTS,
    Coefficients,
    Persona,
    PersonaPrompts,
    load_persona_prompts,
)
from persona_lora.core.resources import resource_path
from persona_lora.core.runs import Output, Planned, Run
from persona_lora.core.traits import load_trait

if TYPE_CHECKING:
    from persona_lora.core.lora_diff import By, LoRADiff
    from persona_lora.core.steering_vector import SteeringVector
    from persona_lora.judges.choice import JudgeOptions
    from persona_lora.models.processes import Processes
    from persona_lora.studies.personas.bench import PersonaBench
    from persona_lora.studies.personas.goals import Scorer
    from persona_lora.studies.personas.run import Method, Problem
    from persona_lora.studies.personas.search import Generation

SPLITS: tuple[Literal["train", "test"], ...] = ("train", "test")
Spoken = Annotated[GenerationOptions, ("max_new_tokens", "temperature", "seed", "batch_size")]
SHORT = GenerationOptions(max_new_tokens=40)
AUTO = "auto"


@dataclass(frozen=True)
class PersonaJudgeChoice(JudgeChoice):
    """Who judges a person's voice."""

    judge: Annotated[str, f"Who judges: {said_of(PERSONA_JUDGES)}, or several: a,b."] = "embedding"


@dataclass(frozen=True)
class SoughtJudgeChoice(JudgeChoice):
    """Who judges a person's voice, or the traits of targets."""

    judge: Annotated[
        str,
        f"Who judges, of a person: {', '.join(PERSONA_JUDGES)}; of --targets: {', '.join(JUDGES)}; "
        "auto is embedding, or reader.",
    ] = AUTO


@dataclass(frozen=True)
class BenchOptions:
    """What a persona is spoken with: prompts, traits, and the directions of these."""

    num_prompts: Annotated[int, "Training prompts to search on."] = 15
    traits: Annotated[
        tuple[str, ...] | None, "Traits to mix: formality,intimacy; the five of style by default."
    ] = None
    trait_vector_dir: shared.DirectionsDir = Path("checkpoints")
    persona_dir: shared.PersonaDir = None
    layers: Annotated[
        str | None,
        'Layers of vectors, as in "20"; three at two thirds of the depth by default.',
        *("--layers", "--layer"),
    ] = None
    alpha: Annotated[float, "A factor on all coefficients."] = 2.0
    energy: Annotated[
        float | None,
        "Cut the rank of LoRA differences to what keeps this share of their squared effect on "
        "ordinary prompts, as 0.99: faster.",
    ] = None
    plain: Annotated[bool, "Cut it by the Frobenius norm, whatever the model's inputs."] = False
    report_judge: Annotated[
        Literal["letters", "embedding", "likelihood", "openai", "local"] | None,
        "Who judges what is reported: letters by default, embedding where the search has another.",
    ] = None
    allow_other_base: shared.OtherBase = False

    def __post_init__(self) -> None:
        if self.alpha == 0:
            raise UserError("--alpha 0 makes every mix the unsteered model; use another factor")

    @property
    def mixed(self) -> tuple[str, ...]:
        """The traits that are mixed."""
        from persona_lora.studies.personas.bench import STYLE_TRAITS

        return STYLE_TRAITS if self.traits is None else self.traits

    def asked(self, prompts: PersonaPrompts | None = None) -> PersonaPrompts:
        """Return what is said: of the prompts of --persona-dir, unless others are given."""
        from persona_lora.studies.personas.run import first_prompts

        refuse_useless("race", "with one prompt, which has no half", unless=self.num_prompts > 1)
        refuse_useless("plain", "without --energy", unless=self.energy is not None)
        own = None if self.persona_dir is None else self.persona_dir / "prompts.json"
        path = own if own is not None and own.is_file() else None
        return first_prompts(prompts or load_persona_prompts(path), self.num_prompts)

    def open(
        self,
        model: shared.ModelOptions,
        generation: GenerationOptions,
        judge: JudgeOptions,
        asked: PersonaPrompts,
        *,
        datasets: Path | None = None,
        runs: Iterable[tuple[Output, Planned]] = (),
    ) -> PersonaBench:
        """Load the model, and return what all personas and methods share.

        ``datasets`` is where trait folders are; ``runs`` are as ``ModelOptions.load`` takes them.
        """
        import os

        from persona_lora.models.processes import current_processes
        from persona_lora.studies.personas.bench import PersonaBench

        processes = current_processes(os.environ)
        said = [user_question(each) for each in (*asked.train, *asked.held_out)]
        chat_model = model.load(asked=said, runs=runs)
        return PersonaBench(
            chat_model,
            asked,
            generation,
            judge,
            self.mixed,
            self.trait_vector_dir,
            self.persona_dir,
            datasets,
            processes=processes,
            energy=self.energy,
            report_judge=self.report_judge,
            plain=self.plain,
        )

    def acting(
        self,
        model: shared.ModelOptions,
        methods: Sequence[str],
        by: By = "trait",
        engine: shared.EngineOptions = shared.EngineOptions(),
    ) -> tuple[tuple[int, ...] | None, dict[str, list[LoRADiff | SteeringVector]]]:
        """Return the layers of vectors, None for those that the bench chooses, and the directions.

        These by the names that mixes have. UserError for a direction that one of the methods needs
        and there is not, that is of another model, or that an engine has not.
        """
        from persona_lora.steering.placement import check_before_loading
        from persona_lora.studies.personas.method_comparison import directions_by_name

        depth = shared.depth_of(model)
        chosen = None if self.layers is None else shared.layer_numbers(self.layers, depth)
        found = directions_by_name(methods, self.mixed, self.trait_vector_dir, depth, chosen, by)
        made = [each for directions in found.values() for each in directions]
        options, anyway = model.alone(), self.allow_other_base
        check_before_loading(model.model, options, made, allow_other_base=anyway)
        engine.reach(made)
        return chosen, found

    def trainings(self, methods: Sequence[str]) -> int:
        """Return how many training seeds the directions of the methods have."""
        from persona_lora.studies.personas.method_comparison import trainings_of

        return trainings_of(methods, self.trait_vector_dir, self.mixed)


def check_persona(name: str, folder: Path | None, judges: Iterable[str | None]) -> None:
    """UserError for a persona that there is not, or that a language model could not judge."""
    from persona_lora.core.personas import load_persona
    from persona_lora.judges.persona_judges import FITTED, LIKELIHOOD, judge_prompt_of

    persona = load_persona(name, folder)
    if any(each not in (None, LIKELIHOOD, *FITTED) for each in judges):
        judge_prompt_of(persona)


@dataclass(frozen=True)
class Searched:
    """What is searched for, by which directions, and from where.

    A person's voice, scores of traits, or any function's highest value.
    """

    persona_id: Annotated[str | None, "A persona's id: a folder in personas/."] = None
    targets: Annotated[
        Mapping[str, float], "Scores of traits to be had (0–100): sycophancy=0,formality=70."
    ] = field(default_factory=dict)
    pareto: Annotated[
        bool, "Find the mixes that no other is nearer than to all targets, in place of one mix."
    ] = False
    scorer: Annotated[
        str | None,
        'A function of your own, as "my.py:score": score(questions, answers) returns a number for '
        "each answer, higher is better.",
    ] = None
    prompts: Annotated[
        Path | None,
        "A JSON file of train and held_out prompts, for --targets (the traits' own questions by "
        "default) or --scorer (those of personas by default).",
    ] = None
    constraint: Annotated[
        tuple[Annotated[str, "may hold spaces"], ...],
        "What comes before the value: coherence>=80, relevance>=85, kl<=0.1nat (a token, on the "
        "mix's own answers), choice>=95 (percent of multiple choice kept).",
    ] = ()
    datasets_dir: shared.DatasetsDir = None
    method: Annotated[str, "lora, svd, mean_diff or pca."] = "lora"
    search: Annotated[
        Literal["cmaes", "tpe", "random"] | None,
        "How mixes are found: cmaes, tpe (Optuna; what --pareto takes), or random, the control.",
    ] = None
    inject: Annotated[tuple[Path, ...], "Mixes to try first: best_weights.json files."] = ()
    warm_start: Annotated[
        bool,
        "Try first where the person's lines grow likelier, or of another goal where the values of "
        "eight drawn answers to each prompt climb.",
    ] = False
    by: Annotated[
        Literal["trait", "layers", "modules"],
        "A coefficient for each trait, or for each third of its layers or kind of block.",
    ] = "trait"
    engine: shared.Engines = ()
    engine_tolerance: shared.EngineTolerance = None

    def check(self, searching: SearchOptions, num_prompts: int) -> None:
        """UserError unless one thing is sought, for idle options, and for too small a budget."""
        self._check_sought()
        self._check_search()
        self._check_budget(searching, num_prompts)

    def _check_sought(self) -> None:
        if self.pareto:
            if len(self.targets) < 2:
                raise UserError("--pareto needs two --targets at least: sycophancy=0,formality=70")
            refuse_useless("race", "with --pareto: a race needs one order of its candidates")
            refuse_useless("search_seeds protocol", "with --pareto, of one search and open end")
        given = [self.persona_id is not None, bool(self.targets), self.scorer is not None]
        if sum(given) != 1:
            raise UserError("give one of --persona-id, --targets and --scorer")
        if self.persona_id is not None:
            refuse_useless(
                "prompts", "with --persona-id: they are in prompts.json of --persona-dir"
            )
            return
        refuse_useless("persona_dir report_judge", "without --persona-id")
        if self.scorer is not None:
            judges = "judge judge_model judge_url judge_mode max_judge_cost"
            refuse_useless(judges, "with --scorer, which judges")

    def judging(self, choice: JudgeChoice, bench: BenchOptions) -> JudgeOptions:
        """Return who judges, which may be left to what is sought; UserError for who cannot."""
        from persona_lora.judges import choice as judges

        usual = "reader" if self.targets else "embedding"
        chosen = usual if choice.judge == AUTO else choice.judge
        names = judge_names(chosen, judges.JUDGES if self.targets else PERSONA_JUDGES)
        traits = [load_trait(each, self.datasets_dir) for each in self.targets]
        choice = dataclasses.replace(choice, judge=chosen)
        judge = shared.judging_of(choice, traits, bench.report_judge)
        if self.persona_id is not None:
            check_persona(self.persona_id, bench.persona_dir, [*names, bench.report_judge])
        return judge

    def limited(self, objective: ObjectiveOptions) -> ObjectiveOptions:
        """Return the objective with the constraints; UserError for one that is given elsewhere."""
        for text in self.constraint:
            name = text.partition(">")[0].strip()
            if name == "choice" and self.method != "lora":
                raise UserError(
                    f"--constraint {text} is read with LoRA differences alone, got --method "
                    f"{self.method}; leave it out"
                )
            if name in ("coherence", "relevance"):
                refuse_useless(f"min_{name}", f"beside --constraint {text}")
        found = objective.constrained(self.constraint)
        # A function that scores nothing is wrong, not out of reach for a while.
        return found if self.scorer is None else dataclasses.replace(found, pause=0.0)

    def read(self) -> tuple[dict[str, float], Scorer | None, PersonaPrompts | None]:
        """Return targets, scorer and prompts as they are read; UserError for a mistake in them."""
        from persona_lora.studies.personas.goals import Scorer, checked_targets, prompts_of

        wanted = checked_targets(self.targets)
        traits = [load_trait(trait, self.datasets_dir) for trait in wanted]
        for given, trait in zip(wanted, traits, strict=True):
            if trait.name != given:
                raise UserError(
                    f"--targets takes names of traits, got {given!r}; give {trait.name}, and the "
                    "folder that it lies in with --datasets-dir"
                )
        scorer = None if self.scorer is None else Scorer.load(self.scorer)
        if self.prompts is not None:
            return wanted, scorer, load_persona_prompts(self.prompts)
        return wanted, scorer, prompts_of(traits) if traits else None

    def _check_search(self) -> None:
        from persona_lora.studies.personas.baselines import check_method

        check_method(self.method)
        shared.EngineOptions(self.engine, self.engine_tolerance).check(
            diffs_alone=self.method == "lora"
        )
        if self.method != "lora":
            refuse_useless("by", f"with --method {self.method}, whose vectors are not cut")
        if self.engine and self.by != "trait":
            raise UserError("an engine holds whole diffs; leave --engine or --by out")
        if self.method == "lora":
            refuse_useless("layers", "with --method lora, which acts in all layers of its diff")
        else:
            refuse_useless("energy", f"with --method {self.method}, whose vectors have no rank")
        if self.pareto and self.search == "cmaes":
            raise UserError("--search cmaes has one objective; with --pareto give tpe or random")
        if self.method != "lora" or self.by != "trait":
            refuse_useless("warm_start", "without whole LoRA differences to read lines along")

    def injected(self, searching: SearchOptions) -> SearchOptions:
        """Return search options with the mixes that are given by --inject."""
        mixes = tuple(Coefficients.read(path).as_dict() for path in self.inject)
        return dataclasses.replace(searching, inject=mixes)

    def _check_budget(self, searching: SearchOptions, num_prompts: int) -> None:
        """UserError for a library that is missing, and for prompts that leave out a target."""
        from persona_lora.studies.personas.search import optuna_for

        if self.searcher == "tpe":
            optuna_for(searching)
        if self.prompts is None and num_prompts < len(self.targets):
            raise UserError(
                f"{num_prompts} training prompts hold no question of each of the traits; give "
                f"--num-prompts {len(self.targets)} at least"
            )

    @property
    def searcher(self) -> str:
        """What asks for mixes."""
        return self.search or ("tpe" if self.pareto else "cmaes")

    def planned(
        self,
        asked: PersonaPrompts,
        alpha: float,
        searching: SearchOptions,
        objective: ObjectiveOptions,
        generation: GenerationOptions,
    ) -> Planned:
        """Return what is known of the search; UserError for too few prompts."""
        from persona_lora.studies.personas import run
        from persona_lora.studies.personas.goals import GoalProblem

        run.check_fresh(asked, objective)
        told = {"method": self.method, "searcher": self.searcher, "alpha": alpha}
        told |= {} if self.persona_id is None else {"persona": self.persona_id}
        beside = () if self.persona_id is not None else GoalProblem.controls
        family = (*(() if self.pareto else run.FOUND), *beside)
        found = run.planned_search(asked, told, family, searching, objective, generation)
        if not self.warm_start:
            return found
        config = {name: each for name, each in found.config.items() if name != "search"}
        return dataclasses.replace(found, config=config, later=(*found.later, "search"))

    def parts(self) -> str:
        """Return what the names of files say of the parts that have a coefficient of their own."""
        return "" if self.by == "trait" else f"_{self.by}"

    def folder(self, goal: str) -> str:
        """Return the name of the run's folder."""
        searcher = f"_{self.search}" if self.search in ("tpe", "random") else ""
        return f"{goal}_{self.method}{self.parts()}{searcher}"

    def methods(
        self,
        bench: BenchOptions,
        opened: PersonaBench,
        layers: tuple[int, ...] | None,
        folder: Path,
    ) -> list[Method]:
        """Return the ways of searching; one for each training seed of the diffs."""
        cache = folder / "scales" / f"{self.method}{self.parts()}.json"
        return opened.methods(
            self.method, layers=layers, alpha=bench.alpha, searcher=self.searcher, cache=cache
        )

    def problem(
        self, opened: PersonaBench, wanted: dict[str, float], scorer: Scorer | None
    ) -> Problem:
        """Return what is searched for, with its judges."""
        if self.persona_id is not None:
            return opened.problem(self.persona_id)
        asked = self.prompts is None
        return opened.sought(wanted, scorer, on_questions=asked, pareto=self.pareto)


@dataclass(frozen=True)
class SavedOptions(shared.Written):
    """The folder of results."""

    output: Annotated[Path, "Where results are written.", "--output", "--save-dir"]
    protocol: shared.Protocol = field(default=None, kw_only=True)


@command("optimize")
def optimize(
    *,
    searched: Searched,
    searching: SearchOptions,
    objective: ObjectiveOptions = SENSIBLE,
    bench: BenchOptions,
    output: SavedOptions = SavedOptions(Path("optimization_results")),
    model: shared.ModelOptions,
    judging: SoughtJudgeChoice,
    generation: Spoken = SHORT,
) -> None:
    """Find the mix of directions that speaks like a person, has target scores, or any you score.

    A generation is one batch: every candidate answers every prompt with coefficients of its own.
    What is reported is the value on prompts (and conversations) that the search did not see. Run
    again, it goes on where it stopped; under accelerate launch the rows are shared out.

    Example: persona-lora optimize --persona-id episode-000101_A --method lora
    --max-iterations 10 --num-prompts 10
    """
    from persona_lora.studies.personas.goals import name_of_goal
    from persona_lora.studies.personas.run import optimise_over_seeds, searches_of
    from persona_lora.studies.personas.search import check_traits

    searched.check(searching, bench.num_prompts)
    objective = searched.limited(objective)
    wanted, scorer, prompts = searched.read()
    searching = searched.injected(searching)
    name = searched.persona_id or name_of_goal(wanted, scorer, searched.pareto)
    folder = output.output
    engine = shared.EngineOptions(searched.engine, searched.engine_tolerance)
    written = output.at(folder / searched.folder(name), record=engine.record())
    if wanted and bench.traits is None:
        bench = dataclasses.replace(bench, traits=tuple(wanted))
    judge = searched.judging(judging, bench)
    asked, trained = bench.asked(prompts), bench.trainings([searched.method])
    searching = searches_of(searching, trained, front=searched.pareto)
    layers, directions = bench.acting(model, [searched.method], searched.by, engine)
    check_traits(sorted(directions), searching)
    planned = searched.planned(asked, bench.alpha, searching, objective, generation)
    runs, datasets = [(written, planned)], searched.datasets_dir
    opened = bench.open(model, generation, judge, asked, datasets=datasets, runs=runs)
    opened.by = searched.by
    with _quiet_unless_first(opened.processes):
        opened.elsewhere = engine.open(opened.chat_model, chain(*directions.values()))
        with console.status("judges and directions"):
            chosen = searched.methods(bench, opened, layers, folder)
            problem = searched.problem(opened, wanted, scorer)
        with _live(f"{name}, {searched.method}", opened) as watch:
            results = optimise_over_seeds(
                problem,
                chosen,
                written,
                searching=searching,
                objective=objective,
                watch=watch,
                warm_start=searched.warm_start,
            )
        _show_search(results, folder, problem, objective)


def _show_search(results: Any, folder: Path, problem: Problem, objective: ObjectiveOptions) -> None:
    from persona_lora.report import wording
    from persona_lora.report.comparisons import fit_table
    from persona_lora.report.trust import standing
    from persona_lora.studies.personas import read_fits as voices
    from persona_lora.studies.personas import read_goals as goals
    from persona_lora.studies.personas.run import best_of

    result = best_of(results)
    rows = [*(row for each in results for row in each.rows), *problem.bounds]
    worth: tuple[str, ...]
    if problem.kind == "goal":
        config = problem.record()
        fits = goals.goal_fits(rows, config, objective)
        run = Run(result.folder)
        worth = (goals.goal_line(rows, run, result.best),)
        if goals.is_front(config):
            worth = (goals.front_line(rows, config, objective), *worth)
        tables = goals.goal_tables(rows, run, objective)
    else:
        fits = voices.condition_fits(rows, objective)
        worth = (voices.order_line(fits), voices.agreement_line(rows))
        tables = [fit_table(fits, "held-out prompts and conversations")]
    (reported,) = (each for each in fits if each.condition == result.best)
    weights = ", ".join(
        f"{trait} {value:+.2f}" for trait, value in result.weights.as_dict().items()
    )
    found = result.search
    mix = folder / f"{result.persona_id}{MIX}.json"
    show(
        standing(Run(result.folder)),
        f"{voices.seeds_line(rows)} {voices.constraints_line(reported)}",
        *worth,
        *tables,
        f"weights (the {result.best}, which stood highest on fresh prompts): {weights}",
        f"{found.evaluations} evaluations in {found.iterations} generations; stopped by "
        f"{found.reason}; best training value {wording.number(found.best.value, 2)}",
        f"weights: {folder / result.persona_id}{WEIGHTS}.json",
        *([f"mix:     {mix} (for serve, and the playground up to ±4)"] if mix.is_file() else []),
        f"report:  {result.folder / 'report.html'}",
    )
    for check in problem.checks:
        show(
            f"judge fitted on {check.fitted_on} conversations: AUC {check.auc:.2f} on "
            f"{check.n_own} unseen utterances of the person against {check.n_others} of others"
        )


@dataclass(frozen=True)
class ComparedMethods:
    """Which methods are compared, over which personas."""

    persona_id: Annotated[tuple[str, ...] | None, "Personas: a,b; all by default."] = None
    methods: Annotated[
        tuple[str, ...],
        "lora, svd, mean_diff, pca (or svd@20), random, tpe, equal, likelihood, prompt.",
    ] = ("lora", "random", "equal", "prompt", "svd", "mean_diff")
    engine: shared.Engines = ()
    engine_tolerance: shared.EngineTolerance = None

    def check(self, searching: SearchOptions) -> None:
        """UserError for an option that no compared method uses, and for a missing library."""
        from persona_lora.steering.directions import EXTRACTORS
        from persona_lora.studies.personas.baselines import directions_of
        from persona_lora.studies.personas.search import optuna_for

        vectors = [each for each in self.methods if directions_of(each) in EXTRACTORS]
        shared.EngineOptions(self.engine, self.engine_tolerance).check(
            diffs_alone=not vectors, shared=0 < len(vectors) < len(self.methods)
        )
        among = f"with --methods {','.join(self.methods)}"
        methods = set(self.methods)
        if not set(EXTRACTORS) & methods:
            refuse_useless("layers", f"{among}: no vectors without layers of their own")
        if "tpe" in methods:
            optuna_for(searching)
        if not {"lora", "random", "tpe", "equal", "likelihood"} & methods:
            refuse_useless("energy", f"{among}: no LoRA differences")
        if not methods - {"prompt"}:
            refuse_useless("alpha allow_other_base", f"{among}: no directions")
        if not methods - {"prompt", "equal", "likelihood"}:
            budget = "max_iterations population_size sigma0 bound penalty race search_seeds"
            refuse_useless(budget, f"{among}: no search")


BUDGET = "max_iterations", "population_size", "sigma0", "bound", "seed", "seeds"


@command("compare-methods")
def compare_methods(
    *,
    compared: ComparedMethods,
    searching: Annotated[SearchOptions, BUDGET] = SearchOptions(max_iterations=10),
    objective: ObjectiveOptions = SENSIBLE,
    bench: BenchOptions = BenchOptions(num_prompts=10),
    output: SavedOptions = SavedOptions(Path("results/personas")),
    model: shared.ModelOptions,
    judging: PersonaJudgeChoice,
    generation: Spoken = SHORT,
) -> None:
    """Compare ways of giving the model a person's voice, at equal budget, on held-out prompts.

    The unsteered model is always among them. Intervals are over personas; run again, it goes on
    where it stopped. Beside --engine the model in this process answers the methods of vectors.

    Example: persona-lora compare-methods --persona-id episode-000101_A,episode-000117_B
    --methods lora,random,prompt --max-iterations 8
    """
    from persona_lora.core.personas import list_personas
    from persona_lora.report.comparisons import fit_table
    from persona_lora.studies.personas import method_comparison

    compared.check(searching)
    names = judge_names(judging.judge, PERSONA_JUDGES)
    personas = compared.persona_id or list_personas(bench.persona_dir)
    for each in personas:
        check_persona(each, bench.persona_dir, [*names, bench.report_judge])
    judge = shared.judging_of(judging, beside=bench.report_judge)
    asked, trained = bench.asked(), bench.trainings(compared.methods)
    searching = method_comparison.searches_of(searching, trained)
    engine = shared.EngineOptions(compared.engine, compared.engine_tolerance)
    layers, directions = bench.acting(model, compared.methods, engine=engine)
    acting = method_comparison.Acting(layers, bench.alpha)
    written = output.at(output.output, record=engine.record())
    planned = method_comparison.planned_comparison(
        asked, generation, personas, compared.methods, trained, bench.alpha, searching, objective
    )
    planned.check(method_comparison.whole_of(written))  # below it others are seen to
    opened = bench.open(model, generation, judge, asked)
    opened.elsewhere = engine.open(opened.chat_model, chain(*directions.values()))
    with _quiet_unless_first(opened.processes), _live("comparison", opened) as watch:
        comparison = method_comparison.compare_methods(
            opened,
            personas,
            compared.methods,
            written,
            acting=acting,
            searching=searching,
            objective=objective,
            watch=lambda persona, name, generation: watch(generation, f"{persona}, {name}"),
        )
        show(*comparison.lines, fit_table(comparison.overall, f"over {len(personas)} personas"))
        if comparison.against_random:
            show(fit_table(comparison.against_random, "against random search"))
        show(f"report: {comparison.folder / 'report.html'}")


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
        f"best {generation.best:.2f}"
        if generation.best is not None
        else "none keeps the constraints yet",
        f"mean {generation.mean:.2f}" if generation.mean is not None else "",
        f"σ {generation.sigma:.2f}",
        f"{generation.evaluations} evaluations",
        f"{rate:.2f}/s" if rate else "from disk",
        "" if dollars is None else f"{dollars:.2f} $",
        f"about {left * generation.seconds:.0f} s left" if rate else "",
    ]
    return "  ·  ".join(part for part in parts if part)


@dataclass(frozen=True)
class PersonaSource:
    """Which personas are built, of which conversations."""

    id: Annotated[str | None, "The persona's id: the name of its folder."] = None
    all: Annotated[bool, "Build every folder of --persona-dir, one after the other."] = False
    conversations: Annotated[
        Path | None, "A file, or a folder of files; the persona's own folder by default."
    ] = None
    speaker: Annotated[Literal["A", "B"], "A speaks first (or is the user)."] = "A"
    episode: Annotated[str | None, "Only the sessions of this id, where a file holds many."] = None
    persona_dir: shared.PersonaDir = None

    def names(self) -> list[str]:
        """Return the personas that --id or --all asks for."""
        if (self.id is None) != self.all:
            raise UserError("give --id, or --all for every folder of --persona-dir")
        if self.id is not None:
            return [self.id]
        if self.conversations is not None:
            raise UserError("--conversations is of one persona; with --all each has its own folder")
        found = sorted(path.name for path in self.root.glob("*") if path.is_dir())
        if not found:
            raise UserError(f"{self.root} holds no persona's folder; give --persona-dir")
        return found

    @property
    def root(self) -> Path:
        """The folder that holds the personas."""
        return self.persona_dir or Path("personas")


@dataclass(frozen=True)
class ProfileOptions:
    """How the profile is written, and the prompt of a judge."""

    samples: Annotated[int, "Representative utterances to show a judge."] = 10
    template: Annotated[Path | None, "A judge prompt of your own, with its placeholders."] = None
    writer_url: Annotated[
        str | None, "An endpoint that writes the profile; else it is made from features."
    ] = None
    writer_model: Annotated[str | None, "The endpoint's model."] = None
    profile_prompt: Annotated[
        Path | None, "How to ask for the profile: {features} and {samples}."
    ] = None

    def writer(self) -> Any:
        """Return what writes a profile by an endpoint, or None: sentences made from features."""
        from persona_lora.data.profile_writing import DEFAULT_PROMPT, profile_writer
        from persona_lora.data.writers import Endpoint, EndpointWriter

        if self.writer_url is None and self.writer_model is None:
            if self.profile_prompt is not None:
                raise UserError("--profile-prompt needs --writer-url and --writer-model")
            return None
        if self.writer_url is None or self.writer_model is None:
            raise UserError("--writer-url and --writer-model go together")
        text = DEFAULT_PROMPT if self.profile_prompt is None else read_text(self.profile_prompt)
        key = environment().get("OPENAI_API_KEY")
        endpoint = Endpoint(self.writer_model, self.writer_url, key)
        return profile_writer(EndpointWriter(endpoint), text)


@command("persona build")
def build_persona(
    *,
    source: PersonaSource,
    profile: ProfileOptions,
    overwrite: Annotated[bool, "Make files anew that are there already."] = False,
) -> None:
    """Make a persona's features, samples, profile and judge prompt from its conversations.

    Read are our own forms, chat JSONL, ConvAI2 / PersonaChat, Multi-Session Chat, Conversation
    Chronicles, LaMP and the files of published personas. With --all a folder that cannot be built
    is named, and the others are.

    Example: persona-lora persona build --id episode-184019_A --conversations chronicles.jsonl
    --episode episode-184019 --speaker A
    """
    from persona_lora.models.embeddings import SentenceEmbedder
    from persona_lora.profiles import folders
    from persona_lora.profiles.conversations import load_conversations
    from persona_lora.profiles.judge_prompt import DEFAULT_TEMPLATE

    names = source.names()
    text = DEFAULT_TEMPLATE if profile.template is None else read_text(profile.template)
    write_profile = profile.writer()
    embedder = SentenceEmbedder()

    def build(name: str) -> None:
        folder = source.root / checked_name(name, "--id")
        told = load_conversations(
            source.conversations or resource_path(folder),
            speaker=source.speaker,
            episode=source.episode,
        )
        built = folders.build_persona(
            folder,
            told,
            embedder.embed,
            num_samples=profile.samples,
            template=text,
            write_profile=write_profile,
            overwrite=overwrite,
        )
        console.print(read_text(built.folder / folders.PROFILE).strip())
        counts = f"{built.num_train} training and {built.num_test} held-out utterances"
        console.print(f"{counts} in {built.folder}")
        if built.kept:
            kept = ", ".join(built.kept)
            show(f"left as they were: {kept} (--overwrite makes them anew)")

    if source.all:
        _raise_for(_failures(names, build), len(names))
    else:
        build(names[0])


def _failures(names: Sequence[str], work: Callable[[str], None]) -> list[str]:
    """Do the work for every persona; return those that failed, each named with its reason."""
    failed = []
    for name in names:
        try:
            work(name)
        except UserError as error:
            failed.append(name)
            console.print(f"{name}: {error}", style="red", markup=False, soft_wrap=True)
    return failed


def _raise_for(failed: Sequence[str], number: int) -> None:
    if failed:
        raise UserError(
            f"{len(failed)} of {number} personas cannot be used (see above): {', '.join(failed)}"
        )


@dataclass(frozen=True)
class LampFiles:
    """The files of LaMP-7, and the mix that is scored beside the plain model."""

    questions: Annotated[Path, "LaMP-7 questions (JSON)."]
    outputs: Annotated[Path, "The answers that their authors gave (JSON)."]
    optimization: Annotated[
        Path | None, "A {persona}_optimization.json, whose mix is scored too."
    ] = None
    user: Annotated[tuple[str, ...] | None, "Only the questions of these ids."] = None
    trait_vector_dir: shared.DirectionsDir = Path("checkpoints")

    def read(self) -> list[Any]:
        """Return the questions that are asked; UserError for an id that there is not."""
        from persona_lora.studies.personas.lamp import load_lamp

        refuse_useless("trait_vector_dir", "without --optimization", unless=self.optimization)
        read = load_lamp(self.questions, self.outputs)
        unknown = sorted(set(self.user or ()) - {each.id for each in read})
        if unknown:
            raise UserError(f"{self.questions} has no question {unknown[0]!r}")
        return [each for each in read if self.user is None or each.id in self.user]


@command("persona lamp")
def lamp(
    *,
    files: LampFiles,
    output: shared.RunOptions = shared.RunOptions(Path("results/lamp7")),
    model: shared.ModelOptions,
    generation: Annotated[GenerationOptions, ("max_new_tokens", "seed")] = GenerationOptions(60),
) -> None:
    """Score LaMP-7 files by ROUGE: the plain model, the author's texts as prompt, and a mix.

    Example: persona-lora persona lamp --questions dev_questions.json --outputs dev_outputs.json
    --user 70 --optimization optimization_results/70_optimization.json
    """
    from persona_lora.studies.personas import lamp as experiment
    from persona_lora.studies.personas.bench import Optimized

    chosen, written = files.read(), output.at(output.folder)
    found = Optimized.load(files.optimization, files.trait_vector_dir)
    asked = (experiment.NONE, experiment.PROFILE)
    said = [row.conversation for row in experiment.rows_of(chosen, asked, None)]
    speaker, mix = (
        found.speaker(model.load(found.bank.directions, asked=said), generation),
        found.mix,
    )
    with console.status(f"{len(chosen)} questions"):
        scores = experiment.score_lamp(speaker, chosen, mix, written)
    show(scores.table(), f"answers and scores: {scores.folder}")


@command("persona validate")
def validate_personas(
    *,
    persona_dir: shared.PersonaDir = None,
    judge: Annotated[Literal["embedding", "letters"], "The judges' family."] = "embedding",
    output: Annotated[Path | None, "A JSON file to write the numbers to."] = None,
    overwrite: Replace = False,
) -> None:
    """Test the embedded persona judge: does it know who speaks, in conversations it never saw?

    One regression over all persons is fitted on the utterances of one split, and meets the other.

    Example: persona-lora persona validate --output results/persona_judge.json
    """
    from persona_lora.core.files import write_json
    from persona_lora.core.personas import list_personas, load_persona
    from persona_lora.judges import style_judge as styles
    from persona_lora.models.embeddings import SentenceEmbedder

    if output is not None:
        shared.refuse_to_replace(output, overwrite)
    personas: list[Persona] = []
    names = list_personas(persona_dir)
    bad = _failures(names, lambda name: personas.append(load_persona(name, persona_dir)))
    with console.status("embedding utterances"):
        letters = judge == "letters"
        features: styles.Features = (
            styles.LetterFeatures() if letters else styles.TextFeatures(SentenceEmbedder())
        )
        fitted = {split: styles.fit_judges(personas, split, features=features) for split in SPLITS}
        validations = [styles.validate_judges(personas, fitted[each], each) for each in SPLITS]
    _show_validations([persona.id for persona in personas], validations)
    if output is not None:
        write_json(output, [dataclasses.asdict(each) for each in validations])
    _raise_for(bad, len(names))


def _show_validations(personas: Sequence[str], validations: Sequence[Any]) -> None:
    from persona_lora.report import wording
    from persona_lora.report.sections import Table

    headings, rows = ["persona"], [[persona] for persona in personas]
    for each in validations:
        headings += [f"{each.fitted_on}: AUC", "nearest", "of the two"]
        for row in rows:
            auc, nearest = each.auc[row[0]], each.nearest[row[0]]
            row += [wording.number(auc, 2), nearest.persona_id, wording.number(nearest.auc, 2)]
    show(Table.of(" | ".join(headings), rows))
    for each in validations:
        show(
            f"fitted on {each.fitted_on} conversations: top-1 {each.top1:.2f} of "
            f"{each.n_utterances} utterances, {each.top1_conversations:.2f} of "
            f"{each.n_conversations} conversations (chance {each.chance:.2f}); mean AUC "
            f"{each.mean_auc:.2f}"
        )


@command("persona sheets")
def rating_sheets(
    *,
    run: Annotated[Path, typer.Argument(help="A run of optimize, or comparison/ of a comparison.")],
    id: Annotated[str, "The persona."],
    output: Annotated[Path, "The folder to write sheet and key to."],
    conditions: Annotated[
        tuple[str, ...] | None, "Conditions to rate: none,lora,prompt; all by default."
    ] = None,
    prompts: Annotated[int, "Held-out prompts to show."] = 8,
    seed: Seed = 0,
    persona_dir: shared.PersonaDir = None,
    overwrite: Overwrite = False,
) -> None:
    """Write blind rating sheets for people: a CSV, a page to click in, and the key apart.

    Example: persona-lora persona sheets results/personas/comparison --id episode-000101_A
    --conditions none,lora,prompt --output results/sheets
    """
    from persona_lora.studies.personas.human_ratings import write_sheets

    sheets = write_sheets(
        Run(run),
        Output(output, overwrite),
        persona=id,
        conditions=None if conditions is None else list(conditions),
        prompts=prompts,
        seed=seed,
        personas=persona_dir,
    )
    show(f"{sheets.items} answers: {sheets.csv} and {sheets.page}; key: {sheets.key}")


@command("persona ratings")
def read_ratings(
    *,
    folder: Annotated[Path, typer.Argument(help="The folder that the sheets were written to.")],
    files: Annotated[list[Path], typer.Argument(help="Rated sheets, one from each rater.")],
) -> None:
    """Read rated sheets back: mean ratings by condition, agreement of raters and of the judge.

    Example: persona-lora persona ratings results/sheets ann.csv bob.csv
    """
    from persona_lora.studies.personas import human_ratings

    found = human_ratings.read_ratings(folder, files)
    show(found.table(), *found.lines())
