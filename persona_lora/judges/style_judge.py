"""The embedded persona judge: does this text sound like that person? No network, no steered model.

A text becomes a vector: of style features (lengths, marks, pronouns, tone: ``features``) beside its
sentence embedding, or of the letters in it; one multinomial regression tells all persons apart. A
person's logit in it is put on a scale of 1–5 that the utterances themselves anchor: 4.5 for the
mean held-out utterance of the person, 1.5 for that of other persons (``FitScale``). Refuses to know
what the answer says or whether it helps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp
from sklearn.feature_extraction.text import HashingVectorizer
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from persona_lora.core.chat import Exchange, Verdict
from persona_lora.core.errors import UserError
from persona_lora.core.personas import ConversationSplit, Persona
from persona_lora.models.embeddings import SentenceEmbedder
from persona_lora.profiles.features import extract_features, words_of
from persona_lora.report.resampling import Array, auc_of

PERSONA_FIT = "persona_fit"
LOWEST, HIGHEST = 1.0, 5.0
FEWEST_UTTERANCES = 10
FOLDS = 3
REST = "the rest"  # persons who say too little, together; no folder has this name
NO_WORDS = "the answer holds no words"
INVERSE_PENALTIES = (0.01, 0.03, 0.1, 0.3, 1.0)
TOLERANCE = 1e-3
LETTER_COLUMNS, LETTER_SCALE = 2048, 10.0
EMBEDDING_SCALE = 4.0  # a unit embedding then varies about as much as the style features together

STYLE_FEATURES = (
    "exclamation_rate",
    "question_rate",
    "lower_case_rate",
    "first_person_singular_rate",
    "first_person_plural_rate",
    "second_person_rate",
    "hedge_rate",
    "past_rate",
    "advice_rate",
    "empathy_rate",
    "contraction_rate",
    "avg_word_length",
    "formality",
    "sentiment",
    "emotionality",
    "humor_rate",
)


class LetterFeatures:
    """Which runs of one to four letters a text holds: neither words' meaning nor style counts.

    Another family of evidence than ``TextFeatures``, of which a search through those knows nothing.
    Rows are hashed counts of length ``LETTER_SCALE``.
    """

    name = "letters"
    standardised = 0

    def __init__(self) -> None:
        self._hashed = HashingVectorizer(
            analyzer="char_wb", ngram_range=(1, 4), n_features=LETTER_COLUMNS, lowercase=False
        )

    def of(self, texts: Sequence[str]) -> Array:
        """Return ``[len(texts), LETTER_COLUMNS]``."""
        return LETTER_SCALE * self._hashed.transform(texts).toarray().astype(np.float64)


class TextFeatures:
    """Style features and embeddings of texts, computed once for each text."""

    name = "embedding"
    standardised = 1 + len(STYLE_FEATURES)

    def __init__(self, embedder: SentenceEmbedder) -> None:
        self._embedder = embedder
        self._embedded: dict[str, Array] = {}

    def of(self, texts: Sequence[str]) -> Array:
        """Return ``[len(texts), 1 + style + embedding]``: log words, style rates, embedding."""
        style = np.stack([_style(text) for text in texts])
        return np.concatenate([style, EMBEDDING_SCALE * self.embeddings(texts)], axis=1)

    def embeddings(self, texts: Sequence[str]) -> Array:
        """Return the unit sentence embeddings of texts, ``[len(texts), dimension]``."""
        missing = [text for text in dict.fromkeys(texts) if text not in self._embedded]
        if missing:
            embedded = self._embedder.embed(missing).astype(np.float64)
            self._embedded |= dict(zip(missing, embedded, strict=True))
        return np.stack([self._embedded[text] for text in texts])


Features = LetterFeatures | TextFeatures
"""Vectors of texts; the first ``standardised`` columns are put on one scale before a fit."""


@cache
def _style(text: str) -> Array:
    features = extract_features([text])
    rates = [float(getattr(features, name)) for name in STYLE_FEATURES]
    return np.array([math.log(features.avg_words), *rates])


def has_words(text: str) -> bool:
    """Tell whether there is anything in a text to judge its style by."""
    return bool(words_of(text))


@dataclass(frozen=True)
class FitScale:
    """score = 1 + 4·σ((logit − middle) / width); ``own`` and ``others`` are the mean logits.

    They get 4.5 and 1.5. Without this most texts would lie at an end of the scale: persons are
    easily told apart, and a search could not see small steps.
    """

    own: float
    others: float

    def scores(self, logits: Array) -> Array:
        """Return the fit of logits, 1–5."""
        middle = (self.own + self.others) / 2
        width = (self.own - self.others) / (2 * math.log(7))  # σ(log 7) = 0.875: 4.5 of 5
        return LOWEST + (HIGHEST - LOWEST) / (1 + np.exp(-(logits - middle) / width))


@dataclass(frozen=True, eq=False)
class Voices:
    """One regression that tells persons apart by single utterances; all weigh alike in the fit.

    s = W·z + b, a row for each person, with z the features of a text, style parts standardised;
    p = softmax(s). A person's logit is log p/(1 − p): what sounds more like somebody else counts
    against them. ``held_out`` are the logits of the utterances by regressions that did not see
    them; ``log_loss`` is their mean loss, log(number of persons) for a guess.
    """

    persons: tuple[str, ...]
    features: Features
    center: Array
    spread: Array
    weights: Array  # [persons, features]
    bias: Array
    log_loss: float
    texts: tuple[str, ...]
    owners: NDArray[np.int64]  # the row of who says each of the texts
    held_out: Array  # [texts, persons]

    @classmethod
    def fit(cls, said: Mapping[str, Sequence[str]], *, features: Features) -> Voices:
        """Fit to what each person says.

        Persons with fewer than ten utterances are one voice together, or none where these are
        fewer than ten. Raises UserError where there are not two voices.
        """
        voices = _voices(said)
        if len(voices) < 2:
            raise UserError(
                "style judges tell persons apart; they need at least two personas with "
                f"{FEWEST_UTTERANCES} utterances in the split, and there are {len(voices)}"
            )
        texts = tuple(text for own in voices.values() for text in own)
        owners = np.repeat(np.arange(len(voices)), [len(own) for own in voices.values()])
        x = features.of(texts)
        style = features.standardised
        center, spread = np.zeros(x.shape[1]), np.ones(x.shape[1])
        center[:style] = x[:, :style].mean(axis=0)
        spread[:style] = np.maximum(x[:, :style].std(axis=0), 1e-6)
        z = (x - center) / spread
        with threadpool_limits(limits=1, user_api="blas"):
            basis = _row_space(z)
            z = z @ basis.T
            held_out = {each: _held_out_scores(z, owners, each) for each in INVERSE_PENALTIES}
            losses = {each: _balanced_loss(scores, owners) for each, scores in held_out.items()}
            chosen = min(losses, key=lambda each: losses[each])
            weights, bias = _regression(z, owners, chosen)
        return cls(
            tuple(voices),
            features,
            center,
            spread,
            weights @ basis,
            bias,
            losses[chosen],
            texts,
            owners,
            _logits(held_out[chosen]),
        )

    def logits(self, texts: Sequence[str]) -> Array:
        """Return log p/(1 − p) of texts with words in them: ``[len(texts), persons]``."""
        z = (self.features.of(texts) - self.center) / self.spread
        return _logits(z @ self.weights.T + self.bias)

    def judge_of(self, persona_id: str) -> StyleJudge:
        """Return the judge of one person.

        Raises UserError for one with too few utterances, or who cannot be told from the others.
        """
        if persona_id not in self.persons:
            raise UserError(
                f"the style judge of {persona_id} needs at least {FEWEST_UTTERANCES} utterances "
                "of the person in the split; add conversations of theirs"
            )
        row = self.persons.index(persona_id)
        held_out, own = self.held_out[:, row], self.owners == row
        scale = FitScale(float(held_out[own].mean()), float(held_out[~own].mean()))
        if not scale.own > scale.others:
            raise UserError(
                f"the utterances of {persona_id} cannot be told from those of others; there is no "
                "style to fit"
            )
        fitted = dict(zip(self.texts, map(float, held_out), strict=True))
        return StyleJudge(persona_id, self, row, scale, fitted, self.features.name)


@dataclass(frozen=True, eq=False)
class StyleJudge:
    """The fit of texts to one person among ``Voices``; a ``Judge`` of the criterion "persona_fit".

    An utterance that it was fitted on (``fitted``) has the logit of a regression that did not see
    it.
    """

    persona_id: str
    voices: Voices
    row: int
    scale: FitScale
    fitted: Mapping[str, float]
    name: str

    def logits(self, texts: Sequence[str]) -> Array:
        """Return the logits of texts with words in them: ``[len(texts)]``."""
        logits = self.voices.logits(texts)[:, self.row]
        return np.array([self.fitted.get(*each) for each in zip(texts, logits, strict=True)])

    def judge(self, exchanges: Sequence[Exchange], criterion: str = PERSONA_FIT) -> list[Verdict]:
        """Return one verdict of 1–5 per exchange, in order; one without words has no score."""
        if criterion != PERSONA_FIT:
            raise UserError(f"the style judge scores {PERSONA_FIT!r}, not {criterion!r}")
        worded = [each.answer for each in exchanges if has_words(each.answer)]
        scores = iter(self.scale.scores(self.logits(worded)) if worded else ())
        return [
            Verdict(criterion, float(next(scores)), "", self.name)
            if has_words(exchange.answer)
            else Verdict(criterion, None, NO_WORDS, self.name)
            for exchange in exchanges
        ]


class Nearest(NamedTuple):
    """The person that a judge tells from its own worst, and the AUC of the two alone."""

    persona_id: str
    auc: float


@dataclass(frozen=True)
class StyleValidation:
    """How well style judges know persons by utterances of conversations they were not fitted on.

    ``top1``: the share of utterances whose highest logit is their own person's judge;
    ``top1_conversations``: the same for the mean logit over a conversation. ``auc``: for each
    person, the chance that an utterance of theirs gets a higher score than another person's.
    ``nearest``: for each person, whom their judge tells from them worst, and that chance.
    """

    fitted_on: ConversationSplit
    n_utterances: int
    n_conversations: int
    top1: float
    top1_conversations: float
    chance: float
    auc: dict[str, float]
    nearest: dict[str, Nearest]

    @property
    def mean_auc(self) -> float:
        """The mean over persons."""
        return float(np.mean(list(self.auc.values())))


def fit_voices(
    personas: Sequence[Persona], split: ConversationSplit, *, features: Features
) -> Voices:
    """Fit the regression that tells persons apart, on the utterances of one split."""
    said = {persona.id: persona.utterances(split) for persona in personas}
    return Voices.fit(said, features=features)


def fit_judges(
    personas: Sequence[Persona], split: ConversationSplit, *, features: Features
) -> dict[str, StyleJudge]:
    """Return the judge of every person, of one regression on the utterances of one split."""
    voices = fit_voices(personas, split, features=features)
    return {persona.id: voices.judge_of(persona.id) for persona in personas}


def validate_judges(
    personas: Sequence[Persona], judges: dict[str, StyleJudge], fitted_on: ConversationSplit
) -> StyleValidation:
    """Measure judges on the utterances of the other split."""
    unseen: ConversationSplit = "test" if fitted_on == "train" else "train"
    rows = [
        (index, conversation.id, text)
        for index, persona in enumerate(personas)
        for conversation in persona.conversations
        if conversation.split == unseen
        for text in conversation.utterances
        if has_words(text)
    ]
    if {index for index, _, _ in rows} != set(range(len(personas))):
        raise UserError(f"every persona needs {unseen} conversations to validate its judge on")
    owner = np.array([index for index, _, _ in rows])
    texts = [text for _, _, text in rows]
    by_persona = {persona.id: judges[persona.id].logits(texts) for persona in personas}
    logits = np.stack(list(by_persona.values()), axis=1)  # [utterances, personas]
    conversations = list(dict.fromkeys((index, name) for index, name, _ in rows))
    by_conversation = np.stack(
        [logits[[row[:2] == each for row in rows]].mean(axis=0) for each in conversations]
    )
    owners = np.array([index for index, _ in conversations])
    return StyleValidation(
        fitted_on=fitted_on,
        n_utterances=len(rows),
        n_conversations=len(conversations),
        top1=float((logits.argmax(axis=1) == owner).mean()),
        top1_conversations=float((by_conversation.argmax(axis=1) == owners).mean()),
        chance=1 / len(personas),
        auc={
            name: auc_of(own[owner == index], own[owner != index])
            for index, (name, own) in enumerate(by_persona.items())
        },
        nearest={
            name: min(
                (
                    Nearest(other, auc_of(own[owner == index], own[owner == at]))
                    for at, other in enumerate(by_persona)
                    if at != index
                ),
                key=lambda each: each.auc,
            )
            for index, (name, own) in enumerate(by_persona.items())
        },
    )


def _voices(said: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    worded = {name: [text for text in own if has_words(text)] for name, own in said.items()}
    known = {name: own for name, own in worded.items() if len(own) >= FEWEST_UTTERANCES}
    rest = [text for name, own in worded.items() if name not in known for text in own]
    return known | ({REST: rest} if len(rest) >= FEWEST_UTTERANCES else {})


def _row_space(z: Array) -> Array:
    """Return unit rows that span those of ``z``: a penalised fit needs no other columns."""
    _, lengths, rows = np.linalg.svd(z, full_matrices=False)
    return rows[lengths > 1e-9 * lengths[0]]


def _held_out_scores(z: Array, owners: NDArray[np.int64], inverse_penalty: float) -> Array:
    """Return the scores of every row by a regression that did not see it, nor its neighbours.

    Utterances are in order: a third of each person's is held out at once, because what belongs to
    one conversation shares its subject, and is told by that.
    """
    blocks = [np.arange(own) * FOLDS // own for own in np.bincount(owners)]
    fold = np.concatenate(blocks)
    scores = np.zeros((len(owners), len(blocks)))
    for held in (fold == each for each in range(FOLDS)):
        weights, bias = _regression(z[~held], owners[~held], inverse_penalty)
        scores[held] = z[held] @ weights.T + bias
    return scores


def _logits(scores: Array) -> Array:
    others = [logsumexp(np.delete(scores, row, 1), axis=1) for row in range(scores.shape[1])]
    return scores - np.stack(others, axis=1)


def _balanced_loss(scores: Array, owners: NDArray[np.int64]) -> float:
    losses = logsumexp(scores, axis=1) - scores[np.arange(len(owners)), owners]
    return float(np.mean([losses[owners == row].mean() for row in range(scores.shape[1])]))


def _regression(z: Array, owners: NDArray[np.int64], inverse_penalty: float) -> tuple[Array, Array]:
    model = LogisticRegression(
        C=inverse_penalty, class_weight="balanced", max_iter=2000, tol=TOLERANCE
    ).fit(z, owners)
    if len(model.classes_) == 2:  # one row tells two apart
        return np.stack([0 * model.coef_[0], model.coef_[0]]), np.array([0, *model.intercept_])
    return model.coef_, model.intercept_
