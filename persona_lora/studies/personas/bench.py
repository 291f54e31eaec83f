"""Everything that a persona search needs, from names and folders; and the optimiser in one class.

Here options become a ``PersonaProblem`` and a ``Method``; the search itself knows only those.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from functools import cached_property, partial
from pathlib import Path

from persona_lora.core import progress
from persona_lora.core.content import digest_of, file_digest
from persona_lora.core.errors import UserError
from persona_lora.core.files import read_json, write_json
from persona_lora.core.options import PERSONA_JUDGES, SENSIBLE, judge_names
from persona_lora.core.personas import (
    Coefficients,
    ConversationSplit,
    Persona,
    PersonaPrompts,
    list_personas,
    load_persona,
    load_persona_prompts,
)
from persona_lora.core.resources import search_folders
from persona_lora.core.runs import Output, first_difference
from persona_lora.core.traits import Trait, load_trait
from persona_lora.judges.choice import (
    JudgeOptions,
    check_judge,
    judge_inputs,
    make_judge,
    second_name,
)
from persona_lora.judges.coherence import CoherenceScorer, relevance
from persona_lora.judges.judging import Judge
from persona_lora.judges.persona_judges import (
    LIKELIHOOD,
    JudgeCheck,
    Reader,
    check_style_judge,
    fit_coherence,
    fit_likelihood_judge,
    judge_prompt_of,
    likelihood_contrast,
    make_persona_judge,
    make_readers,
)
from persona_lora.judges.style_judge import (
    LetterFeatures,
    StyleJudge,
    TextFeatures,
    Voices,
    fit_voices,
)
from persona_lora.models.embeddings import SentenceEmbedder, embedder_content
from persona_lora.models.loading import DEFAULT_MODEL, ChatModel, load_chat_model
from persona_lora.models.processes import Processes
from persona_lora.models.structure import decoder_layers
from persona_lora.projections.inputs import ModuleInputs, kept_inputs, load_ordinary_prompts
from persona_lora.steering.bank import Bank, Elsewhere, warn_of_other_template
from persona_lora.studies.asking.run import GenerationOptions
from persona_lora.studies.personas.baselines import (
    LORA,
    By,
    Wanted,
    cut_bank,
    default_layers,
    directions_of,
    load_directions,
    trainings,
)
from persona_lora.studies.personas.goals import (
    Goal,
    GoalProblem,
    Scorer,
    Targets,
    name_of_goal,
    questions_of,
)
from persona_lora.studies.personas.objective import ObjectiveOptions, Speaker, plain_speaker
from persona_lora.studies.personas.run import (
    Method,
    PersonaProblem,
    PersonaResult,
    baseline_answers,
    best_of,
    first_prompts,
    optimise_over_seeds,
    persona_system_prompt,
)
from persona_lora.studies.personas.search import Generation, SearchOptions
from persona_lora.studies.steering.calibration import equal_effect_scales

logger = logging.getLogger(__name__)

# R1 … R5, in the order that initial weights are given in.
STYLE_TRAITS = ("self_other_focus", "formality", "intimacy", "narrative_mode", "emotional_tone")
SCALE_PROMPTS = 8
NUM_PROMPTS = 15


def scales_of(
    chat_model: ChatModel,
    directions: Bank,
    *,
    cache: Path | None = None,
    datasets: Path | None = None,
) -> dict[str, float]:
    """Return the coefficient of equal effect of every direction; ``cache`` keeps them as JSON."""
    prompts = load_ordinary_prompts(datasets)[:SCALE_PROMPTS]
    read = {**chat_model.inputs(), **directions.inputs, "the prompts": digest_of(prompts)}
    asked = {**chat_model.record(), **directions.record, "inputs": read}
    if cache is not None and cache.is_file():
        kept = read_json(cache)
        if first_difference(kept.get("of"), asked) is None:
            return {row["trait"]: row["coefficient"] for row in kept["scales"]}
    with progress.stage("equal effect"):
        scales = equal_effect_scales(chat_model, directions, prompts)
    if cache is not None:
        write_json(cache, {"of": asked, "scales": [dataclasses.asdict(each) for each in scales]})
    return {each.trait: each.coefficient for each in scales}


@dataclass(frozen=True)
class Optimized:
    """What ``{persona}_optimization.json`` holds of the best mix, its directions loaded.

    Without such a file: the plain model, and no mix. ``energy`` is what ranks were cut to, and
    ``weighed_by`` which prompts the inputs are on that weighed the cut, None where none did.
    """

    mix: Coefficients | None = None
    bank: Bank = field(default_factory=Bank)
    scales: Mapping[str, float] = field(default_factory=dict)
    alpha: float = 1.0
    energy: float | None = None
    weighed_by: str | None = None

    @classmethod
    def load(cls, path: Path | None, trait_folder: Path) -> Optimized:
        """Read a result of optimize; UserError for another file, or a direction that is gone."""
        if path is None:
            return cls()
        found = read_json(path)
        lacking = [key for key in ("method", "alpha", "scales", "best_weights") if key not in found]
        if lacking:
            raise UserError(f"{path} is no result of optimize: it has no {lacking[0]!r}")
        mix = Coefficients.of(found["best_weights"])
        wanted = Wanted(
            *(mix.traits, trait_folder, found["layer"] or ()), trained=found.get("trained", "")
        )
        bank = load_directions(directions_of(found["method"]), wanted)
        cut = found.get("energy"), found.get("weighed_by")
        return cls(mix, bank, found["scales"], found["alpha"], *cut)

    def speaker(self, chat_model: ChatModel, generation: GenerationOptions) -> Speaker:
        """Return who speaks with the mix; UserError where its ranks were cut on other prompts."""
        if self.mix is None:
            return plain_speaker(chat_model, generation)
        warn_of_other_template(chat_model, self.bank.directions)
        bank, inputs = self.bank, None
        if self.weighed_by is not None:
            inputs = kept_inputs(chat_model, load_ordinary_prompts())
            if inputs.prompts != self.weighed_by:
                raise UserError(
                    "the search cut its ranks by inputs on other prompts than those of "
                    "datasets/ordinary/prompts.jsonl here, or with another chat template; put "
                    "those back, or search anew"
                )
        if self.energy is not None:
            bank = cut_bank(bank.diffs, self.energy, inputs)
        return Speaker(chat_model, bank, self.scales, self.alpha, generation, Processes())


@dataclass(eq=False)
class PersonaBench:
    """What personas and methods share: the model, features of texts, coherence, base answers.

    ``elsewhere`` answers mixes of diffs, prompts, and unsteered where these do; vectors steer the
    model in this process.
    """

    chat_model: ChatModel
    prompts: PersonaPrompts
    generation: GenerationOptions
    judging: JudgeOptions
    traits: Sequence[str] = STYLE_TRAITS
    trait_folder: Path = Path("checkpoints")
    persona_dir: Path | None = None
    datasets: Path | None = None
    processes: Processes = field(default_factory=Processes)
    energy: float | None = None
    report_judge: str | None = None
    by: By = "trait"
    plain: bool = False
    elsewhere: Elsewhere | None = None
    _voices: dict[tuple[str, str], Voices] = field(default_factory=dict, init=False, repr=False)
    _seeks_goal: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.report_judge not in (None, LIKELIHOOD):
            judge_names(self.report_judge, PERSONA_JUDGES)

    @cached_property
    def features(self) -> TextFeatures:
        """Features of texts, computed once for each."""
        return TextFeatures(SentenceEmbedder())

    @cached_property
    def coherence(self) -> CoherenceScorer:
        """The coherence of answers, fitted to the traits' own training answers."""
        return fit_coherence(
            self.chat_model, self.traits, datasets=self.datasets, seed=self.judging.seed
        )

    def sought(
        self,
        wanted: Mapping[str, float],
        scorer: Scorer | None,
        *,
        on_questions: bool,
        pareto: bool = False,
    ) -> GoalProblem:
        """Return the problem of target scores, or of a function of the user's.

        Each trait is scored on questions of its own where the prompts are the traits' questions, on
        all prompts where they are not. ``pareto``: each target is an objective of its own.
        """
        self._seeks_goal = True
        second: Goal | None = None
        read: dict[str, str] = {}
        goal: Goal
        if scorer is not None:
            goal, read = scorer, {"the scorer": scorer.content}
        else:
            traits = [load_trait(trait, self.datasets) for trait in wanted]
            found = self._targets(wanted, traits, self.judging, on_questions)
            goal = dataclasses.replace(found, pareto=pareto)
            beside = dataclasses.replace(self.judging, second_judge=None)
            others = {second_name(trait, beside) for trait in traits}
            if len(others) == 1 and (other := others.pop()) is not None:
                told = dataclasses.replace(self.judging, judge=other, judge_model=None)
                second = self._targets(wanted, traits, told, on_questions)
            for trait in traits:
                read |= trait.inputs()
            read |= judge_inputs(beside)
        read |= self._measured_by()
        return GoalProblem(
            self.chat_model,
            name_of_goal(wanted, scorer, pareto),
            goal,
            self.prompts,
            self.coherence,
            lambda exchanges: relevance(exchanges, self.features.embeddings),
            self.generation,
            self.processes,
            read,
            second,
        )

    def _targets(
        self,
        wanted: Mapping[str, float],
        traits: Sequence[Trait],
        options: JudgeOptions,
        on_questions: bool,
    ) -> Targets:
        for trait in traits:
            check_judge(trait, options)
        return Targets(
            wanted,
            {trait.name: make_judge(trait, self.chat_model, options) for trait in traits},
            {trait.name: questions_of(trait) for trait in traits} if on_questions else {},
            traits=tuple(traits),
        )

    @cached_property
    def readers(self) -> dict[str, Reader]:
        """The language models among the judges, each made once."""
        asked = (self.judging.judge, self._reporting.judge)
        both = dict.fromkeys(name for each in asked for name in judge_names(each, PERSONA_JUDGES))
        return make_readers(
            dataclasses.replace(self.judging, judge=",".join(both)), self.chat_model
        )

    @property
    def _reporting(self) -> JudgeOptions:
        """How the report is judged where not by likelihood: by another family, unless told."""
        judge = self.report_judge
        if judge is None or judge == LIKELIHOOD:
            embedded = "embedding" in judge_names(self.judging.judge, PERSONA_JUDGES)
            judge = "letters" if embedded else "embedding"
        return dataclasses.replace(self.judging, judge=judge)

    def dollars(self) -> float | None:
        """Return the US dollars spent on judging; None where nothing is billed."""
        if self._seeks_goal:
            return self.judging.budget.usage().dollars if "openai" in self.judging.judge else None
        spent = [each.dollars() for each in self.readers.values()]
        billed = [dollars for dollars in spent if dollars is not None]
        return sum(billed) if billed else None

    @cached_property
    def baselines(self) -> dict[str, str]:
        """The unsteered answer to every prompt."""
        return baseline_answers(self.chat_model, self.prompts, self.generation, self.processes)

    def problem(self, persona_id: str) -> PersonaProblem:
        """Return the problem of one persona, with its judges."""
        persona = load_persona(persona_id, self.persona_dir)
        personas = self._all_with(persona)
        if self.readers:
            judge_prompt_of(persona)  # a mistake in it shows before anything is generated
        search_judge, checks = self._judge(persona, personas, "train", self.judging)
        if self.report_judge == LIKELIHOOD:
            contrast = likelihood_contrast(self.chat_model, persona_system_prompt(persona))
            report_judge, found = fit_likelihood_judge(
                persona, personas, contrast, seed=self.judging.seed
            )
        else:
            report_judge, found = self._judge(persona, personas, "test", self._reporting)
        return PersonaProblem(
            self.chat_model,
            persona,
            self.prompts,
            search_judge,
            report_judge,
            self.coherence,
            lambda exchanges: relevance(exchanges, self.features.embeddings),
            self.features.embeddings,
            self.generation,
            self.processes,
            (*checks, *found),
            self._judged_by(persona.id, personas),
        )

    def _judge(
        self,
        persona: Persona,
        personas: Sequence[Persona],
        split: ConversationSplit,
        options: JudgeOptions,
    ) -> tuple[Judge, list[JudgeCheck]]:
        """Return a persona's judge of a split, and how well it does where it is an embedded one."""
        judge = make_persona_judge(
            persona,
            options,
            voices=lambda family: self._voices_of(personas, family, split),
            readers=self.readers,
            baselines=self._baselines_for(persona) if self.readers else {},
        )
        if not isinstance(judge, StyleJudge):
            return judge, []
        return judge, [check_style_judge(judge, persona, personas, split)]

    def _voices_of(
        self, personas: Sequence[Persona], family: str, split: ConversationSplit
    ) -> Voices:
        """Return the regression that tells all persons apart: one for all of their judges."""
        if (family, split) not in self._voices:
            features = self.features if family == "embedding" else LetterFeatures()
            self._voices[family, split] = fit_voices(personas, split, features=features)
        return self._voices[family, split]

    def _baselines_for(self, persona: Persona) -> dict[str, str]:
        """Return the unsteered answers that a judge compares with, to the person's lines too."""
        lines = tuple(dict.fromkeys(each.question for each in persona.answers("test")))
        asked = PersonaPrompts((), lines[: len(self.prompts.held_out)])
        return self.baselines | baseline_answers(
            self.chat_model, asked, self.generation, self.processes
        )

    def _all_with(self, persona: Persona) -> list[Persona]:
        """Return a persona and all others; one that cannot be read is named and left out."""
        found = []
        for each in list_personas(self.persona_dir):
            try:
                other = each != persona.id
                found.append(load_persona(each, self.persona_dir) if other else persona)
            except UserError as error:
                logger.warning("%s; it is not among those that the judge tells apart", error)
        return found

    def _judged_by(self, persona_id: str, personas: Sequence[Persona]) -> dict[str, str]:
        """Return digests of the other personas and of the traits' answers, and of the judge."""
        others = {each.id: each.content() for each in personas if each.id != persona_id}
        return {
            "the other personas": digest_of(others),
            "the style judges' regression": digest_of("softmax over persons"),
            **self._measured_by(),
            **_inputs_of(self.judging),
            "the judge of the report": digest_of(_inputs_of(self._reporting)),
        }

    def _measured_by(self) -> dict[str, str]:
        """Return digests of what coherence and relevance are made from, whoever judges."""
        roots = search_folders("datasets", self.datasets)
        files = {
            trait: [path for root in roots if (path := root / trait / "train.jsonl").is_file()]
            for trait in self.traits
        }
        traits = {trait: file_digest(found[0]) for trait, found in files.items() if found}
        return {
            "train.jsonl of the traits": digest_of(traits),
            "the sentence embedder": embedder_content(),
        }

    def methods(
        self,
        name: str,
        *,
        layers: Sequence[int] | None = None,
        alpha: float = 2.0,
        searcher: str = "cmaes",
        cache: Path | None = None,
    ) -> list[Method]:
        """Load the directions of a method and measure their scales: once for each training seed."""
        chosen = tuple(layers or default_layers(len(decoder_layers(self.chat_model.model))))
        energy = self.energy if name == "lora" else None
        found = []
        for trained in trainings(name, self.trait_folder, self.traits):
            by = self.by if name == LORA else "trait"
            wanted = Wanted(self.traits, self.trait_folder, chosen, energy, trained, by)
            bank = self._load(name, wanted)
            warn_of_other_template(self.chat_model, bank.directions)
            if bank.diffs:
                bank = dataclasses.replace(bank, elsewhere=self.elsewhere)
            at = cache.with_stem(f"{cache.stem}_{trained}") if cache and trained else cache
            measure = partial(scales_of, self.chat_model, bank, cache=at, datasets=self.datasets)
            scales = self.processes.from_main(measure)
            found.append(Method(name, bank, scales, alpha, searcher, trained))
        return found

    def _load(self, name: str, wanted: Wanted) -> Bank:
        """Load directions; what the model's inputs cut is the same in all processes."""
        if wanted.energy is None or self.plain:
            return load_directions(name, wanted)
        return self.processes.from_main(
            lambda: load_directions(name, dataclasses.replace(wanted, inputs=self._inputs))
        )

    @cached_property
    def _inputs(self) -> ModuleInputs:
        """What flows through the model on ordinary prompts; it weighs the cut of ranks."""
        return kept_inputs(self.chat_model, load_ordinary_prompts())


