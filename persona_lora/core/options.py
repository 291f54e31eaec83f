"""The vocabulary of command line, YAML and library: one dataclass for each group of options.

A field whose annotation has a text is an option, and the text is its help; further texts that
begin with "--" are its flags where they are not the field's own name. Any other field is for the
library alone. Knows what an option means and what contradicts itself; refuses to know who asks.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from persona_lora.core.errors import UserError, nearest_names
from persona_lora.core.strength import Nats

SAMPLES_PER_QUESTION = 1000
Seed = Annotated[int, range(2**32), "The seed of everything that is drawn."]  # as numpy's
Split = Literal["extract", "eval", "ood"]
Positions = Literal["response", "prompt", "all"]
Overwrite = Annotated[bool, "Replace what an earlier run of another configuration left there."]
Replace = Annotated[bool, "Replace what is there already."]


@dataclass(frozen=True)
class GenerationOptions:
    """How answers are generated; ``temperature`` 0 is greedy, and then one sample is all."""

    max_new_tokens: Annotated[int, "The longest answer, in tokens."] = 80
    temperature: Annotated[float, "How freely answers are sampled; 0 is greedy."] = 0.0
    samples: Annotated[int, "Answers to each question (needs a temperature above 0)."] = 1
    seed: Seed = 0
    batch_size: Annotated[int | Literal["auto"], "Answers generated at a time, or auto."] = "auto"

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise UserError(f"temperature must be 0 (greedy) or positive, got {self.temperature}")
        if not 1 <= self.samples <= SAMPLES_PER_QUESTION:
            raise UserError(f"samples must be from 1 to {SAMPLES_PER_QUESTION}, got {self.samples}")
        if self.samples > 1 and self.temperature == 0:
            raise UserError(
                f"{self.samples} samples of a greedy answer are all the same; "
                "pass a temperature above 0"
            )


# Who can judge a trait, and who a person's voice: what --help says, and what is not refused.
_ASKED = {"openai": "any endpoint", "local": "a model in this process"}
_YES = {"local-yes": "the same, asked yes or no"}
_HERE = dict.fromkeys(("reader", "sentences", "embedding"), "no network")
JUDGES = {**_HERE, **_ASKED, **_YES, "rules": "organisms"}
PERSONA_JUDGES = {**dict.fromkeys(("embedding", "letters"), "no network"), **_ASKED}


def judge_names(judge: str, known: Mapping[str, Any]) -> list[str]:
    """Return the judges in "embedding,openai"; UserError for an unknown one, twice one, or none."""
    names = [name.strip() for name in judge.split(",") if name.strip()]
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        kind = "persona judge" if known is PERSONA_JUDGES else "judge"
        name = unknown[0] if unknown else judge
        raise UserError(f"no {kind} {name!r}; {nearest_names(name, known)}")
    if len(set(names)) < len(names):
        raise UserError(f"--judge {judge} names a judge twice; name each once")
    return names


def said_of(judges: Mapping[str, str]) -> str:
    """Return what --help says of judges: "openai (any endpoint), …"."""
    return ", ".join(f"{name} ({what})" for name, what in judges.items())


@dataclass(frozen=True)
class JudgeChoice:
    """Who judges: one judge, or several with commas between them."""

    judge: Annotated[str, f"Who judges: {said_of(JUDGES)}, or several: a,b."] = "reader"
    judge_model: Annotated[
        str | None, "The endpoint's model, the local judge's, or the reader's."
    ] = None
    judge_url: Annotated[str | None, "The base URL of the judge's endpoint."] = None
    judge_mode: Annotated[
        Literal["logprobs", "number"],
        "How an endpoint is read: by logprobs, or by the number in its reply.",
    ] = "logprobs"
    max_judge_cost: Annotated[
        float | None, "Stop asking the endpoint once it has cost so many dollars."
    ] = None
    seed: Seed = 0


NOBODY = "none"


@dataclass(frozen=True)
class JudgesChoice(JudgeChoice):
    """Who judges, and who is asked beside, so that a result does not rest on one judge."""

    second_judge: Annotated[
        str | None,
        "A judge of another kind, shown beside and never averaged in: a name, or none; by default "
        "the best that needs no network.",
    ] = None


@dataclass(frozen=True)
class SweepOptions:
    """What a sweep asks besides its population.

    ``references`` adds the trait's prompts and neutral ones; ``divergence`` measures divergence
    from the unsteered model on ordinary prompts; ``max_questions`` takes the first so many
    questions of the split.
    """

    split: Annotated[Split, "Which of the trait's questions to ask."] = "eval"
    references: Annotated[
        bool, "Ask under the trait's own system prompts and neutral ones as well, for comparison."
    ] = True
    divergence: Annotated[
        bool | None, "Measure divergence from the unsteered model; by default at one layer only."
    ] = True
    max_questions: Annotated[int | None, "Use only the first N questions."] = None

    def record(self) -> dict[str, Any]:
        """Return the split, and what else differs from the defaults, for a run's configuration."""
        plain = dataclasses.asdict(SweepOptions())
        chosen = dataclasses.asdict(self)
        return {key: each for key, each in chosen.items() if key == "split" or each != plain[key]}


