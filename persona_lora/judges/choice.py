"""Which judge an experiment uses, and what it needs of the unsteered model.

Judges do not know models and models do not know judges; here the two meet.
"""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from peft import PeftModel

from persona_lora.core import progress
from persona_lora.core.chat import COHERENCE, Exchange, Verdict
from persona_lora.core.content import digest_of
from persona_lora.core.errors import UserError, nearest_names
from persona_lora.core.options import JudgeChoice
from persona_lora.core.runs import Run
from persona_lora.core.traits import ON_POLICY, Trait, has_labels, load_labelled_answers, load_pairs
from persona_lora.judges.budget import Budget
from persona_lora.judges.cache import VerdictCache
from persona_lora.judges.canaries import show_canaries
from persona_lora.judges.embedding import EmbeddingJudge
from persona_lora.judges.fitness import JudgeValidation, validate_judge
from persona_lora.judges.judging import Judge, MultiJudge
from persona_lora.judges.labels import has_ratings, load_ratings
from persona_lora.judges.local import LocalJudge
from persona_lora.judges.openai import (
    Endpoint,
    EndpointReader,
    Limits,
    OpenAIJudge,
    budget_of,
    endpoint_of,
)
from persona_lora.judges.probe_judge import ReaderJudge
from persona_lora.models.embeddings import SentenceEmbedder, embedder_content
from persona_lora.models.likelihood import mean_logprobs, next_token_logprobs
from persona_lora.models.loading import ChatModel, load_chat_model, named_content

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class JudgeOptions(JudgeChoice):
    """What the user says about judging, and where it is done.

    ``environ`` holds OPENAI_API_KEY, OPENAI_BASE_URL and JUDGE_MODEL.
    """

    limits: Limits = dataclasses.field(default_factory=Limits)
    cache: Path | None = None
    environ: Mapping[str, str] = dataclasses.field(default_factory=dict, repr=False)

    @cached_property
    def endpoint(self) -> Endpoint:
        """The judge's endpoint: what is given here, then what ``environ`` names."""
        found = endpoint_of(self.environ)
        return {
            "model": self.judge_model or found["model"],
            "base_url": self.judge_url or found["base_url"],
            "api_key": found["api_key"],
        }

    @cached_property
    def budget(self) -> Budget:
        """The one account of all judges that are made with these options."""
        return budget_of(
            dataclasses.replace(self.limits, max_cost=self.max_judge_cost), self.endpoint["model"]
        )


def make_judge(trait: Trait, reference: ChatModel, options: JudgeOptions) -> Judge:
    """Build the judge that ``options`` name; ``reference`` is the unsteered model.

    Raises UserError for an unknown name, or a judge that cannot work (no key, no embedder).
    """
    names = _judge_names(options)
    judges = [JUDGES[name](trait, reference, options) for name in names]
    return judges[0] if len(judges) == 1 else MultiJudge(judges)


def lazily(make: Callable[[], Judge]) -> Callable[[], Judge]:
    """Return a factory that builds its judge at the first call and keeps it."""
    kept: list[Judge] = []

    def judge() -> Judge:
        if not kept:
            kept.append(make())
        return kept[0]

    return judge


def check_judge(trait: Trait, reference: ChatModel, options: JudgeOptions) -> None:
    """Raise UserError now for a judge that could not be made after the answers are generated."""
    if has_labels(trait):
        load_labelled_answers(trait)
    for name in _judge_names(options):
        if name == "reader" and has_ratings(trait):
            load_ratings(trait)
        elif name in ("reader", "embedding"):
            load_pairs(trait)
            if _reader_name(options) is not None:
                raise UserError(
                    f"the trait {trait.name} has no {ON_POLICY}, so no reader can be fitted to it; "
                    "leave --judge-model out, and the embedding classifier judges"
                )
        if name == "openai":  # cheap to make, and needs a key
            _openai_judge(trait, reference, options)


def judge_inputs(options: JudgeOptions) -> dict[str, str]:
    """Return digests of what judges beside the trait's own answers: endpoint, model, manner.

    UserError for a local judge's model that there is not.
    """
    environ = options.environ
    asked = {
        "judges": options.judge,
        "model": options.judge_model or environ.get("JUDGE_MODEL"),
        "mode": options.judge_mode,
    }
    if "openai" in options.judge:
        asked["endpoint"] = options.judge_url or environ.get("OPENAI_BASE_URL")
    read = {"the judge": digest_of(asked)}
    if "embedding" in options.judge:
        read["the sentence embedder"] = embedder_content()
    if options.judge_model is not None and ("local" in options.judge or _reader_name(options)):
        read["the judge's model"] = named_content(options.judge_model)
    return read


def _judge_names(options: JudgeOptions) -> list[str]:
    names = [name.strip() for name in options.judge.split(",") if name.strip()]
    unknown = [name for name in names if name not in JUDGES]
    if unknown or not names:
        name = unknown[0] if unknown else options.judge
        raise UserError(f"no judge {name!r}; {nearest_names(name, JUDGES)}")
    return names


