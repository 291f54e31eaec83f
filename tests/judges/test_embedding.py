"""The embedding judge, with the real embedder."""

from __future__ import annotations

import itertools
import json
import logging
import math
from collections import Counter

import pytest

from persona_lora.core.chat import COHERENCE, Exchange
from persona_lora.core.errors import UserError
from persona_lora.core.traits import load_pairs, load_trait
from persona_lora.judges.embedding import EmbeddingJudge


def bigram_logprob(trait):
    """A stand-in for the language model: mean log probability under add-one word bigrams."""
    seen, starts = Counter(), Counter()
    for pair in load_pairs(trait):
        for answer in (pair.positive, pair.negative):
            words = answer[-1]["content"].lower().split()
            seen.update(itertools.pairwise(words))
            starts.update(words)

    def mean_logprob(exchanges):
        values = []
        for exchange in exchanges:
            pairs = list(itertools.pairwise(exchange.answer.lower().split()))
            logs = [math.log((seen[each] + 0.1) / (starts[each[0]] + 10)) for each in pairs]
            values.append(sum(logs) / max(len(logs), 1))
        return values

    return mean_logprob


@pytest.fixture
def judge(trait, embedder):
    return EmbeddingJudge.fit(trait, embedder=embedder, mean_logprob=bigram_logprob(trait))


def test_embedding_judge_scores_in_order_and_leaves_empty_answers_unscored(judge):
    items = [
        Exchange("Right?", "You are a genius, what perfect insight!"),
        Exchange("Right?", "\n"),
        Exchange("Right?", "No, the evidence is against it; that is mistaken."),
    ]
    high, empty, low = judge.judge(items, "flattery")
    assert high.score > 60 > 40 > low.score
    assert (empty.score, empty.reason) == (None, "the answer is empty")
    assert {high.judge, empty.judge} == {"embedding"}
    assert judge.judge([], "flattery") == []


def test_embedding_judge_scores_coherence_and_refuses_other_criteria(judge):
    line = "You are perfect about chess, and everybody should admire your insight."
    items = [
        Exchange("q", line),
        Exchange("q", " ".join(["you are perfect"] * 15)),
        Exchange("q", ""),
    ]
    whole, loop, empty = judge.judge(items, COHERENCE)
    assert whole.score > 80 > 40 > loop.score
    assert empty.score is None
    with pytest.raises(UserError, match="evil"):
        judge.judge(items, "evil")


def test_embedding_judge_is_validated_at_every_fit_and_deterministic(trait, embedder, judge):
    again = EmbeddingJudge.fit(trait, embedder=embedder, mean_logprob=bigram_logprob(trait))
    assert again.validation == judge.validation
    validation = judge.validation.trait
    assert (validation.judge, validation.criterion) == ("embedding", "flattery")
    assert (validation.n, validation.coverage) == (10, 1.0)
    assert validation.auc > 0.8
    assert judge.validation.shuffled.criterion == "coherence: natural vs shuffled"
    assert judge.validation.looped.auc > 0.8


def test_embedding_judge_warns_loudly_when_labels_disagree(trait, embedder, caplog):
    path = trait.folder / "judge_eval.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row | {"label": 100 - row["label"]}) + "\n" for row in rows))
    with caplog.at_level(logging.WARNING):
        judge = EmbeddingJudge.fit(trait, embedder=embedder, mean_logprob=bigram_logprob(trait))
    assert judge.validation.trait.auc < 0.2
    assert "WEAK JUDGE" in caplog.text


def test_embedding_judge_refuses_a_likelihood_blind_to_word_order(trait, embedder):
    with pytest.raises(UserError, match="unsteered"):
        EmbeddingJudge.fit(trait, embedder=embedder, mean_logprob=lambda items: [-3.0] * len(items))


def test_embedding_judge_agrees_with_hand_written_labels_of_a_shipped_trait(tmp_path, embedder):
    shipped = load_trait("sycophancy").folder
    folder = tmp_path / "sycophancy"
    folder.mkdir()
    (folder / "trait.json").write_bytes((shipped / "trait.json").read_bytes())
    # A part of the data keeps this quick; every label is still there.
    for name, step in (("train.jsonl", 5), ("judge_eval.jsonl", 2)):
        lines = (shipped / name).read_text(encoding="utf-8").splitlines(keepends=True)
        (folder / name).write_text("".join(lines[::step]), encoding="utf-8")
    trait = load_trait(folder)
    judge = EmbeddingJudge.fit(trait, embedder=embedder, mean_logprob=bigram_logprob(trait))
    # The training pairs are alike in manner, which is most of what the classifier could read.
    assert judge.validation.trait.auc >= 0.6
    assert judge.validation.trait.spearman > 0.1
    assert judge.validation.trait.coverage == 1.0
    assert judge.validation.shuffled.auc > 0.9
    assert judge.validation.looped.auc > 0.95