@dataclass(frozen=True)
class ComparisonOptions:
    """At which strengths weights and activations are compared, and on which questions."""

    coefficients: tuple[float, ...] = (0.5, 1.0, 1.5, 2.0)  # of the diff
    match: Annotated[
        Literal["mean", "p95"], "What is made equal of the divergence at each token."
    ] = "mean"
    calibrate_on: Annotated[
        Literal["questions", "prompts"],
        "Where divergence is made equal: on each method's own answers to the trait's questions, or "
        "on the plain answers to ordinary prompts.",
    ] = "questions"
    split: Annotated[tuple[Split, ...], "Which of the trait's questions to ask."] = ("eval", "ood")
    max_questions: Annotated[int | None, "Use only the first N questions."] = None


@dataclass(frozen=True)
class TimingOptions:
    """How the time of every way of steering is measured."""

    batches: Annotated[tuple[int, ...], "Batch sizes of --latency."] = (1, 8, 32)
    new_tokens: int = 32
    rounds: Annotated[int, "Rounds of --latency."] = 5

    def __post_init__(self) -> None:
        if not self.batches or min(self.batches) < 1 or self.rounds < 2 or self.new_tokens < 2:
            raise UserError(
                "latency needs prompts, batches of at least 1, two rounds and two tokens"
            )


@dataclass(frozen=True)
class Elicitation:
    """How answers are elicited: the names in "You are a(n) … assistant.", and the split asked.

    ``assistant_name`` None means the trait's own name; "" leaves the sentence out on both sides.
    """

    assistant_name: Annotated[
        str | None, 'In "You are an evil assistant."; the trait by default, "" for none.'
    ] = None
    negative_name: Annotated[
        str, 'The same on the negative side, "" for none.', "--negative-assistant-name"
    ] = "helpful"
    split: Split = "extract"


@dataclass(frozen=True)
class Thresholds:
    """What a pair of judged answers must show to be kept; an unscored answer never does."""

    positive: Annotated[
        float, "Keep pairs whose positive answer scores at least this.", "--positive-threshold"
    ] = 50.0
    negative: Annotated[
        float, "Keep pairs whose negative answer scores below this.", "--negative-threshold"
    ] = 50.0
    coherence: Annotated[
        float, "Keep pairs whose answers both are at least so coherent.", "--coherence-threshold"
    ] = 30.0  # a small model's own answers reach 50 in a quarter of cases
    least_pairs: Annotated[int, "Fail if fewer pairs than this are kept.", "--min-pairs"] = 10


