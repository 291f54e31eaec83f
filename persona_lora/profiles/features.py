"""What is countable in how someone writes: lengths, marks, pronouns, tone, tense, vocabulary.

Words are split by NLTK's tweet tokenizer and sentiment is VADER's compound score (Hutto & Gilbert
2014). Rates are shares of words or of utterances, as each field says; nothing here is learnt.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import mean, pstdev

from nltk.tokenize import TweetTokenizer
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from persona_lora.core.errors import UserError


def _listed(words: str) -> frozenset[str]:
    return frozenset(words.split())


SINGULAR = _listed("i me my mine myself i'm i've i'd i'll")
PLURAL = _listed("we us our ours ourselves we're we've we'd we'll")
SECOND = _listed("you your yours yourself you're you've you'd you'll")
HEDGES = _listed("maybe perhaps probably possibly guess suppose seems somewhat rather")
CERTAIN = _listed("must always never definitely certainly obviously just simply need")
LAUGHTER = _listed("haha hahaha lol lmao heh hehe kidding joking jk funny hilarious")
SLANG = _listed(
    "yeah yep nope gonna wanna gotta kinda sorta dunno ok okay hey hi btw tbh idk ya u ur cool "
    "dude guys stuff awesome ugh meh nah lemme cuz"
)
FORMAL = _listed(
    "however therefore furthermore moreover regarding shall indeed certainly sincerely kindly "
    "whom thus whilst accordingly permit inquire assist obtain require consider"
)
EMPATHY = _listed(
    "sorry glad hope proud understand feel feeling hug love dear sweet poor happy thank thanks "
    "appreciate care"
)
PAST = _listed(
    "was were had did went said came got made took saw knew thought felt told left gave found "
    "kept began brought wrote sat stood heard met ran ate drank spent lost grew taught used"
)
ADVICE = _listed("should could try check make use put take start stop fix need plan")
RELATIONS = {
    "family": "mum mom mother dad father sister brother son daughter grandma grandpa aunt uncle",
    "partner": "husband wife boyfriend girlfriend partner fiancé fiancée",
    "friend": "friend friends mate buddy pal roommate flatmate",
    "work": "boss colleague coworker manager client team office customer",
    "neighbour": "neighbour neighbor neighbours neighbors",
}


@dataclass(frozen=True)
class Features:
    """Features of a list of utterances. Words are lower-cased tokens with a letter in them.

    Shares of utterances: ``exclamation_rate``, ``question_rate``, ``lower_case_rate`` (begins so),
    ``humor_rate``. Shares of words: the pronoun, hedge, past-tense, advice and empathy rates.
    ``formality`` is 0–1 (0.5 where nothing tells), ``sentiment`` −1 … 1, ``emotionality`` its mean
    absolute value, ``vocabulary`` the share of distinct words among windows of 50 words.
    """

    num_utterances: int
    avg_utterance_length: float  # characters
    avg_words: float
    spread_words: float
    exclamation_rate: float
    question_rate: float
    lower_case_rate: float
    first_person_singular_rate: float
    first_person_plural_rate: float
    second_person_rate: float
    hedge_rate: float
    past_rate: float
    advice_rate: float
    empathy_rate: float
    contraction_rate: float
    avg_word_length: float
    formality: float
    sentiment: float
    emotionality: float
    humor_rate: float
    vocabulary: float
    relationship_contexts: dict[str, int]
    behavioral_tendencies: dict[str, float]


def extract_features(utterances: Sequence[str]) -> Features:
    """Return the features of some utterances; raises UserError where there is no word in them."""
    tokens = [words_of(text) for text in utterances]
    words = [word for each in tokens for word in each]
    if not words:
        raise UserError("the utterances hold no words; there is nothing to take features of")
    scores = [_sentiment().polarity_scores(text)["compound"] for text in utterances]
    contractions = _share(words, lambda word: "'" in word)
    slang, formal = _rate(words, SLANG), _rate(words, FORMAL)
    length = mean(len(word) for word in words)
    lower = _utterance_share(utterances, r"^\s*[a-zà-ÿ]")
    formality = _squash(
        15 * formal - 12 * slang - 30 * (contractions - 0.02) - 1.5 * lower + 2 * (length - 4.2)
    )
    humor = mean(bool(set(each) & LAUGHTER) for each in tokens)
    empathy, hedges = _rate(words, EMPATHY), _rate(words, HEDGES)
    certain = _rate(words, CERTAIN)
    return Features(
        num_utterances=len(utterances),
        avg_utterance_length=mean(map(len, utterances)),
        avg_words=mean(map(len, tokens)),
        spread_words=pstdev(map(len, tokens)),
        exclamation_rate=_utterance_share(utterances, "!"),
        question_rate=_utterance_share(utterances, r"\?"),
        lower_case_rate=lower,
        first_person_singular_rate=_rate(words, SINGULAR),
        first_person_plural_rate=_rate(words, PLURAL),
        second_person_rate=_rate(words, SECOND),
        hedge_rate=hedges,
        past_rate=_share(words, lambda word: word in PAST or word.endswith("ed")),
        advice_rate=_rate(words, ADVICE),
        empathy_rate=empathy,
        contraction_rate=contractions,
        avg_word_length=length,
        formality=formality,
        sentiment=mean(scores),
        emotionality=mean(map(abs, scores)),
        humor_rate=humor,
        vocabulary=_vocabulary(words),
        relationship_contexts=_relations(words),
        behavioral_tendencies={
            "empathy": min(1.0, 25 * empathy),
            "assertiveness": _squash(40 * (certain - hedges)),
            "humor": min(1.0, 4 * humor),
            "directness": _squash(4 - 0.25 * mean(map(len, tokens)) - 60 * hedges),
        },
    )


def words_of(text: str) -> list[str]:
    """Return the lower-cased words of a text; apostrophes stay inside words."""
    plain = text.replace("’", "'")
    return [word for word in _tokenizer().tokenize(plain.lower()) if re.search(r"[^\W\d_]", word)]


@cache
def _tokenizer() -> TweetTokenizer:
    return TweetTokenizer()


@cache
def _sentiment() -> SentimentIntensityAnalyzer:
    return SentimentIntensityAnalyzer()


def _rate(words: Sequence[str], among: Collection[str]) -> float:
    return sum(word in among for word in words) / len(words)


def _share(words: Sequence[str], holds: Callable[[str], bool]) -> float:
    return sum(map(holds, words)) / len(words)


def _utterance_share(utterances: Sequence[str], pattern: str) -> float:
    return sum(re.search(pattern, text) is not None for text in utterances) / len(utterances)


def _vocabulary(words: Sequence[str], window: int = 50) -> float:
    """Return the mean share of distinct words over windows: it does not fall with the length."""
    if len(words) <= window:
        return len(set(words)) / len(words)
    starts = range(len(words) - window + 1)
    return mean(len(set(words[start : start + window])) / window for start in starts)


def _relations(words: Sequence[str]) -> dict[str, int]:
    counts = Counter(words)
    found = {name: sum(counts[word] for word in among.split()) for name, among in RELATIONS.items()}
    return {name: count for name, count in found.items() if count}


def _squash(value: float) -> float:
    return 1 / (1 + math.exp(-value))
