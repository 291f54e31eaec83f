"""Which judge an experiment uses, and what it needs of the unsteered model.

Judges do not know models and models do not know judges; here the two meet.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

from persona_lora.core import progress
from persona_lora.core.chat import COHERENCE, Exchange, user_question
from persona_lora.core.content import digest_of
from persona_lora.core.errors import UserError, nearest_names
from persona_lora.core.options import NOBODY, JudgeChoice, judge_names
from persona_lora.core.traits import (
    ON_POLICY,
    Trait,
    has_labels,
    list_traits,
    load_labelled_answers,
    load_pairs,
    load_trait,
)
from persona_lora.judges.answer_states import Reader
from persona_lora.judges.budget import Budget
from persona_lora.judges.cache import VerdictCache, cache_key
from persona_lora.judges.coherence import CoherenceScorer, MeanLogprob
from persona_lora.judges.embedding import (
    CALIBRATION_PAIRS,
    EmbeddingJudge,
    check_enough_pairs,
    exchanges_of,
    sampled,
)
from persona_lora.judges.judge_prompts import PromptJudge, PromptReader, yes_template
from persona_lora.judges.judging import Judge, MultiJudge
from persona_lora.judges.labels import has_ratings, load_ratings
from persona_lora.judges.local import KeptReader, LocalReader, YesReader
from persona_lora.judges.openai import Endpoint, EndpointReader, Limits, budget_of, endpoint_of
from persona_lora.judges.probe_judge import ProbeJudge, ReaderEvidence, SentenceEvidence
from persona_lora.judges.rules import RuleJudge, check_rules
from persona_lora.judges.verdicts import Judges
from persona_lora.models.embeddings import SentenceEmbedder, embedder_content
from persona_lora.models.likelihood import mean_logprobs, next_token_logprobs
from persona_lora.models.loaded_model import weights_content
from persona_lora.models.loading import ChatModel, load_chat_model, named_content

logger = logging.getLogger(__name__)

LOCAL = ("local", "local-yes")
PROMPTED = ("openai", *LOCAL)  # chat models that are asked about an answer
TRAIN = "train.jsonl"
SENSE_OF = "hallucination"  # the most rated trait of those on which the reader is fit
BESIDE = ("reader", "sentences", "embedding")  # of no network, the best first


@dataclass(frozen=True)
class JudgeOptions(JudgeChoice):
    """What the user says about judging, and where it is done.

    ``second_judge`` is asked beside the judge: a name, "none", or None for the best of another kind
    that needs no network.
    ``environ`` holds OPENAI_API_KEY, OPENAI_BASE_URL and JUDGE_MODEL.
    """

    second_judge: str | None = NOBODY
    limits: Limits = dataclasses.field(default_factory=Limits)
    cache: Path | None = None
    environ: Mapping[str, str] = dataclasses.field(default_factory=dict, repr=False)

    @cached_property
    def _endpoint(self) -> Endpoint:
        """The judge's endpoint: what is given here, then what ``environ`` names."""
        found = endpoint_of(self.environ)
        return {
            "model": self.judge_model or found["model"],
            "base_url": self.judge_url or found["base_url"],
            "api_key": found["api_key"],
        }

    def named_model(self, judges: str) -> str | None:
        """Return the model that is named for judges: here, or by ``environ`` for an endpoint."""
        return self.judge_model or (self.environ.get("JUDGE_MODEL") if "openai" in judges else None)

    @cached_property
    def budget(self) -> Budget:
        """The one account of all judges that are made with these options."""
        limits = dataclasses.replace(self.limits, max_cost=self.max_judge_cost)
        return budget_of(limits, self._endpoint["model"])

    @cached_property
    def _other(self) -> dict[str, ChatModel]:
        return {}

    def local_model(self, reference: ChatModel) -> ChatModel:
        """Return the model that judges in this process, loaded once for all judges made here."""
        name = self.judge_model
        if name is None or name == reference.name:
            return reference
        if name not in self._other:
            self._other[name] = local_judge_model(name, reference)
        return self._other[name]

    def reader(self, highest: int = 100) -> EndpointReader:
        """Return what reads numbers from 0 to ``highest`` at the endpoint."""
        return EndpointReader(
            **self._endpoint,
            mode=self.judge_mode,
            limits=self.limits,
            cache=VerdictCache(self.cache),
            budget=self.budget,
            highest=highest,
        )


def make_judge(trait: Trait, reference: ChatModel, options: JudgeOptions) -> Judge:
    """Build the judge that ``options`` name; ``reference`` is the unsteered model.

    Raises UserError for an unknown name, or a judge that cannot work (no key, no embedder).
    """
    names = judge_names(options.judge, JUDGES)
    judges = [JUDGES[name](trait, reference, options) for name in names]
    return judges[0] if len(judges) == 1 else MultiJudge(judges)