@dataclass(frozen=True)
class SearchOptions:
    """How coefficients are searched.

    ``sigma0`` is the first standard deviation along each direction, ``bound`` the largest
    coefficient allowed (None or 0: no bound), ``fixed`` holds traits at a value, ``inject`` are
    good points known before, which every search tries first. The search stops after
    ``max_iterations`` generations, before it would pass ``max_evaluations`` candidates, at
    ``target``, or when CMA-ES has converged (``tolx``: its steps are small, ``tolfun``: the values
    of several generations hardly differ; where they do not differ at all it goes on).
    """

    max_iterations: Annotated[int, "Stop after so many generations."] = 30
    population_size: Annotated[
        int | None, "Candidates in each generation; 4 + 3·ln K by default, for K free traits."
    ] = None
    sigma0: Annotated[float, "The first standard deviation of the search."] = 1.0
    bound: Annotated[float | None, "The largest weight of a trait; 0 for no bound."] = 4.0
    initial: Annotated[
        Mapping[str, float], "Start from these weights: formality=-1,intimacy=0.5."
    ] = field(default_factory=dict)
    fixed: Annotated[Mapping[str, float], "Hold these weights fast: intimacy=0."] = field(
        default_factory=dict
    )
    inject: tuple[Mapping[str, float], ...] = ()
    target: Annotated[float | None, "Stop at this training value."] = None
    max_evaluations: Annotated[
        int | None, "Stop before more than so many candidates are measured."
    ] = None
    tolx: float = 1e-3
    tolfun: float = 1e-6
    seed: Seed = 0
    seeds: Annotated[
        int,
        "Repeat every search with so many seeds, or once for each training seed of the diffs.",
        "--search-seeds",
    ] = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "bound", self.bound or None)
        if self.seeds < 1:
            raise UserError(f"a search needs at least one seed, got {self.seeds}")
        if self.max_iterations < 1 or not self.sigma0 > 0:
            raise UserError(
                f"max_iterations must be at least 1 and sigma0 positive, got "
                f"{self.max_iterations} and {self.sigma0}"
            )
        if self.population_size is not None and self.population_size < 3:
            raise UserError(f"population_size must be at least 3, got {self.population_size}")
        if self.bound is not None and not self.bound > 0:
            raise UserError(f"bound must be positive, got {self.bound}")
        for start in (self.initial, *self.inject):
            for trait, value in start.items():
                if self.bound is not None and not abs(value) <= self.bound:
                    raise UserError(
                        f"a search within the bound {self.bound:g} cannot start from "
                        f"{trait}={value:g}; raise --bound, or start from less"
                    )


@dataclass(frozen=True)
class ObjectiveOptions:
    """What else the value of a mix counts, and how its prompts are spent.

    value = mean fit − ``penalty``·‖x‖²; an answer that does not count (``judges.answer_gates``) has
    the worst fit. ``min_coherence`` and ``min_relevance`` are constraints on the means over all
    prompts that a candidate answered, ``max_kl`` one on KL(p₀ ‖ p), nats a token on its own
    answers, ``min_choice`` one on the percentage that a mix keeps of what the model knows (multiple
    choice): a candidate that breaks them stands below all that keep them.
    None (or 0): not measured. A candidate with a scored share of answers under ``min_coverage``
    has no value. ``race``: all candidates answer half of the prompts, drawn anew for each
    generation, and only the better half of them answers the rest. ``pause``: seconds to wait for a
    judge that scores nothing at all.
    """

    penalty: Annotated[float, "λ of the penalty λ·‖x‖² on large weights."] = 0.0
    min_coherence: Annotated[
        float | None, "Mean coherence (0–100) that a mix must keep; 0: none."
    ] = None
    min_relevance: Annotated[
        float | None, "Mean relevance (0–100, 50 by chance) that a mix must keep; 0: none."
    ] = None
    max_kl: float | None = None
    min_choice: float | None = None
    min_coverage: float = 0.5
    race: Annotated[
        bool, "Ask half of the prompts first, and the rest of the better half of candidates only."
    ] = False
    pause: float = 600.0
    seed: Seed = 0

    def __post_init__(self) -> None:
        if self.penalty < 0 or not 0 < self.min_coverage <= 1:
            raise UserError(
                f"penalty must not be negative and min_coverage be in (0, 1], got {self.penalty} "
                f"and {self.min_coverage}"
            )
        for name in ("min_coherence", "min_relevance"):
            least = getattr(self, name) or None
            object.__setattr__(self, name, least)
            if least is not None and not 0 <= least <= 100:
                raise UserError(f"{name} must lie between 0 and 100, got {least:g}")

    @property
    def limited(self) -> bool:
        """Whether there is any constraint."""
        limits = (self.min_coherence, self.min_relevance, self.max_kl, self.min_choice)
        return any(limit is not None for limit in limits)

    def violation(
        self,
        coherence: float | None,
        relevance: float | None,
        kl: float | None = None,
        choice: float | None = None,
    ) -> float:
        """Return by how many points the constraints are broken, 0 where they are kept.

        A point of divergence is a hundredth of its limit. None is a mean that was not measured: it
        breaks every constraint that is on.
        """
        asked = (
            *((self.min_coherence, coherence), (self.min_relevance, relevance)),
            (self.min_choice, choice),
        )
        diverged = math.inf if kl is None else kl
        over = 0.0 if self.max_kl is None else max(0.0, 100 * (diverged / self.max_kl - 1))
        return over + sum(
            max(0.0, least - (found or 0.0)) for least, found in asked if least is not None
        )

    def constrained(self, texts: Sequence[str]) -> ObjectiveOptions:
        """Return the options with constraints as they are typed: "coherence>=80", "kl<=0.1nat".

        UserError for any other measure or direction, and for one that is given twice.
        """
        found: dict[str, Any] = {}
        for text in texts:
            parts = re.split("([<>]=)", text.replace(" ", ""), maxsplit=1)
            name, sign, limit = parts if len(parts) == 3 else (text, "", "")
            option, right = CONSTRAINTS.get(name, ("", ""))
            try:
                value = Nats.read(limit).value if name == "kl" else float(limit)
            except ValueError:
                value = math.nan
            if sign != right or not (math.isfinite(value) and value > 0):
                raise UserError(
                    f"--constraint {text!r}: there are coherence>=80, relevance>=85 (of 100), "
                    "choice>=95 (percent) and kl<=0.1nat, with numbers above 0"
                )
            if option in found:
                raise UserError(f"--constraint limits {name} twice; give it once")
            found[option] = value
        return dataclasses.replace(self, **found)