def _inputs_of(options: JudgeOptions) -> dict[str, str]:
    """Return digests of what judges beside persons' own utterances, of which letters know all."""
    asked = [name for name in judge_names(options.judge, PERSONA_JUDGES) if name != "letters"]
    return judge_inputs(dataclasses.replace(options, judge=",".join(asked))) if asked else {}


@dataclass(eq=False)
class CMAESPersonaOptimizer:
    """Find the mix of trait directions that makes a model speak like a person.

    ``layer`` is one decoder layer or several (for vectors; None: three around two thirds of the
    depth), ``alpha`` a factor on all coefficients, ``eval_prompts`` the prompts to search on (by
    default the first ``num_prompts`` of the shipped ones, 15 if None), ``method`` "lora"
    (differences of LoRAs, held live), "svd", "mean_diff" or "pca" (steering vectors). ``energy``
    cuts the rank of the differences to what keeps this share of their squared effect on ordinary
    prompts (``plain``: of their squared norm): faster, and nearly the same answers.

        optimizer = CMAESPersonaOptimizer("episode-000101_A", method="lora")
        result = optimizer.optimize(max_iterations=10, save_dir="optimization_results")
        result.weights.as_dict()

    Directions are scaled to equal effect first, so that a weight means the same for each:
    coefficient = alpha · weight · scale.
    """

    persona_id: str
    _: KW_ONLY
    layer: int | Sequence[int] | None = None
    alpha: float = 2.0
    eval_prompts: Sequence[str] | None = None
    num_prompts: int | None = None
    method: str = "lora"
    searcher: str = "cmaes"
    model: ChatModel | str = DEFAULT_MODEL
    traits: Sequence[str] = STYLE_TRAITS
    trait_vector_dir: Path | str = "checkpoints"
    persona_dir: Path | str | None = None
    judging: JudgeOptions | None = None
    generation: GenerationOptions | None = None
    processes: Processes | None = None
    energy: float | None = None
    plain: bool = False
    bench: PersonaBench = field(init=False, repr=False)

    def __post_init__(self) -> None:
        folder = None if self.persona_dir is None else Path(self.persona_dir)
        prompts = load_persona_prompts(None if folder is None else folder / "prompts.json")
        if self.eval_prompts:
            chosen = tuple(self.eval_prompts)
            fresh = tuple(prompt for prompt in prompts.train if prompt not in chosen)
            prompts = dataclasses.replace(prompts, train=chosen, fresh=fresh)
        elif self.num_prompts is None:
            self.num_prompts = NUM_PROMPTS
        self.traits = tuple(self.traits)
        self.bench = PersonaBench(
            self.model if isinstance(self.model, ChatModel) else load_chat_model(self.model),
            first_prompts(prompts, self.num_prompts),
            self.generation or GenerationOptions(max_new_tokens=40),
            self.judging or JudgeOptions("embedding"),
            self.traits,
            Path(self.trait_vector_dir),
            folder,
            processes=self.processes or Processes(),
            energy=self.energy,
            plain=self.plain,
        )

    def optimize(
        self,
        max_iterations: int = 30,
        sigma0: float = 1.0,
        initial_weights: Sequence[float] | Mapping[str, float] | None = None,
        save_dir: Path | str = "optimization_results",
        *,
        searching: SearchOptions | None = None,
        objective: ObjectiveOptions = SENSIBLE,
        overwrite: bool = False,
        watch: Callable[[Generation], None] | None = None,
    ) -> PersonaResult:
        """Search and report; see ``optimise_over_seeds``.

        ``initial_weights`` are by trait, or in the order of ``traits``. ``searching`` holds the
        rest of the search's options; the three named ones here take precedence.
        """
        save_dir = Path(save_dir)
        options = dataclasses.replace(
            searching or SearchOptions(), max_iterations=max_iterations, sigma0=sigma0
        )
        given = initial_weights
        if given is not None and not isinstance(given, Mapping):
            if len(given) != len(self.traits):
                raise UserError(
                    f"{len(given)} initial weights for {len(self.traits)} traits; give one for "
                    f"each of {', '.join(self.traits)}"
                )
            given = dict(zip(self.traits, map(float, given), strict=True))
        if given is not None:
            options = dataclasses.replace(options, initial=dict(given))
        problem = self.bench.problem(self.persona_id)
        methods = self.bench.methods(
            self.method,
            layers=(self.layer,) if isinstance(self.layer, int) else self.layer,
            alpha=self.alpha,
            searcher=self.searcher,
            cache=save_dir / "scales" / f"{self.method}.json",
        )
        output = Output(save_dir / f"{self.persona_id}_{self.method}", overwrite)
        return best_of(
            optimise_over_seeds(
                problem, methods, output, searching=options, objective=objective, watch=watch
            )
        )