def make_judges(trait: Trait, reference: ChatModel, options: JudgeOptions) -> Judges:
    """Return what builds the judge that ``options`` name, and the one beside it where there is one.

    Raises UserError for a second judge that is the first one, or that the trait has no data for.
    """
    second = second_name(trait, options)
    return Judges(
        lambda: make_judge(trait, reference, options),
        None if second is None else lambda: JUDGES[second](trait, reference, options),
    )


def second_name(trait: Trait, options: JudgeOptions) -> str | None:
    """Return who judges beside the judge; None for nobody.

    By default the best judge of another kind that needs no network and has what it needs of the
    trait. Raises UserError for one that is asked for and cannot judge beside the first.
    """
    name = options.second_judge
    if name == NOBODY:
        return None
    # Without rated answers the classifier judges in the reader's place.
    first = [
        "embedding" if each == "reader" and not has_ratings(trait) else each
        for each in judge_names(options.judge, JUDGES)
    ]
    missing = dict.fromkeys(("reader", "sentences"), "" if has_ratings(trait) else ON_POLICY)
    missing["embedding"] = "" if (trait.folder / TRAIN).is_file() else TRAIN
    if name is None and first == ["rules"]:  # nothing is left to another's opinion
        return None
    if name is None:
        fit = (each for each in BESIDE if each not in first and not missing.get(each))
        return next(fit, None)
    if name not in JUDGES:
        raise UserError(f"no judge {name!r} for --second-judge; {nearest_names(name, JUDGES)}")
    if name in first:
        raise UserError(
            f"--second-judge {name} judges {trait.name} already; name one of another kind, or none"
        )
    if missing.get(name):
        raise UserError(
            f"the trait {trait.name} has no {missing[name]}, so {name} cannot judge it beside "
            f"{', '.join(first)}; name another --second-judge, or none"
        )
    both = {*first, name}
    if options.judge_model is not None and "openai" in both and both.intersection(LOCAL):
        raise UserError("--judge-model names one model, and both openai and local would be it")
    return name


def check_judge(trait: Trait, options: JudgeOptions) -> None:
    """Raise UserError now for a judge that could not be made after the answers are generated."""
    if has_labels(trait):
        load_labelled_answers(trait)
    second = second_name(trait, options)
    for name in [*judge_names(options.judge, JUDGES), *([] if second is None else [second])]:
        if name == "sentences" and not has_ratings(trait):
            raise UserError(
                f"the trait {trait.name} has no {ON_POLICY}, and --judge sentences is fitted to "
                "rated answers; rate some (persona-lora judge rate, then fit) or take another judge"
            )
        if name == "rules":
            check_rules([trait.name])
            _natural_answers(None)
        if name in ("reader", "sentences") and has_ratings(trait):
            load_ratings(trait)
        elif name in ("reader", "embedding"):
            check_enough_pairs(len(load_pairs(trait)))
        if name == "reader" and not has_ratings(trait) and _reader_name(options) is not None:
            raise UserError(
                f"the trait {trait.name} has no {ON_POLICY}, so no reader can be fitted to it; "
                "leave --judge-model out, and the embedding classifier judges"
            )
        if name == "openai":  # cheap to make, and needs a key
            options.reader()


def judge_inputs(options: JudgeOptions) -> dict[str, str]:
    """Return digests of what judges beside the trait's own answers: endpoint, model, manner.

    UserError for a local judge's model that there is not.
    """
    beside = options.second_judge

    def told(judges: str) -> dict[str, str | None]:
        how = {"model": options.named_model(judges), "mode": options.judge_mode}
        place = options.judge_url or options.environ.get("OPENAI_BASE_URL")
        return {**how, "endpoint": place} if "openai" in judges else how

    read = {"the judge": digest_of({"judges": options.judge, **told(options.judge)})}
    if beside != NOBODY:  # of a name that is left open, what it may stand for
        how = told(beside) if beside in PROMPTED else {}
        read["the second judge"] = digest_of({"judge": beside or BESIDE, **how})
    embedded = ("reader", "sentences", "embedding")
    if any(name in options.judge for name in embedded) or beside in (None, *embedded):
        read["the sentence embedder"] = embedder_content()
    local = not {*judge_names(options.judge, JUDGES), beside}.isdisjoint(LOCAL)
    if options.judge_model is not None and (local or _reader_name(options)):
        read["the judge's model"] = named_content(options.judge_model)
    return read


def _reader_judge(trait: Trait, reference: ChatModel, options: JudgeOptions) -> Judge:
    if not has_ratings(trait):
        logger.warning(
            "the trait %s has no %s: no judge of it was ever held against a model's own answers; "
            "the embedding classifier judges instead",
            trait.name,
            ON_POLICY,
        )
        return JUDGES["embedding"](trait, reference, options)
    model = reading_model(_reader_name(options), reference)
    return ProbeJudge.of(ReaderEvidence(Reader(model, trait)))


def _reader_name(options: JudgeOptions) -> str | None:
    """Return the reader that is asked for; beside a prompted judge the model is that one's."""
    alone = judge_names(options.judge, JUDGES) == ["reader"]
    return options.judge_model if alone and options.second_judge not in PROMPTED else None