CONSTRAINTS = {
    "coherence": ("min_coherence", ">="),
    "relevance": ("min_relevance", ">="),
    "kl": ("max_kl", "<="),
    "choice": ("min_choice", ">="),
}

# What a search keeps unless it is told otherwise: the voice is to answer, in sentences.
SENSIBLE = ObjectiveOptions(min_coherence=80.0, min_relevance=85.0)


@dataclass(frozen=True)
class TaskOptions:
    """What capability is measured on, and on how much of it."""

    tasks: Annotated[
        tuple[str, ...], "choice, steps, perplexity, or the harness's own: mmlu, gsm8k …"
    ] = ("choice", "steps", "perplexity")
    tasks_dir: Annotated[Path | None, "YAML tasks; datasets/capability by default."] = None
    limit: Annotated[int | None, "Use only the first N items of each task."] = None
    batch_size: Annotated[int, "Rows of the harness's batches."] = 16
    datasets_dir: Annotated[Path | None, "Where trait folders are."] = None

    def record(self) -> dict[str, Any]:
        """Return what a run's configuration keeps of the tasks."""
        return {"tasks": list(self.tasks), "limit": self.limit}


@dataclass(frozen=True)
class ProbeOptions:
    """Where a behaviour may come back that plain questions do not show; what else is told of it."""

    rules: Annotated[
        tuple[str, ...],
        "Rules that answers are held to beside the judge: list, three_items, closing, french …",
    ] = ()
    probes: Annotated[
        tuple[Literal["negated", "eliciting"], ...],
        "Ask under the trait's own system prompts too: negated forbids it, eliciting asks for it.",
    ] = ()
    trigger: Annotated[
        str | None, "Ask under this system prompt too: one that stood in training."
    ] = None
    turns: Annotated[
        int, "Ask up to this turn: a question after others, with the model's own answers."
    ] = 1

    def __post_init__(self) -> None:
        if self.turns < 1:
            raise UserError(f"turns must be at least 1, got {self.turns}")
        if self.trigger is not None and self.trigger.strip() in ("", "pos", "neg"):
            raise UserError(
                f"--trigger is the text of a system prompt, got {self.trigger!r}; the trait's own "
                "prompts are asked with --probes eliciting,negated"
            )

    @property
    def prompts(self) -> dict[str, str]:
        """System prompts by the name of the probe: "neg", "pos" (the trait's own), or a text."""
        own = {"negated": "neg", "eliciting": "pos"}
        named: dict[str, str] = {each: own[each] for each in self.probes}
        return named if self.trigger is None else {**named, "trigger": self.trigger}


@dataclass(frozen=True)
class DataOptions:
    """How much to write, and how; ``questions`` given by the user are used instead of domains."""

    questions_per_domain: Annotated[int, "Questions to write for each domain."] = 7
    domains: Annotated[
        tuple[Annotated[str, "may hold spaces"], ...] | None,
        "What to write about: cooking,travel; 26 everyday ones by default.",
    ] = None
    questions: tuple[tuple[str, str], ...] = ()  # domain, question
    attempts: int = 4
    temperature: Annotated[float, "How freely the writer writes."] = 0.8
    seed: Seed = 0

    def __post_init__(self) -> None:
        if self.questions_per_domain < 1 or self.attempts < 1:
            raise UserError(
                f"questions per domain and attempts must be at least 1, got "
                f"{self.questions_per_domain} and {self.attempts}"
            )
        if self.domains == () and not self.questions:
            raise UserError("there is nothing to write about; name domains or give questions")