def _reader_judge(trait: Trait, reference: ChatModel, options: JudgeOptions) -> Judge:
    if not has_ratings(trait):
        logger.warning(
            "the trait %s has no %s: no judge of it was ever held against a model's own answers; "
            "the embedding classifier judges instead",
            trait.name,
            ON_POLICY,
        )
        return JUDGES["embedding"](trait, reference, options)
    return ReaderJudge.of(trait, reading_model(_reader_name(options), reference))


def _reader_name(options: JudgeOptions) -> str | None:
    """Return the reader that is asked for; beside another judge the model named is that one's."""
    return options.judge_model if _judge_names(options) == ["reader"] else None


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


def _embedding_judge(trait: Trait, reference: ChatModel, options: JudgeOptions) -> Judge:
    def mean_logprob(exchanges: Sequence[Exchange]) -> list[float]:
        model = reference.model
        # Coherence asks the base model, also where an adapter is being evaluated.
        base = model.disable_adapter() if isinstance(model, PeftModel) else nullcontext()
        with base, progress.stage("coherence"):
            return mean_logprobs(reference, exchanges)

    with progress.stage("fitting the judge"):
        progress.report(0, 1)
        judge = EmbeddingJudge.fit(
            trait, embedder=SentenceEmbedder(), mean_logprob=mean_logprob, seed=options.seed
        )
        progress.report(1, 1)
    return judge


def _openai_judge(trait: Trait, reference: ChatModel, options: JudgeOptions) -> Judge:
    reader = EndpointReader(
        **options.endpoint,
        mode=options.judge_mode,
        limits=options.limits,
        budget=options.budget,
        cache=VerdictCache(options.cache),
    )
    return OpenAIJudge(trait, reader)


def local_judge_model(name: str | None, reference: ChatModel) -> ChatModel:
    """Return the model that judges in this process: the one that is asked, or another by name."""
    if name is None or name == reference.name:
        return reference
    return load_chat_model(name, options=reference.options.elsewhere())


def _local_judge(trait: Trait, reference: ChatModel, options: JudgeOptions) -> Judge:
    name = options.judge_model
    judge_model = local_judge_model(name, reference)
    return LocalJudge(
        trait,
        f"local:{judge_model.name}",
        lambda prompts: next_token_logprobs(judge_model, [(prompt, "") for prompt in prompts]),
        continuation_logprobs=lambda replies: next_token_logprobs(judge_model, replies),
    )


JUDGES: dict[str, Callable[[Trait, ChatModel, JudgeOptions], Judge]] = {
    "reader": _reader_judge,
    "embedding": _embedding_judge,
    "openai": _openai_judge,
    "local": _local_judge,
}


def judge_answers(run: Run, make: Callable[[], Judge], trait: Trait) -> None:
    """Judge the answers of a run on the trait and on coherence; write verdicts and validation.

    What an earlier call has judged is kept; a row whose verdict is missing or unscored is judged
    again. ``make`` builds the judge, and is called only where something is left to judge. UserError
    where no answer at all has a score.
    """
    answers = sorted(run.read("answers"), key=lambda row: int(row["row"]))
    kept = {
        (row["row"], row["criterion"]): row
        for row in run.read("verdicts")
        if row["score"] is not None
    }
    criteria = (trait.name, COHERENCE)
    if run.read("validation") and len(kept) == len(criteria) * len(answers):
        return
    judge = make()
    validations = validations_of(judge, trait)
    unfit = {each.criterion for each in validations if each.fit is False}
    for criterion in progress.over("judging", criteria):
        missing = [row for row in answers if (row["row"], criterion) not in kept]
        exchanges = [Exchange(row["question"], row["answer"]) for row in missing]
        verdicts = judge.judge(exchanges, criterion) if exchanges else []
        for row, verdict in zip(missing, verdicts, strict=True):
            said = (
                f"{verdict.judge} (unfit for {criterion})" if criterion in unfit else verdict.judge
            )
            kept[row["row"], criterion] = _row(row["row"], dataclasses.replace(verdict, judge=said))
        run.write("verdicts", [kept[key] for key in sorted(kept)])
        _refuse_nothing_scored(judge.name, criterion, list(kept.values()))
    run.write("canaries", [dataclasses.asdict(each) for each in show_canaries(judge, trait)])
    run.write("validation", [dataclasses.asdict(each) for each in validations])


def validations_of(judge: Judge, trait: Trait) -> list[JudgeValidation]:
    """Return how well a judge agrees with labelled answers that it was not fitted on."""
    if isinstance(judge, (EmbeddingJudge, ReaderJudge)):
        return list(judge.validation)
    return [validate_judge(judge, trait)]


def _refuse_nothing_scored(judge: str, criterion: str, rows: Sequence[dict[str, Any]]) -> None:
    asked = [row for row in rows if row["criterion"] == criterion]
    if not asked or any(row["score"] is not None for row in asked):
        return
    reasons = Counter(row["reason"] for row in asked)
    common = "; ".join(f"{reason} ({count})" for reason, count in reasons.most_common(3))
    raise UserError(
        f"{judge} scored none of {len(asked)} answers on {criterion}: {common}; the answers are "
        "kept, and the same command judges them again"
    )


def _row(row: int, verdict: Verdict) -> dict[str, Any]:
    return {"row": row, **dataclasses.asdict(verdict)}