def reading_model(name: str | None, reference: ChatModel) -> ChatModel:
    """Return the model that reads answers: the packaged one in fp32, or another by its name.

    It is a model of its own, so that nothing that steers the asked one reaches it; only where its
    very name is asked for it is that one, without its adapter.
    """
    if name is None:
        return _packaged_reader(reference.options.device_map)
    return local_judge_model(name, reference)


@cache
def _packaged_reader(device_map: str | None) -> ChatModel:
    return load_chat_model(dtype="float32", device_map=device_map)


def likelihood_under(reference: ChatModel) -> MeanLogprob:
    """Return what coherence asks: the base model, also where an adapter is being evaluated."""

    def mean_logprob(exchanges: Sequence[Exchange]) -> list[float]:
        with reference.base(), progress.stage("coherence"):
            return mean_logprobs(reference, exchanges)

    return mean_logprob


def coherence_scorer(reference: ChatModel, datasets: Path | None = None) -> CoherenceScorer:
    """Return a scorer of coherence by a few training answers of every trait, so of none's manner.

    UserError where no trait has training answers.
    """
    natural, likelihood = _natural_answers(datasets), likelihood_under(reference)
    return CoherenceScorer.fit(natural, mean_logprob=likelihood, judge_name=COHERENCE, seed=0)


def _natural_answers(datasets: Path | None) -> list[Exchange]:
    traits = [load_trait(name, datasets) for name in list_traits(datasets)]
    held = [load_pairs(each) for each in traits if (each.folder / TRAIN).is_file()]
    if not held:
        raise UserError(
            f"no trait has a {TRAIN}, whose answers say what coherence is; give --datasets-dir"
        )
    count = math.ceil(CALIBRATION_PAIRS / len(held))
    return [each for pairs in held for each in sampled(*exchanges_of(pairs), count, seed=0)]


def sense_judge(reference: ChatModel) -> Judge:
    """Return a judge of coherence for answers of any manner: the reader, with the packaged ratings.

    Whether an answer makes sense is learnt from the ratings of all traits, so one trait's does.
    """
    return _reader_judge(load_trait(SENSE_OF), reference, JudgeOptions())


def _embedding_judge(trait: Trait, reference: ChatModel, options: JudgeOptions) -> Judge:
    with progress.stage("fitting the judge"):
        progress.report(0, 1)
        judge = EmbeddingJudge.fit(
            trait,
            embedder=SentenceEmbedder(),
            mean_logprob=likelihood_under(reference),
            seed=options.seed,
        )
        progress.report(1, 1)
    return judge


def local_judge_model(name: str | None, reference: ChatModel) -> ChatModel:
    """Return the model that judges in this process: the one that is asked, or another by name."""
    if name is None or name == reference.name:
        return reference
    return load_chat_model(name, options=reference.options.elsewhere())


def local_reader(options: JudgeOptions, reference: ChatModel, highest: int = 100) -> LocalReader:
    """Return what reads numbers from 0 to ``highest`` by a model that may be the one that is asked.

    It judges without its adapter, and never while another thread steers it.
    """
    model = options.local_model(reference)

    def likely(replies: Sequence[tuple[str, str]]) -> list[Mapping[str, float]]:
        with model.base():
            return next_token_logprobs(model, replies)

    def first(prompts: Sequence[str]) -> list[Mapping[str, float]]:
        return likely([(prompt, "") for prompt in prompts])

    return LocalReader(f"local:{model.name}", first, likely, highest)


def _local_judge(trait: Trait, reference: ChatModel, options: JudgeOptions) -> Judge:
    return PromptJudge(trait, _kept(local_reader(options, reference), reference, options))


def _yes_judge(trait: Trait, reference: ChatModel, options: JudgeOptions) -> Judge:
    asked = local_reader(options, reference)
    name = asked.name.replace("local:", "local-yes:", 1)
    reader = YesReader(name, asked.next_token_logprobs)
    return PromptJudge(trait, _kept(reader, reference, options), yes_template)


def _kept(reader: PromptReader, reference: ChatModel, options: JudgeOptions) -> KeptReader:
    """Return a local reader that asks its model nothing twice, over runs."""
    model = options.local_model(reference)
    with model.base():
        content = weights_content(model.model)

    def asked(prompt: str) -> str:
        told = model.render(user_question(prompt))
        return cache_key(base_url="", model=content, mode=reader.name, prompt=told, sampling={})

    return KeptReader(reader, VerdictCache(options.cache), asked)


JUDGES: dict[str, Callable[[Trait, ChatModel, JudgeOptions], Judge]] = {
    "reader": _reader_judge,
    "sentences": lambda trait, reference, options: ProbeJudge.of(SentenceEvidence(trait)),
    "embedding": _embedding_judge,
    "openai": lambda trait, reference, options: PromptJudge(trait, options.reader()),
    "local": _local_judge,
    "local-yes": _yes_judge,
    "rules": lambda trait, reference, options: RuleJudge(coherence_scorer(reference)),
}
